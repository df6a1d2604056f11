"""The card that this process computes on, for measuring regions in it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from vramplan.alloc_conf import DEFAULT_SETTINGS, parse_alloc_conf
from vramplan.errors import EnvironmentProblem, UsageError
from vramplan.measure.harness import Harness
from vramplan.measure.holdings import Counts, Notes
from vramplan.measure.machine import Device, Machine
from vramplan.measure.region import Follow

MAX_ENTRIES = 4_000_000  # of the trace; more than that and modules are unknown


def open_card() -> TorchCard:
    """The card that torch uses in this process; makes no CUDA context.

    Raises:
        EnvironmentProblem: Without a GPU, without torch, or with another package missing.
    """
    if importlib.util.find_spec("torch") is None:
        raise EnvironmentProblem("measuring needs torch: pip install 'vramplan[measure]'")
    import torch  # noqa: PLC0415 - not before it is known to be needed

    if torch.version.cuda is None:
        raise EnvironmentProblem(f"this torch ({torch.__version__}) is built without CUDA")
    if not torch.cuda.is_available():
        raise EnvironmentProblem("torch sees no CUDA GPU")
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    machine = Machine()
    return TorchCard(machine, index)


class TorchCard:
    """Torch's allocator on one card, and the driver's view of it (see ``region.Card``).

    Args:
        machine: NVML.
        index: The card's number among those that CUDA_VISIBLE_DEVICES leaves visible.

    Attributes:
        device: The card.
        where: What must be equal for figures to be comparable.
        versions: What else decides them.
    """

    def __init__(self, machine: Machine, index: int) -> None:
        import torch  # noqa: PLC0415 - as above

        from vramplan.measure.worker import environment, set_allocator  # noqa: PLC0415 - as above

        self.torch, self.machine, self._index = torch, machine, index
        self.device: Device = machine.device(index)
        # what the process holds beyond the allocator's segments: none before CUDA is begun
        self._beyond: int | None = None if torch.cuda.is_initialized() else 0
        self._others: int | None = None
        settings = set_allocator("")  # changes nothing, and tells what is in force
        self.where = {
            "GPU": self.device.slug or self.device.name,
            "allocator": settings or "default",
        }
        self.versions = {name: version or "none" for name, version in environment().items()}
        self.versions["driver"] = self.device.driver
        self.round_size = DEFAULT_SETTINGS.round_size
        with contextlib.suppress(UsageError):  # settings that we do not know round nothing
            self.round_size = parse_alloc_conf(settings or "").round_size

    @property
    def lock_name(self) -> str:
        """What measurements on this card lock."""
        return self.device.uuid

    def limit(self) -> str:
        """The share of the card that the program lets itself have; empty if it may have it all."""
        share = getattr(self.torch.cuda, "get_per_process_memory_fraction", None)
        fraction = 1.0 if share is None or not self.torch.cuda.is_initialized() else share()
        return "" if fraction >= 1 else f"{fraction:.4g} of the card"

    def harness(self) -> Harness:
        """What runs jobs in workers on this card; its lock is held by whoever asks."""
        return Harness("cuda", gpu_index=self._index, allow_busy=True, lock=False)

    # -- the driver's view -----------------------------------------------------------------------

    def acquired(self) -> None:
        """The lock was just taken: what others hold stays as it is from now on."""
        self._others = None
        if self._beyond is not None:
            reserved = self.reserved() if self.torch.cuda.is_initialized() else 0
            self._others = self.machine.used_bytes(self.device) - self._beyond - reserved

    def released(self) -> None:
        """The lock is about to be given back."""
        if self.torch.cuda.is_initialized():
            own = self.own_bytes()
            self._beyond = None if own is None else max(0, own - self.reserved())

    def own_bytes(self) -> int | None:
        """As the driver tells of this process, or what is used beyond what others held before."""
        _, told = self.machine.processes(self.device).get(os.getpid(), ("", None))
        if told is not None:
            return told
        if self._others is None:
            return None
        free, total = self.torch.cuda.mem_get_info()
        return int(total) - int(free) - self._others

    # -- the allocator ---------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Allocations and releases since the process began."""
        # read at every module: torch.cuda.memory_stats would sort all figures into a new dict
        stats = self.torch._C._cuda_memoryStats(self.torch.cuda.current_device())
        found = stats["allocation"]["all"]
        return Counts(found["allocated"], found["freed"])

    def allocated(self) -> int:
        """Bytes allocated now."""
        return int(self.torch.cuda.memory_allocated())

    def reserved(self) -> int:
        """Bytes the allocator holds now."""
        return int(self.torch.cuda.memory_reserved())

    def peaks(self) -> tuple[int, int]:
        """Most bytes allocated and reserved since ``restart``."""
        return (
            int(self.torch.cuda.max_memory_allocated()),
            int(self.torch.cuda.max_memory_reserved()),
        )

    def restart(self) -> None:
        """Begin new peaks."""
        self.torch.cuda.reset_peak_memory_stats()

    def clear_cache(self) -> None:
        """Give back to the driver what the allocator caches, unless a graph is being captured."""
        self.torch.cuda.init()
        if not self.torch.cuda.is_current_stream_capturing():
            self.torch.cuda.empty_cache()

    def clear_workspaces(self) -> None:
        """Let go of cuBLAS' workspaces, unless a CUDA graph is being captured."""
        if not self.torch.cuda.is_current_stream_capturing():
            self.torch._C._cuda_clearCublasWorkspaces()

    # -- its trace -------------------------------------------------------------------------------

    def recording(self) -> bool:
        """Whether somebody records the allocator's trace."""
        self.torch.cuda.init()
        return bool(self.torch._C._cuda_isHistoryEnabled())

    def start_recording(self) -> None:
        """Record it from now on, without stacks."""
        self.torch.cuda.memory._record_memory_history(
            enabled="all", context=None, stacks="python", max_entries=MAX_ENTRIES
        )

    def stop_recording(self) -> None:
        """Stop, and forget it."""
        self.torch.cuda.memory._record_memory_history(enabled=None)

    def trace(self) -> list[Mapping[str, Any]]:
        """What was recorded."""
        traces = self.torch.cuda.memory._snapshot()["device_traces"]
        return list(traces[self.torch.cuda.current_device()])

    def blocks(self) -> list[tuple[int, int]]:
        """Address and bytes of every block in use."""
        here = self.torch.cuda.current_device()
        return [
            (block["address"], block["size"])
            for segment in self.torch.cuda.memory_snapshot()
            if segment["device"] == here
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        ]

    def follow(self, notes: Notes) -> Follow:
        """Note where the program is from now on."""
        from vramplan.measure.follow import Follower  # noqa: PLC0415 - needs torch

        return Follower(notes, lambda: self.counts().made, self.allocated, "cuda")
