"""Unified-memory events through NVIDIA's cupti-python: what paging really moves.

A pass of its own: CUPTI has one subscriber, so nothing else that profiles may run beside it. The
counts are trusted only if a small buffer moved to the host and back, before and after the run, is
seen to the byte. Otherwise the answer is "not measured".

Source: CUPTI 13 ``cupti_activity.h`` (UNIFIED_MEMORY_COUNTER), cupti-python 13.0.1;
bitsandbytes 0.50.2 ``functional.py`` (``get_paged``, ``fill``, ``prefetch_tensor``).
"""

from __future__ import annotations

import ctypes
import math
import resource
import threading
from typing import Any

import torch

from vramplan.units import format_bytes

CANARY_BYTES = 8 * 1024**2
BUFFER_BYTES = 8 * 1024**2
PAGE = 4096


class PagingUnavailableError(Exception):
    """Paging events cannot be counted here; the message says why."""


class ManagedMemoryError(RuntimeError):
    """More managed memory was asked for than the card has free."""


class PagingTap:
    """Counts unified-memory events by stretch of the run.

    Args:
        device: The card.

    Raises:
        PagingUnavailableError: Without a GPU, without cupti-python, or if CUPTI refuses.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise PagingUnavailableError("there is no GPU")
        try:
            from cupti import cupti  # noqa: PLC0415 - an optional extra
        except ImportError as error:
            raise PagingUnavailableError(
                f"cupti-python cannot be imported ({error}); install vramplan[paging]"
            ) from None
        self.cupti = cupti
        self.lock = threading.Lock()
        self.events: list[tuple[int, int, int]] = []
        self.windows: list[dict[str, Any]] = []
        self.faults = 0
        self.reasons: list[str] = []
        try:
            self._enable()
        except Exception as error:  # CUPTI's own errors have no common base
            raise PagingUnavailableError(f"CUPTI refused: {error}") from None
        self._canary("before the run")
        self._close(None)

    def _enable(self) -> None:
        cupti = self.cupti
        cupti.activity_register_callbacks(lambda: (BUFFER_BYTES, 0), self._receive)
        kinds = cupti.ActivityUnifiedMemoryCounterKind
        wanted = (
            kinds.BYTES_TRANSFER_HTOD,
            kinds.BYTES_TRANSFER_DTOH,
            kinds.CPU_PAGE_FAULT_COUNT,
            kinds.GPU_PAGE_FAULT,
            kinds.THRASHING,
        )
        settings = cupti.ActivityUnifiedMemoryCounterConfig(len(wanted))
        settings.scope = int(cupti.ActivityUnifiedMemoryCounterScope.PROCESS_SINGLE_DEVICE)
        settings.device_id = torch.cuda.current_device()
        settings.enable = 1
        for index, kind in enumerate(wanted):
            settings[index].kind = int(kind)
        cupti.activity_configure_unified_memory_counter(settings.ptr, len(wanted))
        cupti.activity_enable(cupti.ActivityKind.UNIFIED_MEMORY_COUNTER)

    def _receive(self, activities: list[Any]) -> None:
        wanted = int(self.cupti.ActivityKind.UNIFIED_MEMORY_COUNTER)
        with self.lock:
            self.events += [
                (int(a.counter_kind), int(a.value), int(a.flags_))
                for a in activities
                if int(a.kind) == wanted
            ]

    # -- windows ---------------------------------------------------------------------------------

    def attach(self, watch: Any) -> None:
        """Close a window after every step and every phase between steps."""
        watch.after_step.append(lambda number: self._close(f"step {number}"))
        watch.after_phase.append(self._close)

    def _close(self, window: str | None) -> dict[str, Any]:
        """Book the events since the last call; ``None`` throws them away."""
        torch.cuda.synchronize()
        self.cupti.activity_flush_all(1)
        with self.lock:
            events, self.events = self.events, []
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        booked = self._summary(events) | {
            "window": window or "",
            "major_faults": faults - self.faults,
        }
        self.faults = faults
        if window is not None:
            self.windows.append(booked)
        return booked

    def _summary(self, events: list[tuple[int, int, int]]) -> dict[str, Any]:
        kinds = self.cupti.ActivityUnifiedMemoryCounterKind
        causes = self.cupti.ActivityUnifiedMemoryMigrationCause
        moved: dict[int, dict[str, int]] = {
            int(kinds.BYTES_TRANSFER_HTOD): {},
            int(kinds.BYTES_TRANSFER_DTOH): {},
        }
        counts = {"gpu_fault_groups": 0, "cpu_faults": 0, "thrashing": 0}
        for kind, value, flags in events:
            if kind in moved:
                cause = _cause(causes, flags)
                moved[kind][cause] = moved[kind].get(cause, 0) + value
            elif kind == int(kinds.GPU_PAGE_FAULT):
                counts["gpu_fault_groups"] += value
            elif kind == int(kinds.CPU_PAGE_FAULT_COUNT):
                counts["cpu_faults"] += 1  # its value is a program counter
            elif kind == int(kinds.THRASHING):
                counts["thrashing"] += 1
        return counts | {
            "host_to_device_bytes": moved[int(kinds.BYTES_TRANSFER_HTOD)],
            "device_to_host_bytes": moved[int(kinds.BYTES_TRANSFER_DTOH)],
        }

    # -- the canary ------------------------------------------------------------------------------

    def _canary(self, when: str) -> None:
        """Move a small managed buffer to the host and back and see whether both are counted."""
        import bitsandbytes.functional as bnb  # noqa: PLC0415 - only paged runs need it

        free = torch.cuda.mem_get_info()[0]
        if free < 4 * CANARY_BYTES:
            self.reasons.append(f"no free memory for the canary {when}")
            return
        if not hasattr(self, "buffer"):
            self.buffer = bnb.get_paged(CANARY_BYTES, dtype=torch.uint8)
            bnb.fill(self.buffer, 1)
        self._close(None)
        int(self.buffer[::PAGE].sum())  # the CPU touches every page: they move to the host
        there = sum(self._close(None)["device_to_host_bytes"].values())
        bnb.prefetch_tensor(self.buffer)
        back = sum(self._close(None)["host_to_device_bytes"].values())
        if (there, back) != (CANARY_BYTES, CANARY_BYTES):
            self.reasons.append(
                f"the canary {when} moved {CANARY_BYTES} bytes each way and CUPTI counted "
                f"{there} to the host and {back} to the card"
            )

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Second canary, then the answer.

        Args:
            record: The finished run, for its paged bytes.
        """
        self._close(None)
        self._canary("after the run")
        dropped = self._dropped()
        if dropped:
            self.reasons.append(f"CUPTI dropped {dropped} records")
        paged = record.get("paged_bytes") or 0
        for window in self.windows:
            moved = sum(window["device_to_host_bytes"].values())
            if window["window"] == "save" and paged and moved < paged:
                window["note"] = (
                    f"a save reads all {paged} paged bytes; CUPTI reported {moved} of them moving "
                    "(it can lose records in a burst)"
                )
        self.cupti.activity_disable(self.cupti.ActivityKind.UNIFIED_MEMORY_COUNTER)
        if self.reasons:
            return {
                "measured": False,
                "reason": "; ".join(self.reasons),
                "canary_bytes": CANARY_BYTES,
            }
        return {
            "measured": True,
            "reason": None,
            "canary_bytes": CANARY_BYTES,
            "windows": self.windows,
        }

    def _dropped(self) -> int:
        dropped = ctypes.c_size_t()
        self.cupti.activity_get_num_dropped_records(0, 0, ctypes.addressof(dropped))
        return dropped.value


def guard_managed_memory() -> None:
    """From now on bitsandbytes gets managed memory only while the card has as much free.

    More managed memory than a card has free can hang it for everyone, so this is refused and never
    tried.
    """
    import bitsandbytes.functional as bnb  # noqa: PLC0415 - only paged runs need it

    get_paged = bnb.get_paged

    def guarded(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        free = torch.cuda.mem_get_info()[0]
        if nbytes >= free:
            raise ManagedMemoryError(
                f"refused {format_bytes(nbytes)} of managed memory for the paged optimizer: the "
                f"card has {format_bytes(free)} free. Use an unpaged --optim"
            )
        return get_paged(*shape, dtype=dtype, **options)

    bnb.get_paged = guarded


def _cause(causes: Any, flags: int) -> str:
    try:
        return str(causes(flags).name).lower()
    except ValueError:
        return f"cause {flags}"
