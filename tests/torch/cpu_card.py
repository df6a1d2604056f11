"""A card whose memory is that of CPU tensors: real modules, hooks and backward without a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vramplan.measure.follow import Follower
from vramplan.measure.holdings import Counts, Notes
from vramplan.units import round_block


class CpuCard(TorchDispatchMode):
    """Books every storage that an operation makes, while it is entered (see ``region.Card``)."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.made = self.num_released = self.peak = 0
        self.log: list[dict[str, Any]] | None = None
        self.of_user = False
        self.capacity = 1 << 40
        self.starts = self.stops = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.book(tensor)
        return result

    def book(self, tensor: torch.Tensor) -> None:
        """A tensor's storage is on the card, if it was not."""
        storage = tensor.untyped_storage()
        place, nbytes = storage.data_ptr(), storage.nbytes()
        if not nbytes or place in self.live:
            return
        if self.allocated() + nbytes > self.capacity:
            self._note(action="oom", size=nbytes)
            raise torch.OutOfMemoryError("no more")
        self.made += 1
        self.live[place] = round_block(nbytes)
        self.peak = max(self.peak, self.allocated())
        self._note(action="alloc", addr=place, size=nbytes)
        weakref.finalize(storage, self._free, place)

    def book_module(self, module: torch.nn.Module) -> None:
        """What was made before the card was entered."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.book(tensor)

    def _free(self, place: int) -> None:
        self.num_released += 1
        self._note(action="free_requested", addr=place)
        del self.live[place]

    def _note(self, **entry: Any) -> None:
        if self.log is not None:
            self.log.append(entry)

    def counts(self) -> Counts:
        return Counts(self.made, self.num_released)

    def allocated(self) -> int:
        return sum(self.live.values())

    def reserved(self) -> int:
        return self.allocated()

    def own_bytes(self) -> int | None:
        return None

    def peaks(self) -> tuple[int, int]:
        return self.peak, self.peak

    def restart(self) -> None:
        self.peak = self.allocated()

    def clear_cache(self) -> None: ...

    def clear_workspaces(self) -> None: ...

    def recording(self) -> bool:
        return self.of_user

    def start_recording(self) -> None:
        self.log, self.starts = [], self.starts + 1

    def stop_recording(self) -> None:
        self.log, self.stops = None, self.stops + 1

    def trace(self) -> list[Mapping[str, Any]]:
        return list(self.log or [])

    def blocks(self) -> list[tuple[int, int]]:
        return list(self.live.items())

    def round_size(self, nbytes: int) -> int:
        return round_block(nbytes)

    def follow(self, notes: Notes) -> Follower:
        return Follower(notes, lambda: self.made, self.allocated, "cpu")
