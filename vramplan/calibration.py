"""Constants that no formula can know, measured per GPU, driver and torch.

A card without a measurement of its own borrows another card's constants and the answer says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from vramplan.resources import profiles_dir

DEFAULT_GPU = "h100-sxm-80gb"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured constants of one GPU.

    Attributes:
        name: Slug of the GPU they were measured on.
        measured_on: Card, driver and torch, for people.
        context_bytes: Device memory of a process that only created a CUDA context.
        overhead_bytes: What the process holds beyond the allocator's reserved memory after some
            training steps: context, kernels, library handles.
        managed_step_bytes: Managed memory (paged optimizer state) takes device memory in steps of
            this size while nothing evicts it.
        driver_reserved_bytes: Part of the driver's total that no process can have.
        host_bytes: Resident host memory of the training process, weights not counted.
        doubt_bytes: How far another card's constants may be off.
        borrowed: Whether it was measured on another card than the one asked for.
    """

    name: str
    measured_on: str
    context_bytes: int
    overhead_bytes: int
    managed_step_bytes: int
    driver_reserved_bytes: int
    host_bytes: int
    doubt_bytes: int
    borrowed: bool = False

    def managed_bytes(self, paged_bytes: int) -> int:
        """Device memory that paged optimizer state takes while there is room for it.

        Known limitations:
            A lower bound: recorded runs with several hundred MiB took one more step of it.
        """
        return -(-paged_bytes // self.managed_step_bytes) * self.managed_step_bytes


@cache
def _load(slug: str) -> dict[str, Any] | None:
    path = profiles_dir() / "calibrations" / slug / "profile.json"
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def calibration_for(slug: str | None) -> Calibration:
    """The constants to use for a card: its own, or the reference card's, marked as borrowed."""
    own = _load(slug) if slug else None
    data = own or _load(DEFAULT_GPU)
    assert data is not None, "the package ships a calibration of its reference card"
    constants = data["constants"]
    return Calibration(
        name=data["gpu"],
        measured_on=data["measured_on"],
        context_bytes=constants["context_bytes"],
        overhead_bytes=constants["overhead_bytes"],
        managed_step_bytes=constants["managed_step_bytes"],
        driver_reserved_bytes=constants["driver_reserved_bytes"],
        host_bytes=constants["host_bytes"],
        doubt_bytes=constants["doubt_bytes"],
        borrowed=own is None,
    )
