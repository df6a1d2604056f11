"""A replay of PyTorch's CUDA caching allocator: from a Timeline to what the card sees.

The tape says which blocks live when. The allocator decides what that costs: it keeps freed blocks
for reuse in two pools, asks the driver for segments of 2 MiB, 20 MiB or more, splits them, merges
free neighbours, and gives whole free segments back only when the driver refuses. The replay does
the same with the same rules, so reserved memory and the smallest working limit are results.

Source: torch 2.11 ``c10/cuda/CUDACachingAllocator.cpp`` (``malloc``, ``get_free_block``,
``alloc_block``, ``should_split``, ``release_cached_blocks``), ``c10/core/AllocatorConfig.h``.

Known limitations:
    One stream; default settings (no expandable segments, no split limit). Segment addresses are
    taken as rising, where the driver may reuse a hole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from vramplan.timeline import Event, Kind, Phase, Section, Timeline

SMALL_SIZE = 1024**2  # largest request of the small pool
SMALL_BUFFER = 2 * 1024**2
LARGE_BUFFER = 20 * 1024**2
MIN_LARGE_ALLOC = 10 * 1024**2
ROUND_LARGE = 2 * 1024**2
MIN_BLOCK = 512


class OutOfMemory(Exception):
    """The limit does not hold the job, even with every free segment given back."""


class Block:
    """A piece of a segment; ``prev`` and ``next`` are its neighbours in it."""

    __slots__ = ("address", "free", "next", "prev", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = False
        self.prev: Block | None = None
        self.next: Block | None = None


class CachingAllocator:
    """The allocator's state.

    Args:
        limit: Most bytes it may reserve (``set_per_process_memory_fraction``); None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reserved = 0
        self.peak_reserved = 0
        self.allocated = 0
        self.peak_allocated = 0
        self.retries = 0
        self._top = 0
        # free blocks as sorted (size, address) with the block beside: small pool, large pool
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._blocks: dict[int, Block] = {}

    def malloc(self, nbytes: int) -> Block:
        """Serve a request of ``nbytes`` (already rounded to 512).

        Raises:
            OutOfMemory: If the limit is reached although all free segments were given back.
        """
        small = nbytes <= SMALL_SIZE
        pool = self._free[not small]
        index = bisect_left(pool, (nbytes, 0))
        if index < len(pool):
            block = self._blocks.pop(pool.pop(index)[1])
            block.free = False
        else:
            block = self._segment(nbytes, small)
        remaining = block.size - nbytes
        if remaining >= MIN_BLOCK if small else remaining > SMALL_SIZE:
            self._split(block, nbytes)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def _segment(self, nbytes: int, small: bool) -> Block:
        if small:
            size = SMALL_BUFFER
        elif nbytes < MIN_LARGE_ALLOC:
            size = LARGE_BUFFER
        else:
            size = -(-nbytes // ROUND_LARGE) * ROUND_LARGE
        if self.limit is not None and self.reserved + size > self.limit:
            self.retries += 1
            self.empty_cache()
            if self.reserved + size > self.limit:
                raise OutOfMemory
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = Block(self._top, size, small)
        self._top += size
        return block

    def _split(self, block: Block, nbytes: int) -> None:
        rest = Block(block.address + nbytes, block.size - nbytes, block.small)
        rest.prev, rest.next = block, block.next
        if rest.next is not None:
            rest.next.prev = rest
        block.next = rest
        block.size = nbytes
        self._add_free(rest)

    def _add_free(self, block: Block) -> None:
        block.free = True
        self._blocks[block.address] = block
        insort(self._free[not block.small], (block.size, block.address))

    def _drop_free(self, block: Block) -> None:
        pool = self._free[not block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
        del self._blocks[block.address]

    def free(self, block: Block) -> None:
        """Take a block back and merge it with free neighbours."""
        self.allocated -= block.size
        before, after = block.prev, block.next
        if before is not None and before.free:
            self._drop_free(before)
            before.size += block.size
            before.next = after
            if after is not None:
                after.prev = before
            block = before
        if after is not None and after.free:
            self._drop_free(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.prev = block
        self._add_free(block)

    def empty_cache(self) -> None:
        """Give back every segment that is free as a whole."""
        for pool in self._free:
            kept = []
            for key in pool:
                block = self._blocks[key[1]]
                if block.prev is None and block.next is None:
                    self.reserved -= block.size
                    del self._blocks[key[1]]
                else:
                    kept.append(key)
            pool[:] = kept


Request = tuple[int, int]  # (block identity, bytes); negative bytes release it
STATIC = (Phase.LOAD, Phase.PREPARE)
LIMIT_RESOLUTION = 32 * 1024**2


class Replay:
    """A run's requests, ready to be served with and without a limit.

    The large pool is replayed block by block. The small pool (requests up to 1 MiB) holds adapters,
    statistics and other long-lived things in 2 MiB segments and is taken as full ones. When the
    optimizer's state is large its blocks, allocated at the end of the first step, shape what the
    second one finds: then both steps are replayed.
    """

    def __init__(self, timeline: Timeline) -> None:
        large, small = _split_pools(timeline)
        self.small_bytes = -(-_peak(small) // SMALL_BUFFER) * SMALL_BUFFER
        self.live_bytes = _peak(large)
        self.requests = _in_order(large)
        self._roomy: CachingAllocator | None = None

    def roomy(self) -> CachingAllocator:
        """The allocator after the run on a card with room."""
        if self._roomy is None:
            self._roomy = replay(self.requests)
        return self._roomy

    def reserved_bytes(self) -> int:
        """Most it reserves, unhurried."""
        return self.roomy().peak_reserved + self.small_bytes

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
    """The events of the large and of the small pool."""
    large, small = [], []
    for section in timeline.sections:
        pools: tuple[list[Event], list[Event]] = ([], [])
        for event in section.events:
            pools[-SMALL_SIZE <= event.nbytes <= SMALL_SIZE].append(event)
        large.append(Section(tuple(pools[0]), section.repeats))
        small.append(Section(tuple(pools[1]), section.repeats))
    return Timeline(tuple(large)), Timeline(tuple(small))


def _peak(timeline: Timeline) -> int:
    """Most bytes live at once, repeated sections folded."""
    live = best = 0
    for section in timeline.sections:
        start, top = live, live
        for event in section.events:
            live += event.nbytes * event.copies
            top = max(top, live)
        more = section.repeats - 1
        best = max(best, top + max(0, live - start) * more)
        live += (live - start) * more
    return best


def _in_order(timeline: Timeline) -> list[Request]:
    """The requests as a run makes them: load, a first step, optimizer state, a second step."""
    static: list[Event] = []
    state: list[Event] = []
    steps: list[Section] = []
    for section in timeline.sections:
        moving = tuple(e for e in section.events if e.phase not in STATIC)
        for event in section.events:
            if event.phase in STATIC:
                (state if event.kind is Kind.OPTIMIZER else static).append(event)
        steps.append(Section(moving, section.repeats))
    load = Section(tuple(static))
    if not state:
        return unroll(Timeline((load, *steps)))
    walk = [
        Section(tuple(e for e in s.events if e.phase is not Phase.STEP), s.repeats) for s in steps
    ]
    update = [Section(tuple(e for e in s.events if e.phase is Phase.STEP)) for s in steps]
    first = unroll(Timeline((load, *walk, Section(tuple(state)), *update)))
    top = max(identity for identity, _ in first)
    second = unroll(Timeline((*walk, *update)))
    return first + [(identity + top, nbytes) for identity, nbytes in second]


def unroll(timeline: Timeline) -> list[Request]:
    """Every request of a run in order, repeated sections and copies written out.

    Blocks that a repeated section leaves behind for a later one are released latest first: backward
    meets the layers in reverse. Blocks that one layer hands to the next (hidden states, their
    gradients) are matched by ``_handed_on``.
    """
    born: dict[int, list[int]] = {}  # block -> live identities, oldest first
    handed_on = _handed_on(timeline)
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
                oldest = False
                if last and (index, block) in handed_on:
                    twin, oldest = handed_on[index, block]
                    own = repetition == (0 if oldest else last)
                    live = born[block if own else twin]
                    oldest = oldest and not own
                else:
                    live = born[block]
                for _ in range(min(copies, len(live))):
                    append((live.pop(0 if oldest else -1), nbytes))
    return requests


def _handed_on(timeline: Timeline) -> dict[tuple[int, int], tuple[int, bool]]:
    """Match what a repeated section releases of its outer neighbour with its own equivalent.

    The written-out layer releases a block F of the layer before it; its own equivalent Y is
    released, once, by the layer after it. Of k repetitions one releases F, the others a Y: in the
    walk that made them (chained) F goes first, in the reversed walk F goes last.

    Returns:
        (section, F) -> (Y, chained).
    """
    home: dict[int, int] = {}
    size: dict[int, int] = {}
    left: dict[int, list[int]] = {}  # repeated section -> its blocks released once elsewhere
    taken: dict[int, list[int]] = {}  # repeated section -> outer blocks it releases
    repeats = [section.repeats for section in timeline.sections]
    for index, section in enumerate(timeline.sections):
        for event in section.events:
            if event.nbytes > 0:
                home[event.block], size[event.block] = index, event.nbytes
            elif event.copies == 1 and event.block in home:
                source = home[event.block]
                if repeats[index] == 1 and repeats[source] > 1:
                    left.setdefault(source, []).append(event.block)
                elif repeats[index] > 1 and repeats[source] == 1:
                    taken.setdefault(index, []).append(event.block)
    matches: dict[tuple[int, int], tuple[int, bool]] = {}
    for index, blocks in taken.items():
        for block in blocks:
            for source in (index, *sorted((s for s in left if s < index), reverse=True)):
                twin = next((b for b in left.get(source, ()) if size[b] == size[block]), None)
                if twin is not None:
                    matches[index, block] = (twin, source == index)
                    left[source].remove(twin)
                    break
    return matches


def replay(requests: Iterable[Request], limit: int | None = None) -> CachingAllocator:
    """Run requests through a fresh allocator.

    Raises:
        OutOfMemory: If ``limit`` does not hold them.
    """
    allocator = CachingAllocator(limit)
    live: dict[int, Block] = {}
    malloc, free = allocator.malloc, allocator.free
    for identity, nbytes in requests:
        if nbytes > 0:
            live[identity] = malloc(nbytes)
        else:
            free(live.pop(identity))
    return allocator
