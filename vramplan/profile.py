"""The Profile: constants that no formula can know, measured per GPU, driver and torch.

A card without a Profile of its own borrows the reference card's constants, and the answer says so.
Profiles are made by ``vramplan calibrate`` (``vramplan/calibrate.py``) from records; a user's own,
in the data folder, wins over a shipped one, the newest over an older one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vramplan.errors import RecordError
from vramplan.resources import profiles_dir, user_calibrations_dir
from vramplan.units import MIB

SCHEMA_VERSION = 1
REFERENCE_GPU = "h100-sxm-80gb"
MAX_PROFILE_BYTES = 4 * MIB
# What other cards' contexts and kernels were seen to take in public nvidia-smi logs: 0.3 GiB less
# than the reference card's, never more. No measurement of ours.
BORROWED_DOUBT_BYTES = 300 * MIB


@dataclass(frozen=True, slots=True)
class Constant:
    """One measured constant.

    Attributes:
        value: Median of what was observed, in ``unit``.
        unit: "bytes", "s", "flop/s", "bytes/s", ... ; empty for a ratio.
        low: Smallest observation.
        high: Largest observation.
        residual: Median distance of the observations from ``value``, in ``unit``.
        num_observations: Records it was read from.
        confidence: "high", "medium" or "low" (see ``vramplan.calibrate``).
    """

    value: float
    unit: str
    low: float
    high: float
    residual: float
    num_observations: int
    confidence: str


@dataclass(frozen=True, slots=True)
class Profile:
    """Measured constants of one GPU with one driver and one torch.

    Attributes:
        gpu: Slug of the GPU they were measured on.
        gpu_name: Its product name.
        driver: Version of the driver.
        torch: Version of torch.
        created: When it was made, UTC, ISO 8601.
        constants: By name; see ``vramplan.calibrate.CONSTANTS`` for what each is.
        own: Whether it is the user's own.
        borrowed: Whether it stands in for a card that has none.
    """

    gpu: str
    gpu_name: str
    driver: str
    torch: str
    created: str
    constants: Mapping[str, Constant]
    own: bool = False
    borrowed: bool = False

    @property
    def name(self) -> str:
        """What answers call it."""
        kind = "your profile of " if self.own else ""
        return f"{kind}{self.gpu} (driver {self.driver}, torch {self.torch})"

    def _bytes(self, name: str) -> int:
        return int(self.constants[name].value)

    @property
    def context_bytes(self) -> int:
        """Device memory of a process that only created a CUDA context."""
        return self._bytes("context_bytes")

    def process_bytes(self, *, bitsandbytes: bool) -> int:
        """What a training process holds beyond the allocator's reserved memory.

        The context, loaded kernels and library handles; managed memory comes on top.

        Args:
            bitsandbytes: Whether its kernels are loaded too.

        Returns:
            Bytes.
        """
        with_it = self.constants.get("process_bitsandbytes_bytes")
        if bitsandbytes and with_it is not None:
            return int(with_it.value)
        return self._bytes("process_bytes")

    @property
    def driver_reserved_bytes(self) -> int:
        """Part of the driver's total that no process can have."""
        return self._bytes("driver_reserved_bytes")

    @property
    def host_bytes(self) -> int:
        """Resident host memory of the training process, weights not counted."""
        return self._bytes("host_bytes")

    @property
    def cublas_workspace_bytes(self) -> int | None:
        """What cuBLAS takes from the allocator, both threads; None where the formula must do.

        Borrowed it says nothing: it depends on the generation.
        """
        found = self.constants.get("cublas_workspace_bytes")
        return None if found is None or self.borrowed else int(found.value)

    @property
    def doubt_bytes(self) -> int:
        """How far ``process_bytes`` may be off: the spread seen, or what is assumed if borrowed."""
        seen = self.constants["process_bytes"]
        spread = int(max(seen.high - seen.value, seen.value - seen.low))
        return max(spread, BORROWED_DOUBT_BYTES) if self.borrowed else spread

    def managed_bytes(self, paged_bytes: int) -> int:
        """Device memory that paged optimizer state takes while there is room for it.

        Known limitations:
            A lower bound: recorded runs with several hundred MiB took one more step of it.
        """
        step = self._bytes("managed_step_bytes")
        return -(-paged_bytes // step) * step


def read_profile(path: Path, *, own: bool = False) -> Profile:
    """Read a Profile.

    Args:
        path: The file.
        own: Whether it is the user's own.

    Raises:
        RecordError: If it cannot be read, is broken, or of a newer version.
    """
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise RecordError(f"{path} is larger than any profile ({MAX_PROFILE_BYTES} bytes)")
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["schema_version"]
        if version > SCHEMA_VERSION:
            raise RecordError(
                f"{path} has schema_version {version}; this vramplan reads up to {SCHEMA_VERSION}, "
                "update it"
            )
        profile = Profile(
            gpu=str(document["gpu"]),
            gpu_name=str(document["gpu_name"]),
            driver=str(document["driver"]),
            torch=str(document["torch"]),
            created=str(document["created"]),
            constants={
                str(name): _constant(values) for name, values in document["constants"].items()
            },
            own=own,
        )
        missing = sorted(NEEDED - profile.constants.keys())
    except (
        OSError,
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise RecordError(
            f"{path} cannot be read as a profile ({error!r}); make it again with vramplan "
            "calibrate, or delete it"
        ) from None
    if missing:
        raise RecordError(f"{path} lacks {missing[0]}; make it again with vramplan calibrate")
    return profile


NEEDED = {
    "context_bytes", "process_bytes", "managed_step_bytes", "driver_reserved_bytes", "host_bytes",
}  # fmt: skip


def _constant(values: Mapping[str, Any]) -> Constant:
    numbers = [float(values[key]) for key in ("value", "low", "high", "residual")]
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or not numbers[0]:
        raise ValueError(f"{numbers} are not a constant")
    return Constant(
        value=float(values["value"]),
        unit=str(values["unit"]),
        low=float(values["low"]),
        high=float(values["high"]),
        residual=float(values["residual"]),
        num_observations=int(values["num_observations"]),
        confidence=str(values["confidence"]),
    )


def profile_file(gpu: str, driver: str, torch: str) -> str:
    """Name of the file of a GPU's Profile, below a folder of calibrations."""
    name = f"driver-{driver}-torch-{torch}"
    safe = ["".join(c if c.isalnum() or c in ".+-" else "-" for c in text) for text in (gpu, name)]
    return f"{safe[0].lstrip('.') or 'gpu'}/{safe[1]}.json"


def _found(folder: Path, gpu: str, *, own: bool) -> Iterator[Profile]:
    for path in sorted((folder / gpu).glob("driver-*.json")):
        yield read_profile(path, own=own)


@cache
def own_profile(gpu: str) -> Profile | None:
    """The Profile that was measured on this card: the user's newest, else the shipped newest.

    Raises:
        RecordError: If one of the card's profiles cannot be read.
    """
    for folder, own in ((user_calibrations_dir(), True), (profiles_dir() / "calibrations", False)):
        found = sorted(_found(folder, gpu, own=own), key=lambda profile: profile.created)
        if found:
            return found[-1]
    return None


def profile_for(gpu: str | None) -> Profile:
    """The constants to use for a card: its own, or the reference card's, marked as borrowed.

    Args:
        gpu: The card's slug; None for a plain memory size.
    """
    own = own_profile(gpu) if gpu else None
    if own is not None:
        return own
    reference = own_profile(REFERENCE_GPU)
    assert reference is not None, "the package ships a profile of its reference card"
    return replace(reference, borrowed=True)
