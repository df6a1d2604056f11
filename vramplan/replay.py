"""A run's requests in order, served by the allocator with and without a limit."""

from __future__ import annotations

from collections.abc import Iterable

from vramplan.allocator import SMALL_BUFFER, SMALL_SIZE, Block, CachingAllocator, OutOfMemory
from vramplan.timeline import BEFORE_TRAINING, Event, Kind, Phase, Section, Timeline, handed_on

Request = tuple[int, int]  # (block identity, bytes); negative bytes release it
EMPTY_CACHE = 0  # marks: blocks of no bytes
TRAINING_BEGINS = -1
LIMIT_RESOLUTION = 32 * 1024**2


class Replay:
    """A run's requests, ready to be served with and without a limit.

    The large pool is replayed block by block. The small pool (requests up to 1 MiB) holds adapters,
    statistics and other long-lived things in 2 MiB segments and is taken as full ones. Two steps
    are replayed: workspaces and optimizer state, allocated during the first, shape what the second
    one finds.

    Args:
        timeline: The run.
        in_order: Whether it is written as it went, both steps of it (a trace), and not as one
            steady step whose optimizer state comes first (an estimate).
    """

    def __init__(self, timeline: Timeline, *, in_order: bool = False) -> None:
        large, small = _split_pools(timeline)
        self.small_bytes = -(-_peak(small) // SMALL_BUFFER) * SMALL_BUFFER
        self.live_bytes = _peak(large)
        self.requests = unroll(large) if in_order else _in_order(large)
        self._roomy: CachingAllocator | None = None

    def roomy(self) -> CachingAllocator:
        """The allocator after the run on a card with room."""
        if self._roomy is None:
            self._roomy = replay(self.requests)
        return self._roomy

    def reserved_bytes(self) -> int:
        """Most it reserves, unhurried."""
        return self.roomy().peak_reserved + self.small_bytes

    def ready_slack_bytes(self) -> int:
        """What unsplit blocks add to the allocated bytes when training is about to start."""
        return self.roomy().ready_slack

    def slack_bytes(self) -> int:
        """What unsplit blocks add to the allocated bytes at the peak."""
        return max(0, self.roomy().peak_allocated - self.live_bytes)

    def runs_within(self, limit: int) -> bool:
        """Whether the run succeeds when the allocator may reserve ``limit`` bytes."""
        try:
            replay(self.requests, limit - self.small_bytes)
        except OutOfMemory:
            return False
        return True

    def min_limit_bytes(self) -> int:
        """Smallest limit at which the run succeeds, to within 32 MiB or half a percent."""
        resolution = max(LIMIT_RESOLUTION, self.live_bytes // 200)
        low = self.live_bytes + self.small_bytes - resolution
        high = self.reserved_bytes()
        while high - low > resolution:
            middle = (low + high) // 2
            if self.runs_within(middle):
                high = middle
            else:
                low = middle
        return high


def _split_pools(timeline: Timeline) -> tuple[Timeline, Timeline]:
    """The events of the large and of the small pool; marks go where their block is."""
    small_blocks = {e.block for e in timeline.events() if 0 < e.nbytes <= SMALL_SIZE}
    large, small = [], []
    for section in timeline.sections:
        pools: tuple[list[Event], list[Event]] = ([], [])
        for event in section.events:
            pool = pools[event.block in small_blocks]
            if pool and event.nbytes > 0 and pool[-1][:2] == (event.block, -event.nbytes):
                pool.pop()  # a block that got another purpose did not move
            else:
                pool.append(event)
        large.append(Section(tuple(pools[0]), section.repeats))
        small.append(Section(tuple(pools[1]), section.repeats))
    return Timeline(tuple(large)), Timeline(tuple(small))


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
    """The requests as a run makes them: load, a first step, optimizer state, a second step."""
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
    begin = Event(TRAINING_BEGINS, 0, Kind.BATCH, "", Phase.PREPARE)
    load.append(Section((begin,)))
    walk = [
        Section(tuple(e for e in s.events if e.phase is not Phase.STEP), s.repeats) for s in steps
    ]
    update = [
        Section(tuple(e for e in s.events if e.phase is Phase.STEP), s.repeats) for s in steps
    ]
    first = unroll(Timeline((*load, *walk, *state, *update)))
    second = [r for r in unroll(Timeline((*walk, *update))) if r[1] or r[0] <= 0]
    top = max(identity for identity, _ in first)
    requests = []
    for identity, nbytes in first:
        if nbytes or identity <= 0:
            requests.append((identity, nbytes))
        elif identity in marked:  # a workspace, at its first use
            marked.remove(identity)
            requests.append((top + identity, sizes[identity]))
    top += max(sizes, default=0)
    return requests + [(identity + top, nbytes) for identity, nbytes in second]


def unroll(timeline: Timeline) -> list[Request]:
    """Every request of a run in order, repeated sections and copies written out.

    Blocks that a repeated section leaves behind for a later one are released latest first: backward
    meets the layers in reverse. Blocks that one layer hands to the next (hidden states, their
    gradients) are matched by ``handed_on``.
    """
    born: dict[int, list[int]] = {}  # block -> live identities, oldest first
    twins = handed_on(timeline)
    requests: list[Request] = []
    append = requests.append
    fresh = 0
    for index, section in enumerate(timeline.sections):
        last = section.repeats - 1
        for repetition in range(section.repeats):
            for block, nbytes, _kind, _owner, _phase, copies in section.events:
                if nbytes > 0:
                    live = born.setdefault(block, [])
                    for _ in range(copies):
                        fresh += 1
                        live.append(fresh)
                        append((fresh, nbytes))
                    continue
                if nbytes == 0:  # a mark, or a workspace's first use
                    append((block, 0))
                    continue
                oldest = False
                if last and (index, block) in twins:
                    twin, oldest = twins[index, block]
                    own = repetition == (0 if oldest else last)
                    live = born[block if own else twin]
                    oldest = oldest and not own
                else:
                    live = born[block]
                for _ in range(min(copies, len(live))):
                    append((live.pop(0 if oldest else -1), nbytes))
    return requests


def replay(requests: Iterable[Request], limit: int | None = None) -> CachingAllocator:
    """Run requests through a fresh allocator.

    Raises:
        OutOfMemory: If ``limit`` does not hold them.
    """
    allocator = CachingAllocator(limit)
    live: dict[int, Block] = {}
    asked = 0
    malloc, free = allocator.malloc, allocator.free
    for identity, nbytes in requests:
        if nbytes > 0:
            live[identity] = malloc(nbytes)
            asked += nbytes
        elif nbytes < 0:
            free(live.pop(identity))
            asked += nbytes
        elif identity == EMPTY_CACHE:
            allocator.empty_cache()
        else:
            allocator.ready_slack = allocator.allocated - asked
            allocator.peak_allocated = allocator.allocated
    return allocator
