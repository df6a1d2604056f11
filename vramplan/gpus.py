"""The catalogue of cards (``profiles/gpus.toml``)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vramplan.errors import UnknownNameError
from vramplan.resources import profiles_dir

TERA = 10**12
NOISE = ("nvidia", "geforce", "tesla", "gpu", "graphics")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card.

    Attributes:
        slug: Name for ``--gpu``.
        name: Marketing name.
        aliases: Other names people and nvidia-smi use.
        memory_bytes: Total memory as the driver reports it; None where no source says.
        memory_note: Why it is unknown.
        memory_source: Where the total comes from.
        box_gb: Gigabytes printed on the box.
        bandwidth_bytes_per_s: Memory bandwidth.
        bf16_flops_per_s: Dense rate with fp32 accumulation; None without such units.
        fp16_flops_per_s: As above.
        tf32_flops_per_s: As above.
        fp32_flops_per_s: Rate outside the tensor cores.
        compute_capability: (major, minor).
        architecture: "ampere", "hopper", ...
        source: Where the rates come from.
    """

    slug: str
    name: str
    aliases: tuple[str, ...]
    memory_bytes: int | None
    memory_note: str | None
    memory_source: str | None
    box_gb: int
    bandwidth_bytes_per_s: float | None
    bf16_flops_per_s: float | None
    fp16_flops_per_s: float | None
    tf32_flops_per_s: float | None
    fp32_flops_per_s: float | None
    compute_capability: tuple[int, int]
    architecture: str
    source: str

    @property
    def supports_bf16(self) -> bool:
        """bf16 units came with compute capability 8.0."""
        return self.compute_capability >= (8, 0)


@cache
def load_gpus() -> Mapping[str, Gpu]:
    """All cards by slug."""
    with (profiles_dir() / "gpus.toml").open("rb") as file:
        rows = tomllib.load(file)["gpu"]
    return {row["slug"]: _gpu(row) for row in rows}


def _gpu(row: Mapping[str, Any]) -> Gpu:
    memory = row.get("memory_mib")
    major, minor = row["compute_capability"].split(".")

    def flops(key: str) -> float | None:
        rate = row.get(f"{key}_tflops")
        return None if rate is None else rate * TERA

    return Gpu(
        slug=row["slug"],
        name=row["name"],
        aliases=tuple(row["aliases"]),
        memory_bytes=None if memory is None else memory * 1024**2,
        memory_note=row.get("memory_note"),
        memory_source=row.get("memory_source"),
        box_gb=row["box_gb"],
        bandwidth_bytes_per_s=row["bandwidth_gb_per_s"] * 1e9,
        bf16_flops_per_s=flops("bf16"),
        fp16_flops_per_s=flops("fp16"),
        tf32_flops_per_s=flops("tf32"),
        fp32_flops_per_s=flops("fp32"),
        compute_capability=(int(major), int(minor)),
        architecture=row["architecture"],
        source=row["source"],
    )


def plain(name: str) -> str:
    """A name without case, punctuation and the words that say nothing."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "".join(word for word in words if word not in NOISE)


def find_gpu(name: str) -> Gpu:
    """The card of that name.

    Args:
        name: A slug, an alias or nvidia-smi's product name; case and punctuation do not matter.

    Raises:
        UnknownNameError: If no card is called so.
    """
    gpus = load_gpus()
    wanted = plain(name)
    for gpu in gpus.values():
        if wanted in map(plain, (gpu.slug, gpu.name, *gpu.aliases)):
            return gpu
    raise UnknownNameError("GPU", name, gpus, "Or give its memory: --memory 12GiB.")
