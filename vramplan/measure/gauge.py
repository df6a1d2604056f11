"""Reading the card's memory, and the peak of every phase."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Gauge:
    """Memory readings; on a machine without a GPU every one of them is None."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.init()

    def allocated(self) -> int | None:
        """Torch's memory_allocated, in bytes."""
        return torch.cuda.memory_allocated() if self.cuda else None

    def reserved(self) -> int | None:
        """Torch's memory_reserved, in bytes."""
        return torch.cuda.memory_reserved() if self.cuda else None

    def requested(self) -> int | None:
        """Bytes the program holds as it asked for them, not rounded."""
        if not self.cuda:
            return None
        return int(torch.cuda.memory_stats()["requested_bytes.all.current"])

    def device_used(self) -> int | None:
        """What the driver counts as used on the card, in bytes."""
        if not self.cuda:
            return None
        free, total = torch.cuda.mem_get_info()
        return int(total) - int(free)

    def total(self) -> int | None:
        """What CUDA reports as the card's memory, in bytes."""
        return int(torch.cuda.mem_get_info()[1]) if self.cuda else None

    def peaks(self) -> dict[str, int]:
        """The allocator's peaks since ``restart``; empty without a GPU."""
        if not self.cuda:
            return {}
        stats = torch.cuda.memory_stats_as_nested_dict()
        return {
            "peak_allocated_bytes": stats["allocated_bytes"]["all"]["peak"],
            "peak_reserved_bytes": stats["reserved_bytes"]["all"]["peak"],
            "peak_requested_bytes": stats["requested_bytes"]["all"]["peak"],
            "num_alloc_retries": stats["num_alloc_retries"],
            "num_ooms": stats["num_ooms"],
        }

    def restart(self) -> None:
        """Start new peaks."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()


class PhaseBook:
    """The peak of every phase.

    The allocator's counters are read on the CPU, so a phase's end does not wait for the GPU: memory
    is given out when a kernel is launched, not when it runs.
    """

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.phase = "start"
        self.steady: dict[str, dict[str, int]] = {}
        self.step: dict[str, int] = {}
        self.first_step = False
        self.on_enter: list[Callable[[str], None]] = []

    def enter(self, phase: str) -> None:
        """Close the phase at work and begin another."""
        self.close()
        self.phase = phase
        for listener in self.on_enter:
            listener(phase)

    def close(self) -> None:
        """Book the peaks since the last boundary to the phase at work."""
        now = self.gauge.peaks()
        self.gauge.restart()
        _raise_to(self.step, now)
        if not self.first_step:
            book = self.steady.setdefault(self.phase, {})
            _raise_to(book, {k: v for k, v in now.items() if k.startswith("peak_")})


def _raise_to(book: dict[str, int], values: dict[str, int]) -> None:
    for name, value in values.items():
        book[name] = max(book.get(name, 0), value)
