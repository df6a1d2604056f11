"""A replay of PyTorch's CUDA caching allocator: from a Timeline to what the card sees.

The tape says which blocks live when. The allocator decides what that costs: it keeps freed blocks
for reuse in two pools, asks the driver for segments of 2 MiB, 20 MiB or more, splits them, merges
free neighbours, and gives whole free segments back only when the driver refuses. The replay does
the same with the same rules, so reserved memory and the smallest working limit are results.

Source: torch 2.11 ``c10/cuda/CUDACachingAllocator.cpp`` (``malloc``, ``get_free_block``,
``alloc_block``, ``should_split``, ``release_cached_blocks``), ``c10/core/AllocatorConfig.h``.

Known limitations:
    One stream; default settings (no expandable segments, no split limit). Among free blocks of one
    size PyTorch takes the lowest address, so the driver's choice of addresses matters. It is taken
    to go downwards, and to fill the lowest hole that is large enough first: of the orders tried the
    one that explains recorded runs, with and without a limit (driver 580, H100).
"""

from __future__ import annotations

from bisect import bisect_left, insort

SMALL_SIZE = 1024**2  # largest request of the small pool
SMALL_BUFFER = 2 * 1024**2
LARGE_BUFFER = 20 * 1024**2
MIN_LARGE_ALLOC = 10 * 1024**2
ROUND_LARGE = 2 * 1024**2
MIN_BLOCK = 512
ADDRESS_BITS = 50
ADDRESS_MASK = (1 << ADDRESS_BITS) - 1
TOP_ADDRESS = 1 << (ADDRESS_BITS - 1)


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
        self.ready_slack = 0  # bytes of unsplit blocks when training begins, for the replay
        self.retries = 0
        self._bottom = TOP_ADDRESS
        self._holes: list[list[int]] = []  # [first address, end] of released segments, rising
        # free blocks sorted by size, then address, both in one number: small pool, large pool
        self._free: tuple[list[int], list[int]] = ([], [])
        self._blocks: dict[int, Block] = {}

    def malloc(self, nbytes: int) -> Block:
        """Serve a request of ``nbytes`` (already rounded to 512).

        Raises:
            OutOfMemory: If the limit is reached although all free segments were given back.
        """
        small = nbytes <= SMALL_SIZE
        pool = self._free[not small]
        index = bisect_left(pool, nbytes << ADDRESS_BITS)
        if index < len(pool):
            block = self._blocks.pop(pool.pop(index) & ADDRESS_MASK)
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
        return Block(self._place(size), size, small)

    def _place(self, size: int) -> int:
        """Where the driver puts a segment."""
        for index, hole in enumerate(self._holes):
            if hole[1] - hole[0] >= size:
                address = hole[0]
                hole[0] += size
                if hole[0] == hole[1]:
                    del self._holes[index]
                return address
        self._bottom -= size
        return self._bottom

    def _release(self, block: Block) -> None:
        """Give a whole segment back to the driver; neighbouring holes become one."""
        self.reserved -= block.size
        start, end = block.address, block.address + block.size
        index = bisect_left(self._holes, [start, end])
        if index < len(self._holes) and self._holes[index][0] == end:
            end = self._holes.pop(index)[1]
        if index and self._holes[index - 1][1] == start:
            index -= 1
            start = self._holes.pop(index)[0]
        self._holes.insert(index, [start, end])

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
        insort(self._free[not block.small], block.size << ADDRESS_BITS | block.address)

    def _drop_free(self, block: Block) -> None:
        pool = self._free[not block.small]
        del pool[bisect_left(pool, block.size << ADDRESS_BITS | block.address)]
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
                block = self._blocks[key & ADDRESS_MASK]
                if block.prev is None and block.next is None:
                    self._release(block)
                    del self._blocks[block.address]
                else:
                    kept.append(key)
            pool[:] = kept
