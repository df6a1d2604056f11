"""Measuring the memory of any piece of a program, in its own process. Needs no torch itself.

A Meter measures regions on one card, one after another or one inside another. While any is open the
allocator's trace is recorded, without stacks, and the program is followed through its modules
(``follow``); both end with the outermost region, whatever way it ends.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from vramplan.measure.holdings import Counts, Failure, Holdings, Notes, Reading, read_region

MIN_STEPS = 3  # the first makes optimizer state; two more show what each of them adds


class Follow(Protocol):
    """What notes where the program is."""

    def relabel(self, *, discover: bool = False) -> None:
        """Name everything that is known, where it is now; also modules that never ran."""

    def close(self) -> None:
        """Stop."""


class Card(Protocol):
    """The card as the meter reads it: torch's allocator, or a stand-in for tests."""

    def counts(self) -> Counts:
        """Allocations and releases since the process began."""

    def allocated(self) -> int:
        """Bytes allocated now."""

    def reserved(self) -> int:
        """Bytes the allocator holds now."""

    def own_bytes(self) -> int | None:
        """What this process holds on the card as the driver sees it; None if it cannot be told."""

    def peaks(self) -> tuple[int, int]:
        """Most bytes allocated and reserved since ``restart``."""

    def restart(self) -> None:
        """Begin new peaks."""

    def clear_cache(self) -> None:
        """Give back to the driver what the allocator caches: tests before have left it there."""

    def clear_workspaces(self) -> None:
        """Let go of cuBLAS' workspaces, which would be there or not by what ran before."""

    def recording(self) -> bool:
        """Whether somebody records the allocator's trace."""

    def start_recording(self) -> None:
        """Record it from now on."""

    def stop_recording(self) -> None:
        """Stop, and forget it."""

    def trace(self) -> list[Mapping[str, Any]]:
        """What was recorded."""

    def blocks(self) -> list[tuple[int, int]]:
        """Address and bytes of every block in use."""

    def round_size(self, nbytes: int) -> int:
        """What the allocator makes of a request."""

    def follow(self, notes: Notes) -> Follow:
        """Note where the program is from now on."""


