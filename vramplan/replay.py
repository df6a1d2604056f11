"""A run's requests in order, served by the allocator with and without a limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from copy import copy
from itertools import takewhile

from vramplan.alloc_conf import DEFAULT_SETTINGS, AllocatorSettings
from vramplan.allocator import Block, CachingAllocator, OutOfMemory
from vramplan.expandable import allocator_for
from vramplan.timeline import (
    BEFORE_TRAINING,
    CLIP,
    Event,
    Kind,
    Phase,
    Section,
    Timeline,
    handed_on,
)

Request = tuple[int, int]  # (block identity, bytes); negative bytes release it
EMPTY_CACHE = 0  # marks: blocks of no bytes
TRAINING_BEGINS = -1
STEP_ENDS = -2
_SPLIT = -3
LIMIT_RESOLUTION = 32 * 1024**2


class Replay:
    """A run's requests, ready to be served with and without a limit.

    Args:
        timeline: The run.
        settings: The allocator's settings; the timeline's sizes are already rounded under them.
        in_order: Whether it is written as it went, both steps of it (a trace), and not as one
            steady step whose optimizer state comes first (an estimate).

    Three steps are replayed: workspaces and optimizer state, allocated during the first, shape what
    the second one finds, and what that had to give back, or left in pieces, shapes the third. Some
    recorded runs under a limit end there. Of a trace it is the two that it has.
    """

    def __init__(
        self,
        timeline: Timeline,
        settings: AllocatorSettings = DEFAULT_SETTINGS,
        *,
        in_order: bool = False,
    ) -> None:
        self.settings = settings
        settled = _settled(timeline)
        self.live_bytes = _peak(settled)
        self.requests = unroll(settled) if in_order else _in_order(settled)
        self._roomy: CachingAllocator | None = None

    def under(self, settings: AllocatorSettings) -> Replay:
        """The same requests under other settings, which must round them alike."""
        assert settings.roundup_power2_divisions == self.settings.roundup_power2_divisions
        other = copy(self)
        other.settings, other._roomy = settings, None
        return other

    def roomy(self) -> CachingAllocator:
        """The allocator after the run on a card with room."""
        if self._roomy is None:
            self._roomy = replay(self.requests, settings=self.settings)
        return self._roomy

    def reserved_bytes(self) -> int:
        """Most it reserves, unhurried."""
        return self.roomy().peak_reserved

    def ready_slack_bytes(self) -> int:
        """What unsplit blocks add to the allocated bytes when training is about to start."""
        ready = takewhile(lambda request: request[0] != TRAINING_BEGINS, self.requests)
        return self.roomy().ready_allocated - sum(nbytes for _, nbytes in ready)

    def slack_bytes(self) -> int:
        """What unsplit blocks add to the allocated bytes at the peak."""
        return max(0, self.roomy().peak_allocated - self.live_bytes)

    def runs_within(self, limit: int) -> bool:
        """Whether the run succeeds when the allocator may reserve ``limit`` bytes."""
        try:
            replay(self.requests, limit, self.settings)
        except OutOfMemory:
            return False
        return True

    def min_limit_bytes(self) -> int:
        """Smallest limit at which the run succeeds, to within 32 MiB or half a percent."""
        resolution = max(LIMIT_RESOLUTION, self.live_bytes // 200)
        low = self.live_bytes - resolution
        high = self.reserved_bytes()
        while high - low > resolution:
            middle = (low + high) // 2
            if self.runs_within(middle):
                high = middle
            else:
                low = middle
        return high


def _settled(timeline: Timeline) -> Timeline:
    """The timeline without what only gives a block another purpose: it does not move."""
    sections = []
    for section in timeline.sections:
        kept: list[Event] = []
        for event in section.events:
            if kept and event.nbytes > 0 and kept[-1][:2] == (event.block, -event.nbytes):
                kept.pop()
            else:
                kept.append(event)
        sections.append(Section(tuple(kept), section.repeats))
    return Timeline(tuple(sections))


def _peak(timeline: Timeline) -> int:
    """Most bytes live at once while training, repeated sections folded."""
    live = best = 0
    for section in timeline.sections:
        start, top = live, live
        for event in section.events:
            live += event.nbytes * event.copies
            if event.phase not in BEFORE_TRAINING:
                top = max(top, live)
        more = section.repeats - 1
        best = max(best, top + max(0, live - start) * more)
        live += (live - start) * more
    return best


def _in_order(timeline: Timeline) -> list[Request]:
    """The requests as a run makes them: load, a first step and optimizer state; two more steps.

    A run that evaluates does so behind the second step, and trains on in what that leaves. A step's
    requests can be asked for again: what it makes and does not release is never released.
    """
    marked = {e.block for e in timeline.events() if e.nbytes == 0 and e.block > 0}
    sizes = {e.block: e.nbytes for e in timeline.events() if e.nbytes > 0 and e.block in marked}
    load: list[Section] = []
    state: list[Section] = []
    steps: list[Section] = []
    for section in timeline.sections:
        kept: tuple[list[Event], list[Event], list[Event]] = ([], [], [])
        for event in section.events:
            if event.phase not in BEFORE_TRAINING:
                kept[2].append(event)
            elif event.block not in marked:
                kept[event.kind is Kind.OPTIMIZER].append(event)
        for sections, events in zip((load, state, steps), kept, strict=True):
            sections.append(Section(tuple(events), section.repeats))
    evaluation = _where(steps, lambda e: e.phase is Phase.EVALUATE)
    walk = _where(steps, lambda e: e.phase not in (Phase.STEP, Phase.EVALUATE) or e.owner == CLIP)
    update = _where(steps, lambda e: e.phase is Phase.STEP and e.owner != CLIP)
    split = _mark(_SPLIT)
    whole = (*load, _mark(TRAINING_BEGINS), split, *walk, split, *state, split, *update)
    before, first_walk, made, last = _parts(unroll(Timeline(whole)))
    step = [request for request in first_walk if request[1] or request[0] <= 0] + last
    top = len(before) + len(first_walk) + len(made) + len(last)
    first = list(before)
    used: set[int] = set()
    for block, nbytes in first_walk:
        if nbytes or block <= 0:
            first.append((block, nbytes))
        elif block not in used:  # a workspace, at its first use
            used.add(block)
            first.append((top + block, sizes[block]))
    first += made + last
    if any(section.events for section in evaluation):
        top += max(sizes, default=0)
        return [*first, *step, *unroll(_without(marked, evaluation), top), *step, *step]
    end = [(STEP_ENDS, 0)]
    return [*first, *end, *step, *end, *step]


def _mark(block: int) -> Section:
    return Section((Event(block, 0, Kind.BATCH, "", Phase.PREPARE),))


def _parts(requests: list[Request]) -> list[list[Request]]:
    """The requests between the marks that split them."""
    ends = [n for n, request in enumerate(requests) if request[0] == _SPLIT] + [len(requests)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [requests[start:end] for start, end in zip(starts, ends, strict=True)]


def _where(sections: Iterable[Section], wanted: Callable[[Event], bool]) -> list[Section]:
    return [Section(tuple(filter(wanted, s.events)), s.repeats) for s in sections]


def _without(marked: Collection[int], sections: Iterable[Section]) -> Timeline:
    """Sections without the marks of blocks that are there already."""
    return Timeline(
        tuple(
            Section(tuple(e for e in s.events if e.nbytes or e.block not in marked), s.repeats)
            for s in sections
        )
    )


def unroll(timeline: Timeline, fresh: int = 0) -> list[Request]:
    """Every request of a run in order, repeated sections and copies written out.

    Blocks that a repeated section leaves behind for a later one are released latest first: backward
    meets the layers in reverse. Blocks that one layer hands to the next (hidden states, their
    gradients) are matched by ``handed_on``.

    Args:
        timeline: The run.
        fresh: A number below all identities.
    """
    born: defaultdict[int, list[int]] = defaultdict(list)  # block -> live identities, oldest first
    twins = handed_on(timeline)
    requests: list[Request] = []
    append = requests.append
    for index, section in enumerate(timeline.sections):
        last = section.repeats - 1
        events = [
            (e.block, e.nbytes, e.copies, twins.get((index, e.block)) if last else None)
            for e in section.events
        ]
        for repetition in range(section.repeats):
            for block, nbytes, copies, handed in events:
                if nbytes > 0:
                    live = born[block]
                    for _ in range(copies):
                        fresh += 1
                        live.append(fresh)
                        append((fresh, nbytes))
                elif nbytes == 0:  # a mark, or a workspace's first use
                    append((block, 0))
                elif handed is None:
                    live = born[block]
                    for _ in range(min(copies, len(live))):
                        append((live.pop(), nbytes))
                else:
                    twin, oldest = handed
                    own = repetition == (0 if oldest else last)
                    live = born[block if own else twin]
                    for _ in range(min(copies, len(live))):
                        append((live.pop(0 if oldest and not own else -1), nbytes))
    return requests


def replay(
    requests: Iterable[Request],
    limit: int | None = None,
    settings: AllocatorSettings = DEFAULT_SETTINGS,
) -> CachingAllocator:
    """Run requests through a fresh allocator.

    Raises:
        OutOfMemory: If ``limit`` does not hold them.
    """
    allocator = allocator_for(settings, limit)
    live: dict[int, Block] = {}
    malloc, free, release = allocator.malloc, allocator.free, live.pop
    taken = 0
    for identity, nbytes in requests:
        if nbytes > 0:
            live[identity] = malloc(nbytes)
        elif nbytes:
            free(release(identity))
        elif identity == EMPTY_CACHE:
            allocator.empty_cache()
        elif identity == TRAINING_BEGINS:
            allocator.ready_allocated = allocator.peak_allocated = allocator.allocated
        else:
            before, taken = taken, allocator.num_large_segments
            if taken == before:
                break  # a step that found room for all it asked for leaves that to the next
    return allocator
