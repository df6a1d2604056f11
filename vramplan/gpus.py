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
NOISE = ("nvidia", "geforce", "tesla", "graphics", "gpu", "rtx", "gtx")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card.

    Attributes:
        slug: Name for ``--gpu``.
        name: Marketing name.
        aliases: Other names people and nvidia-smi use.
        memory_bytes: Total memory as the driver reports it, in bytes; None where no source says.
        memory_note: Why it is unknown; None where it is known.
        memory_source: Where the total comes from, and under which settings (ECC).
        box_gb: Gigabytes printed on the box.
        bandwidth_bytes_per_s: Memory bandwidth, in bytes per second.
        bf16_flops_per_s: Dense rate with fp32 accumulation, in operations per second; None without
            such units or without a source.
        fp16_flops_per_s: As above.
        tf32_flops_per_s: As above.
        fp32_flops_per_s: Rate outside the tensor cores, in operations per second.
        board_power_w: What the whole card may draw, in watts; None where that is not certain.
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
    board_power_w: float | None
    compute_capability: tuple[int, int]
    architecture: str
    source: str

    @property
    def supports_bf16(self) -> bool:
        """bf16 units came with compute capability 8.0."""
        return self.compute_capability >= (8, 0)


@cache
def load_gpus() -> Mapping[str, Gpu]:
    """Read the catalogue, once a process.

    Returns:
        Every card by its slug, in the order of the file.

    Source:
        ``profiles/gpus.toml``, which names a source for each card.
    """
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
        board_power_w=row.get("board_power_w"),
        compute_capability=(int(major), int(minor)),
        architecture=row["architecture"],
        source=row["source"],
    )


def plain(name: str) -> str:
    """A name without case, punctuation and the words that say nothing.

    Args:
        name: Any spelling, "NVIDIA GeForce RTX 3060" or "rtx3060".

    Returns:
        What tells cards apart: "3060".
    """
    text = "".join(c for c in name.lower() if c.isalnum())
    for word in NOISE:
        text = text.replace(word, "")
    return text


def _by_slug(slug: str) -> Gpu | None:
    """The card of exactly that slug, reading only its table: the common case, ten times faster."""
    text = (profiles_dir() / "gpus.toml").read_text(encoding="utf-8")
    for table in text.split("[[gpu]]")[1:]:
        if table.startswith(f'\nslug = "{slug}"\n'):
            return _gpu(tomllib.loads(table))
    return None


@cache
def _by_name() -> Mapping[str, Gpu]:
    """Every card by the plain form of each of its names."""
    return {
        plain(name): gpu
        for gpu in load_gpus().values()
        for name in (gpu.slug, gpu.name, *gpu.aliases)
    }


def sizes_of(name: str) -> list[Gpu]:
    """The cards that a name without a size may mean.

    Args:
        name: Any spelling, "a100" or "RTX 3080".

    Returns:
        Every card whose slug is that name and a size; empty where the name tells the size.
    """
    wanted = plain(name)
    return [
        gpu
        for slug, gpu in load_gpus().items()
        if plain(slug.removesuffix(f"-{gpu.box_gb}gb")) == wanted != plain(slug)
    ]


def find_gpu(name: str) -> Gpu:
    """The card of that name.

    Args:
        name: A slug, an alias or nvidia-smi's product name; case, spaces and punctuation do not
            matter, nor do the words NVIDIA, GeForce, RTX and the like.

    Returns:
        The card. A name shared by two sizes gives the more common one.

    Raises:
        UnknownNameError: If no card is called so; it names the nearest.
    """
    gpu = _by_slug(name) or _by_name().get(plain(name))
    if gpu is None:
        known = [n for g in load_gpus().values() for n in (g.slug, *g.aliases)]
        raise UnknownNameError("GPU", name, known, "Or give its memory: --memory 12GiB.")
    return gpu
