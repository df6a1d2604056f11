"""A card without a GPU: the tests of the pytest plugin say what is allocated on it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fakes import FakeHarness

from vramplan.measure.blocks import Mark
from vramplan.measure.holdings import Counts, Notes
from vramplan.timeline import Kind
from vramplan.units import MIB, round_block

SEGMENT = 2 * MIB
CONTEXT = 500 * MIB


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


class FakeCard:
    """An allocator that never splits or reuses; ``FAKE_CARD`` in the environment changes it."""

    def __init__(self) -> None:
        told = json.loads(os.environ.get("FAKE_CARD", "{}"))
        self.where = {
            "GPU": told.get("gpu", "h100-sxm-80gb"),
            "allocator": told.get("conf", "default"),
        }
        self.versions = {"torch": told.get("torch", "2.11.0"), "transformers": "5.17.0"}
        self.lock_name = told.get("lock", f"fake-{os.getpid()}")
        self.capacity = told.get("capacity", 1 << 40)
        self.extra = told.get("extra", 0)  # what tests allocate more than they did
        self.log = Path(told["log"]) if "log" in told else None
        self.fraction = ""
        self.runner = FakeHarness()
        self.live: dict[int, int] = {}
        self.made = self.released_ = 0
        self._reserved = 0
        self._peaks = (0, 0)
        self._trace: list[dict[str, Any]] | None = None
        self.notes: Notes | None = None
        self.workspace = 0
        self.own_known = True
        self.history_of_user = False
        self.closed = 0

    # -- what tests do to it ---------------------------------------------------------------------

    def alloc(self, nbytes: int, kind: Kind | None = None, owner: str = "") -> int:
        """Allocate; a kind labels it."""
        size = round_block(nbytes)
        if self.allocated() + size > self.capacity:
            self._note({"action": "oom", "size": nbytes})
            raise OutOfMemoryError(f"out of memory, {nbytes} asked for")
        self.made += 1
        address = 4096 * self.made
        self.live[address] = size
        if self.allocated() > self._reserved:
            grown = -(-(self.allocated() - self._reserved) // SEGMENT) * SEGMENT
            self._reserved += grown
            self._note({"action": "segment_alloc", "addr": address, "size": grown})
        self._peaks = (max(self._peaks[0], self.allocated()), max(self._peaks[1], self._reserved))
        self._note({"action": "alloc", "addr": address, "size": nbytes})
        if kind is not None and self.notes is not None:
            self.notes.labels.append((self.made, {address: (kind, owner)}))
        return address

    def free(self, address: int) -> None:
        """Release what ``alloc`` gave."""
        del self.live[address]
        self.released_ += 1
        self._note({"action": "free_requested", "addr": address, "size": 0})
        self._note({"action": "free_completed", "addr": address, "size": 0})

    def at(self, phase: str, owner: str = "", *, inside: bool = True) -> None:
        """The program comes to a phase and a module."""
        if self.notes is not None:
            self.notes.marks.append(Mark(self.made, phase, owner, inside and bool(owner)))

    def step(self) -> None:
        """An optimizer step ends."""
        if self.notes is not None:
            self.notes.steps.append((self.made, self.allocated()))

    def _note(self, entry: dict[str, Any]) -> None:
        if self._trace is not None:
            self._trace.append(entry)

    def tell(self, text: str) -> None:
        """Write a line to the log, for tests of several processes."""
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(text + "\n")

    # -- region.Card -----------------------------------------------------------------------------

    def counts(self) -> Counts:
        return Counts(self.made, self.released_)

    def allocated(self) -> int:
        return sum(self.live.values())

    def reserved(self) -> int:
        return self._reserved

    def own_bytes(self) -> int | None:
        return self._reserved + CONTEXT if self.own_known else None

    def peaks(self) -> tuple[int, int]:
        return self._peaks

    def restart(self) -> None:
        self._peaks = (self.allocated(), self._reserved)

    def clear_cache(self) -> None: ...

    def clear_workspaces(self) -> None:
        if self.workspace in self.live:
            self.free(self.workspace)

    def recording(self) -> bool:
        return self.history_of_user

    def start_recording(self) -> None:
        self._trace = []

    def stop_recording(self) -> None:
        self._trace = None

    def trace(self) -> list[Mapping[str, Any]]:
        return list(self._trace or [])

    def blocks(self) -> list[tuple[int, int]]:
        return list(self.live.items())

    def round_size(self, nbytes: int) -> int:
        return round_block(nbytes)

    def follow(self, notes: Notes) -> FakeCard:
        self.notes = notes
        return self

    def relabel(self, *, discover: bool = False) -> None: ...

    def close(self) -> None:
        self.closed += 1
        self.notes = None

    # -- session.GpuCard -------------------------------------------------------------------------

    def acquired(self) -> None:
        self.tell(f"acquired {os.getpid()}")

    def released(self) -> None:
        self.tell(f"released {os.getpid()}")

    def limit(self) -> str:
        return self.fraction

    def harness(self) -> FakeHarness:
        return self.runner
