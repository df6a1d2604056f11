"""A replay of PyTorch's CUDA caching allocator: from a Timeline to what the card sees.

The tape says which blocks live when. The allocator decides what that costs: it keeps freed blocks
for reuse in two pools, asks the driver for segments of 2 MiB, 20 MiB or more, splits them, merges
free neighbours, and gives whole free segments back only when the driver refuses. The replay does
the same with the same rules, so reserved memory and the smallest working limit are results.
``vramplan.expandable`` has the rules under ``expandable_segments:True``.

Source: torch 2.11 ``c10/cuda/CUDACachingAllocator.cpp`` (``malloc``, ``get_free_block``,
``alloc_block``, ``should_split``, ``garbage_collect_cached_blocks``,
``release_available_cached_blocks``, ``release_cached_blocks``), ``c10/core/AllocatorConfig.h``.

Known limitations:
    One stream. Which of several free blocks of one size is taken depends on the addresses that the
    driver chose; see ``vramplan.driver``.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from vramplan.alloc_conf import (
    DEFAULT_SETTINGS,
    MIN_LARGE_ALLOC,
    NO_LIMIT,
    SMALL_SIZE,
    AllocatorSettings,
)
from vramplan.driver import AddressSpace
from vramplan.units import BLOCK_BYTES

SMALL_BUFFER = 2 * 1024**2
ROUND_LARGE = 2 * 1024**2
ADDRESS_BITS = 50


class OutOfMemory(Exception):
    """The limit does not hold the job, even with every free segment given back."""


class Block:
    """A piece of a segment; ``prev`` and ``next`` are its neighbours in it.

    ``since`` is the pool's clock when it became free, for garbage collection. ``mapped`` is False
    for address space of an expandable segment with no memory behind it.
    """

    __slots__ = ("address", "free", "mapped", "next", "prev", "since", "size", "small")

    since: int

    def __init__(
        self,
        address: int,
        size: int,
        small: bool,
        prev: Block | None = None,
        following: Block | None = None,
    ) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = False
        self.mapped = True
        self.prev = prev
        self.next = following


class CachingAllocator:
    """The allocator's state.

    Args:
        limit: Most bytes it may reserve (``set_per_process_memory_fraction``); None for no limit.
        settings: What ``PYTORCH_ALLOC_CONF`` says.
    """

    def __init__(
        self, limit: int | None = None, settings: AllocatorSettings = DEFAULT_SETTINGS
    ) -> None:
        self.limit = limit
        self.settings = settings
        self.reserved = 0
        self.peak_reserved = 0
        self.allocated = 0
        self.peak_allocated = 0
        self.ready_allocated = 0  # when training began, for the replay
        self.retries = 0
        self.num_large_segments = 0  # taken from the driver or grown, ever
        self._max_split = settings.max_split_bytes
        self._chooses = self._max_split != NO_LIMIT  # else the smallest serves
        # large requests below the first are split where at least the second is left (should_split)
        self._splits_below, self._least_rest = settings.max_split_bytes, SMALL_SIZE + 1
        self._collects = limit is not None and settings.garbage_collection_threshold > 0
        self._clock = 0  # requests to the large pool so far (get_free_blocks_call_count)
        self._driver = AddressSpace()
        # free blocks by size, then address, both in one number: large pool, small pool
        self._free: tuple[list[int], list[int]] = ([], [])
        self._blocks: dict[int, Block] = {}  # by the same number

    def malloc(self, nbytes: int) -> Block:
        """Serve a request.

        Args:
            nbytes: Bytes, already rounded (``AllocatorSettings.round_size``).

        Returns:
            The block, larger than the request where the rest was not split off.

        Raises:
            OutOfMemory: If the limit is reached although all free segments were given back.
        """
        small = nbytes <= SMALL_SIZE
        if self._collects and not small:
            self._clock += 1
        pool = self._free[small]
        index = bisect_left(pool, nbytes << ADDRESS_BITS)  # the smallest that is large enough
        if self._chooses and index < len(pool):
            index = self._choose(nbytes, pool, index)
        if index < len(pool):
            block = self._blocks.pop(pool.pop(index))
            block.free = False
        else:
            block = self._take(nbytes, small)
        size = block.size
        rest = size - nbytes
        if rest and (  # should_split
            rest >= BLOCK_BYTES
            if small
            else rest >= self._least_rest and nbytes < self._splits_below
        ):
            after = block.next
            split = Block(block.address + nbytes, rest, small, block, after)
            if after is not None:
                after.prev = split
            block.next = split
            block.size = size = nbytes
            # _add_free, written out: a call less on the way of every request
            split.free = True
            split.since = self._clock
            key = rest << ADDRESS_BITS | split.address
            self._blocks[key] = split
            insort(pool, key)
        self.allocated = allocated = self.allocated + size
        if allocated > self.peak_allocated:  # noqa: PLR1730 - max() would be a call
            self.peak_allocated = allocated
        return block

    def _choose(self, nbytes: int, pool: list[int], index: int) -> int:
        """Which free block serves, from the smallest on that is large enough (get_free_block).

        Blocks of ``max_split_size`` serve only requests of that size, and not much smaller ones.

        Returns:
            Its index, the pool's length for none.
        """
        return index if pool[index] >> ADDRESS_BITS < self._ceiling(nbytes) else len(pool)

    def _ceiling(self, nbytes: int) -> int:
        """Size from which on a free block is too large for a request."""
        if nbytes < self._max_split:
            return self._max_split
        return nbytes + self.settings.max_non_split_rounding_bytes

    # -- memory from the driver ----------------------------------------------------------------

    def _take(self, nbytes: int, small: bool) -> Block:
        """Memory from the driver; what is free is given back when the limit stands in the way."""
        if small:
            size = SMALL_BUFFER
        elif nbytes < MIN_LARGE_ALLOC:
            size = self.settings.large_segment_bytes
        else:
            size = -(-nbytes // ROUND_LARGE) * ROUND_LARGE
        if self.limit is not None:
            if self._collects:
                self._collect_garbage()
            if self.reserved + size > self.limit:
                self._make_room(size, nbytes, small)
        return self._grow(size, nbytes, small)

    def _make_room(self, size: int, nbytes: int, small: bool) -> None:
        """What malloc does when there is no room for ``size`` more bytes."""
        assert self.limit is not None
        if self._release_oversize(nbytes, small) and self.reserved + size <= self.limit:
            return
        self.empty_cache()
        self.retries += 1
        if self.reserved + size > self.limit:
            raise OutOfMemory

    def _grow(self, size: int, _nbytes: int, small: bool) -> Block:
        """A new segment."""
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.num_large_segments += not small
        return Block(self._place(size), size, small)

    def _place(self, size: int) -> int:
        """Where the driver puts a segment."""
        return self._driver.place(size)

    def _release(self, block: Block) -> None:
        """Give a whole segment back to the driver."""
        self.reserved -= block.size
        self._driver.release(block.address, block.size)

    def _release_free(self, block: Block) -> None:
        self._drop_free(block)
        self._release(block)

    def _unsplit(self, pool: list[int]) -> list[Block]:
        """Free blocks that are whole segments, smallest first."""
        blocks = [self._blocks[key] for key in pool]
        return [block for block in blocks if block.prev is None and block.next is None]

    def empty_cache(self) -> None:
        """Give back every segment that is free as a whole (release_cached_blocks)."""
        for pool in self._free:
            for block in self._unsplit(pool):
                self._release_free(block)

    def _release_oversize(self, nbytes: int, small: bool) -> bool:
        """Give back what serves the request alone, else the largest blocks until they sum up to it.

        Only blocks that are never split (release_available_cached_blocks).

        Returns:
            Whether as much was given back as is asked for.
        """
        if self._max_split == NO_LIMIT:
            return False
        wanted = max(nbytes, self._max_split)
        pool = self._free[small]
        index = bisect_left(pool, wanted << ADDRESS_BITS)
        if index < len(pool):
            self._release_free(self._blocks[pool[index]])
            return True
        released = 0
        while released < wanted and pool and pool[-1] >> ADDRESS_BITS >= self._max_split:
            block = self._blocks[pool[-1]]
            released += block.size
            self._release_free(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Give back free segments of more than average age until enough is reclaimed.

        Age counts requests to the large pool since a block became free
        (garbage_collect_cached_blocks).
        """
        assert self.limit is not None
        threshold = int(self.settings.garbage_collection_threshold * self.limit)
        target = self.reserved - threshold
        blocks = self._unsplit(self._free[False]) if target > 0 else []
        total_age = sum(self._clock - block.since for block in blocks)
        reclaimed, freed = 0, True
        while reclaimed < target and freed and blocks:
            oldest = total_age / len(blocks)
            kept = []
            for block in blocks:
                age = self._clock - block.since
                if age >= oldest:
                    reclaimed += block.size
                    total_age -= age
                    self._release_free(block)
                else:
                    kept.append(block)
            freed, blocks = len(kept) < len(blocks), kept

    # -- blocks within a segment ---------------------------------------------------------------

    def _add_free(self, block: Block) -> None:
        block.free = True
        block.since = self._clock
        key = block.size << ADDRESS_BITS | block.address
        self._blocks[key] = block
        insort(self._free[block.small], key)

    def _drop_free(self, block: Block) -> None:
        pool = self._free[block.small]
        key = block.size << ADDRESS_BITS | block.address
        del pool[bisect_left(pool, key)], self._blocks[key]

    def free(self, block: Block) -> None:
        """Take a block back and merge it with free neighbours."""
        pool, blocks = self._free[block.small], self._blocks
        size = block.size
        self.allocated -= size
        before, after = block.prev, block.next
        # _drop_free and _add_free, written out: the way of every request
        if before is not None and before.free:
            key = before.size << ADDRESS_BITS | before.address
            del pool[bisect_left(pool, key)], blocks[key]
            size += before.size
            before.next = after
            if after is not None:
                after.prev = before
            block = before
        if after is not None and after.free:
            key = after.size << ADDRESS_BITS | after.address
            del pool[bisect_left(pool, key)], blocks[key]
            size += after.size
            block.next = following = after.next
            if following is not None:
                following.prev = block
        block.size = size
        block.free = True
        block.since = self._clock
        key = size << ADDRESS_BITS | block.address
        blocks[key] = block
        insort(pool, key)