class Region:
    """What one region took. Figures are None while it is open, and where they are not known.

    Attributes:
        name: Its name; regions of one name are repeats of one thing.
        peak_allocated_bytes: Torch's max_memory_allocated over the region.
        peak_reserved_bytes: Torch's max_memory_reserved.
        device_peak_bytes: Most that the process held on the card: the reserved peak, and what it
            held beyond the allocator at the region's end.
        leaked_bytes: Allocated after the region less before it, garbage collected both times and
            cuBLAS' workspaces left out; negative if it released more than it made.
        per_step_bytes: What each optimizer step after the first left behind, at least; None with
            fewer than three.
        paged_bytes: Optimizer state in managed memory that its optimizers had.
        phase: The phase of the peak: forward, loss, backward, step, evaluate, or outside modules.
        phases: Phase -> peak allocated bytes.
        owners: (kind, module) -> bytes at the peak; sums to ``peak_allocated_bytes``. Empty where
            modules were not recorded.
        moments: Phase -> the same at the fullest moment of that phase.
        left: (kind, module) -> what the region left there, positive bytes only.
        failure: The allocation that failed, if the region ran out of memory.
        failed: The exception it ended with, if it did.
        oom: Whether that meant that memory did not suffice.
        why_unknown: Why modules were not recorded; empty if they were.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.peak_allocated_bytes: int | None = None
        self.peak_reserved_bytes: int | None = None
        self.device_peak_bytes: int | None = None
        self.leaked_bytes: int | None = None
        self.per_step_bytes: int | None = None
        self.paged_bytes: int | None = None
        self.phase = ""
        self.phases: dict[str, int] = {}
        self.owners: Holdings = {}
        self.moments: dict[str, Holdings] = {}
        self.left: Holdings = {}
        self.failure: Failure | None = None
        self.failed = ""
        self.oom = False
        self.why_unknown = ""
        self._allocated = self._reserved = 0  # peaks so far

    def by_module(self) -> dict[str, int]:
        """Module -> bytes at the peak, the largest first."""
        found: dict[str, int] = {}
        for (kind, owner), nbytes in self.owners.items():
            found[owner or kind] = found.get(owner or kind, 0) + nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def raise_to(self, peaks: tuple[int, int]) -> None:
        """Book peaks that were seen while it was open."""
        self._allocated = max(self._allocated, peaks[0])
        self._reserved = max(self._reserved, peaks[1])
        self.peak_allocated_bytes, self.peak_reserved_bytes = self._allocated, self._reserved

    def read(self, reading: Reading, reserved_before: int) -> None:
        """Take over who held the memory.

        The trace also knows peaks that the program's own ``reset_peak_memory_stats`` hid; the
        allocator's counters know what a block holds beyond its request.
        """
        self.raise_to((reading.peak_bytes, reserved_before + reading.reserved_growth_bytes))
        self.phase, self.phases = reading.phase, reading.phases
        self.owners, self.moments = dict(reading.peak), reading.moments
        unsplit = self._allocated - reading.peak_bytes
        if unsplit:
            self.owners["rounding", ""] = unsplit
        self.left = {key: nbytes for key, nbytes in reading.left.items() if nbytes > 0}
        self.failure = reading.failure if self.oom else None


class _Opening:
    """How things stood when a region began."""

    def __init__(self, card: Card, *, recorded: bool) -> None:
        self.counts = card.counts()
        self.allocated, self.reserved = card.allocated(), card.reserved()
        self.held = card.blocks() if recorded else []


class Meter:
    """Measures regions on one card.

    Known limitations:
        The outermost region begins by emptying the allocator's cache, so that reserved memory is
        the same whatever ran before. Torch cannot set its peak counters: after a region
        ``torch.cuda.max_memory_allocated()`` counts from the region's end. Blocks of other cards
        than the current one are not seen.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self.notes = Notes(Counts(0, 0))
        self._open: list[tuple[Region, _Opening]] = []
        self._follow: Follow | None = None
        self._undo = contextlib.ExitStack()
        self._why_unknown = ""

    @contextmanager
    def measure(self, name: str) -> Iterator[Region]:
        """Measure what the ``with`` block does.

        Args:
            name: What to call it.
        """
        region = Region(name)
        try:
            self._begin(region)
            yield region
        except BaseException as error:
            region.failed, region.oom = type(error).__name__, is_out_of_memory(error)
            with contextlib.suppress(Exception):  # a card that failed may not answer
                self._read(region)
            raise
        else:
            gc.collect()
            self._read(region)
        finally:
            self._end(region)

    def _begin(self, region: Region) -> None:
        gc.collect()
        if not self._open:
            self._start()
        self._clear_workspaces()
        if self._follow is not None:
            self._follow.relabel()
        self._fold()
        opening = _Opening(self.card, recorded=self._follow is not None)
        self._open.append((region, opening))

    def _start(self) -> None:
        self.card.clear_cache()
        self.notes = Notes(self.card.counts())
        if self.card.recording():
            self._why_unknown = "the program records the allocator's history itself"
            return
        self._why_unknown = ""
        self._undo.callback(self.card.stop_recording)
        self.card.start_recording()
        self._follow = self.card.follow(self.notes)
        self._undo.callback(self._follow.close)

    def _fold(self) -> None:
        """Book the peaks since the last boundary to all open regions, and begin new ones."""
        peaks = self.card.peaks()
        for region, _ in self._open:
            region.raise_to(peaks)
        self.card.restart()

    def _clear_workspaces(self) -> None:
        before = self.card.counts()
        self.card.clear_workspaces()
        self.notes.cleared.append((before, self.card.counts()))

    def _read(self, region: Region) -> None:
        """Everything that there is to know of the innermost region, as it ends."""
        card, opening = self.card, self._open[-1][1]
        self._fold()
        reserved, own = card.reserved(), card.own_bytes()
        if self._follow is not None:
            self._follow.relabel(discover=True)
        stop = card.counts()
        self._clear_workspaces()
        region.why_unknown = self._why_unknown
        if not region.failed:  # the traceback still holds what the program held
            region.leaked_bytes = card.allocated() - opening.allocated
        if self._follow is not None:
            self._read_trace(region, opening, stop)
        if own is not None and region.peak_reserved_bytes is not None:
            region.device_peak_bytes = region.peak_reserved_bytes + max(0, own - reserved)

    def _read_trace(self, region: Region, opening: _Opening, stop: Counts) -> None:
        notes = self.notes
        reading = read_region(
            self.card.trace(), notes, opening.counts, stop, opening.held, self.card.round_size
        )
        if reading is None:
            region.why_unknown = "the program changed the recording of the allocator's history"
            return
        region.read(reading, opening.reserved)
        region.paged_bytes = sum(notes.paged.values()) or None
        steps = [nbytes for at, nbytes in notes.steps if opening.counts.made <= at <= stop.made]
        if len(steps) >= MIN_STEPS:
            grown = (after - before for before, after in itertools.pairwise(steps[1:]))
            region.per_step_bytes = statistics.median_low(grown)

    def _end(self, region: Region) -> None:
        self._open = [(other, opening) for other, opening in self._open if other is not region]
        if not self._open:
            self._follow = None
            self._undo.close()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Torch's exception, by name: this module does without torch."""
    return type(error).__name__ == "OutOfMemoryError"
