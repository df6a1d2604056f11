"""The caching allocator under ``expandable_segments:True``: one segment a pool, which grows.

A segment reserves addresses for more than the card has and maps memory behind them page by page,
2 MiB in the small pool and 20 MiB (``large_segment_size_mb``) in the large one. A request that no
free block serves extends the free end of the segment, so nothing is left over between segments;
blocks are split down to 512 bytes, and pages that are free as a whole can be given back wherever
they are.

Source: torch 2.11 ``c10/cuda/CUDACachingAllocator.cpp`` (``find_expandable_block``, ``map_block``,
``try_allocate_expandable_block``, ``unmap_block``, ``get_free_block``, ``should_split``).

Known limitations:
    A second segment, for when the addresses of the first run out (1 1/8 of the card's memory), is
    not modelled. The limit is compared with what a segment of its own would take, as PyTorch does,
    so reserved memory can end up a page above it. Where the platform has no such segments
    (Windows), PyTorch warns and goes on without them.
"""

from __future__ import annotations

from bisect import insort

from vramplan.alloc_conf import NO_LIMIT, AllocatorSettings
from vramplan.allocator import SMALL_BUFFER, Block, CachingAllocator
from vramplan.units import BLOCK_BYTES

ADDRESS_SPACE = 1 << 43  # of one segment


def allocator_for(settings: AllocatorSettings, limit: int | None = None) -> CachingAllocator:
    """A fresh allocator under these settings.

    Args:
        settings: What ``PYTORCH_ALLOC_CONF`` says.
        limit: Most bytes it may reserve; None for no limit.
    """
    kind = ExpandableAllocator if settings.expandable_segments else CachingAllocator
    return kind(limit, settings)


class ExpandableAllocator(CachingAllocator):
    """The state of an allocator with expandable segments.

    Args:
        limit: Most bytes it may reserve (``set_per_process_memory_fraction``); None for no limit.
        settings: What ``PYTORCH_ALLOC_CONF`` says.
    """

    def __init__(self, limit: int | None, settings: AllocatorSettings) -> None:
        super().__init__(limit, settings)
        self._splits_below, self._least_rest, self._chooses = NO_LIMIT, BLOCK_BYTES, True
        # bytes mapped together: large pool, small pool
        self._pages = (settings.large_segment_bytes, SMALL_BUFFER)
        # address ranges with no memory behind them, by address
        self._unmapped: tuple[list[Block], list[Block]] = ([], [])
        for small, page in enumerate(self._pages):
            size = ADDRESS_SPACE // page * page
            self._add_unmapped(Block(2 * size * small, size, bool(small)))

    # -- reuse ---------------------------------------------------------------------------------

    def _choose(self, nbytes: int, pool: list[int], index: int) -> int:
        """The same; a block that can grow counts as large as it could become."""
        blocks = self._blocks
        block = blocks[pool[index]]
        if block.next is not None and not block.next.mapped:
            room = block.size + block.next.size
            while index + 1 < len(pool):
                following = _room(blocks[pool[index + 1]])
                if following >= room:
                    break
                index, room = index + 1, following
        return super()._choose(nbytes, pool, index) if self._max_split != NO_LIMIT else index

    # -- memory from the driver ----------------------------------------------------------------

    def _release_oversize(self, _nbytes: int, _small: bool) -> bool:
        return False  # blocks of expandable segments are passed over

    def _grow(self, _size: int, nbytes: int, small: bool) -> Block:
        """Map memory at the lowest address where the request has room (try_allocate_...)."""
        block = self._lowest(nbytes, small)
        if not block.mapped:
            self._map(block, min(block.size, nbytes))
        while block.size < nbytes:
            after = block.next
            assert after is not None
            self._map(after, min(nbytes - block.size, after.size))
        self._drop_free(block)
        block.free = False
        self.num_large_segments += not small
        return block

    def _lowest(self, nbytes: int, small: bool) -> Block:
        """The first of the free and unmapped blocks side by side that have room for a request."""
        for block in self._unmapped[small]:
            before = block.prev
            first = before if before is not None and before.free else block
            room, piece = 0, first
            while room < nbytes and (piece.free or not piece.mapped):
                room += piece.size
                if piece.next is None:
                    break
                piece = piece.next
            if room >= nbytes:
                return first
        raise AssertionError("the address space is larger than any card")

    def _map(self, block: Block, nbytes: int) -> None:
        """Put memory behind whole pages from the block's beginning on.

        They become part of the free block before them, if there is one.
        """
        page = self._pages[block.small]
        size = -(-nbytes // page) * page
        self._unmapped[block.small].remove(block)
        if size < block.size:
            rest = Block(block.address + size, block.size - size, block.small)
            _insert(rest, block, block.next)
            block.size = size
            self._add_unmapped(rest)
        block.mapped = True
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.allocated += size  # free takes it off again
        self.free(block)

    def empty_cache(self) -> None:
        """Give back every page that is free as a whole (release_cached_blocks)."""
        for pool in self._free:
            for block in [self._blocks[key] for key in pool]:
                self._unmap(block)

    def _unmap(self, block: Block) -> None:
        """Give the whole pages of a free block back; what it has before and behind them stays."""
        page = self._pages[block.small]
        end_of_block = block.address + block.size
        start, end = -(-block.address // page) * page, end_of_block // page * page
        if start >= end:
            return
        self._drop_free(block)
        block.free = False
        if start > block.address:
            before = Block(block.address, start - block.address, block.small)
            _insert(before, block.prev, block)
            self._add_free(before)
        if end < end_of_block:
            after = Block(end, end_of_block - end, block.small)
            _insert(after, block, block.next)
            self._add_free(after)
        block.address, block.size = start, end - start
        self.reserved -= block.size
        for other in (block.prev, block.next):
            if other is not None and not other.mapped:
                self._unmapped[block.small].remove(other)
                _absorb(block, other)
        self._add_unmapped(block)

    def _add_unmapped(self, block: Block) -> None:
        block.mapped = False
        insort(self._unmapped[block.small], block, key=lambda other: other.address)


def _room(block: Block) -> int:
    """How large a free block could become."""
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _insert(block: Block, before: Block | None, after: Block | None) -> None:
    """Put a block between two neighbours (splice)."""
    block.prev, block.next = before, after
    if before is not None:
        before.next = block
    if after is not None:
        after.prev = block


def _absorb(block: Block, other: Block) -> None:
    """Make a neighbour part of a block (try_merge_blocks)."""
    block.size += other.size
    if block.prev is other:
        block.address = other.address
        _insert(block, other.prev, block.next)
    else:
        _insert(block, block.prev, other.next)
