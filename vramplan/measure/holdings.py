"""Who held the memory of a region: its part of an allocator's trace, read. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vramplan.measure.blocks import Blocks, Label, Mark, Meaning
from vramplan.names import HEADS, OUTSIDE
from vramplan.timeline import Kind

HELD = "held before"  # the kind of what was there already and is no known parameter or state
SEGMENTS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}

Holdings = dict[tuple[str, str], int]  # (kind, module) -> bytes


class Counts(NamedTuple):
    """What the allocator has done since the process began.

    Attributes:
        made: Allocations.
        released: Of them released.
    """

    made: int
    released: int


@dataclass(slots=True)
class Notes:
    """What is written down beside the trace.

    Attributes:
        base: Counts when the trace began.
        marks: Where the program was.
        labels: Tensors known by name.
        cleared: Counts before and after each clearing of cuBLAS' workspaces.
        steps: Allocations made, and allocated bytes, at the end of each optimizer step.
        paged: Optimizer state in managed memory: address -> bytes.
    """

    base: Counts
    marks: list[Mark] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    cleared: list[tuple[Counts, Counts]] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    paged: dict[int, int] = field(default_factory=dict)


class Failure(NamedTuple):
    """An allocation that failed.

    Attributes:
        requested_bytes: What was asked for.
        phase: Where.
        owner: Module at work, empty for none.
    """

    requested_bytes: int
    phase: str
    owner: str


class Reading(NamedTuple):
    """One region's memory, by owner.

    Attributes:
        peak_bytes: At its fullest moment, all blocks rounded as the allocator rounds.
        phase: In which that was.
        peak: Who held it then; sums to ``peak_bytes``.
        phases: Phase -> peak, for phases in which something was allocated.
        moments: Phase -> who held what at its fullest moment.
        left: What is there after the region, less what was there before it.
        failure: The last allocation that failed in it.
        reserved_growth_bytes: Most that it took from the driver beyond what it began with.
    """

    peak_bytes: int
    phase: str
    peak: Holdings
    phases: dict[str, int]
    moments: dict[str, Holdings]
    left: Holdings
    failure: Failure | None
    reserved_growth_bytes: int


def read_region(
    trace: Iterable[Mapping[str, Any]],
    notes: Notes,
    start: Counts,
    stop: Counts,
    held: Sequence[tuple[int, int]],
    round_size: Callable[[int], int],
) -> Reading | None:
    """Read a region.

    Args:
        trace: The allocator's, from ``notes.base`` on, what was cleared after the region included.
        notes: Beside it.
        start: Counts at its start.
        stop: Counts at its end.
        held: Address and bytes of each block that was there at its start.
        round_size: What the allocator makes of a request.

    Returns:
        The reading; None if entries are missing: they were more than the allocator keeps, or the
        program switched the recording off or its counts back.

    Known limitations:
        A block is booked to the module at work when it was made. Backward's blocks go to the module
        whose output's gradient was computed last; what autograd does between two modules may be
        booked to the earlier one.
    """
    blocks = _RegionBlocks(notes, start, round_size)
    for number, (address, nbytes) in enumerate(held, 1):
        blocks.hold(-number, address, nbytes)
    for entry in trace:
        blocks.see(entry)
    blocks.settle()
    return blocks.reading() if blocks.count == stop.made else None


class _RegionBlocks(Blocks):
    """Passes over what came before the region and keeps what happens in it."""

    def __init__(self, notes: Notes, start: Counts, round_size: Callable[[int], int]) -> None:
        later = [label for label in notes.labels if label[0] >= start.made]
        super().__init__(notes.base.made, notes.marks, later, round_size, "free_requested")
        self.start = start
        self.num_released = notes.base.released
        self.cleared = [range(was.released, now.released) for was, now in notes.cleared]
        self.failure: Failure | None = None
        self.reserved = self.most_reserved = 0

    def see(self, entry: Mapping[str, Any]) -> int:
        action = entry["action"]
        if self.count < self.start.made:
            self.count += action == "alloc"
            self.num_released += action == self.released
            return 0
        if action == "oom":
            mark = self._mark(self.count + 1)
            self.failure = Failure(entry["size"], mark.phase, mark.owner)
        if action in SEGMENTS:
            self.reserved += SEGMENTS[action] * entry["size"]
            self.most_reserved = max(self.most_reserved, self.reserved)
        block = super().see(entry)
        if action == self.released:
            if block and any(self.num_released in found for found in self.cleared):
                self.known[block] = (Kind.WORKSPACE, "cublas")
            self.num_released += 1
        return block

    def _mark(self, number: int) -> Mark:
        return self.mark(number) or Mark(0, OUTSIDE, "", inside=False)

    def _meaning(self, block: int) -> tuple[str, str]:
        found = self.known.get(block)
        if found is None and block < 0:
            return HELD, ""
        kind, owner = found or _meaning(self._mark(block))
        return str(kind), owner

    def reading(self) -> Reading:
        meanings = {block: self._meaning(block) for block in self.made}
        first = sum(block < 0 for block in self.made)  # what was held comes first
        total = 0
        best: dict[str, tuple[int, int]] = {}  # phase -> its peak, and the event that made it
        for index, (block, nbytes) in enumerate(self.order):
            total += nbytes
            if index < first or nbytes < 0:
                continue
            phase = self._mark(block).phase
            if total > best.get(phase, (-1, 0))[0]:
                best[phase] = (total, index)
        begin = (sum(nbytes for _, nbytes in self.order[:first]), first - 1)
        fullest = max(best, key=lambda name: best[name][0], default="")
        top = max(best.get(fullest, begin), begin)
        moments = self._moments(meanings, {top[1], *(index for _, index in best.values())}, first)
        left = {
            key: nbytes - moments["before"].get(key, 0) for key, nbytes in moments["after"].items()
        }
        return Reading(
            peak_bytes=top[0],
            phase=fullest if top != begin else OUTSIDE,
            peak=moments[top[1]],
            phases={name: nbytes for name, (nbytes, _) in best.items()},
            moments={name: moments[index] for name, (_, index) in best.items()},
            left={key: nbytes for key, nbytes in left.items() if nbytes},
            failure=self.failure,
            reserved_growth_bytes=self.most_reserved,
        )

    def _moments(
        self, meanings: Mapping[int, tuple[str, str]], wanted: set[int], first: int
    ) -> dict[int | str, Holdings]:
        """Who held what before, after, and right after each of some events."""
        now: Holdings = {}
        found: dict[int | str, Holdings] = {-1: {}}
        for index, (block, nbytes) in enumerate(self.order):
            if index == first:
                found["before"] = dict(now)
            key = meanings[block]
            now[key] = now.get(key, 0) + nbytes
            if index in wanted:
                found[index] = {key: size for key, size in now.items() if size}
        found.setdefault("before", dict(now))
        found["after"] = now
        return found


def _meaning(mark: Mark) -> Meaning | tuple[str, str]:
    """What a block is for that has no name, from where it was made."""
    _, phase, owner, inside = mark
    if phase == "step":
        return Kind.WORKSPACE, "optimizer"
    if phase == "loss" or (phase == "backward" and not owner):
        return Kind.LOGITS, "loss"
    if not owner:
        return OUTSIDE, ""
    if owner.endswith(HEADS):
        return Kind.LOGITS, owner
    return Kind.ACTIVATIONS if inside or phase != "backward" else Kind.ACTIVATION_GRADIENTS, owner
