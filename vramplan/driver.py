"""Where the CUDA driver puts memory: the addresses of the segments that PyTorch asks it for.

Among free blocks of one size PyTorch takes the one with the lowest address, so reserved memory
depends on the driver's choices. No document tells them. These rules give every address of the
1,943 segments that 50 recorded runs took (``tests/data``), with and without a limit:

- Addresses are reserved in ranges of whole 32 MiB, at the top of the highest free stretch of
  addresses that is larger; the memory asked for lies at the range's beginning.
- What is left of a range serves later requests: of the newest range with room, the smallest hole
  that is large enough.
- A range is given up when nothing is left in it.

Source: cudaMalloc and cudaFree of driver 580.159 on an H100, as seen by the allocator's history.

Known limitations:
    Other drivers and cards may do otherwise. Memory that the driver takes for itself, for kernels
    loaded while training runs, lies in the same ranges and is not modelled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

RANGE = 32 * 1024**2
TOP = 1 << 49
# what the CUDA context leaves free in ranges of its own, oldest range first: offset and size
CONTEXT_HOLES = ((488 * 1024**2, 24 * 1024**2), (414 * 1024**2, 2 * 1024**2))

Span = list[int]  # [first address, end]


class _Range:
    """A reserved range: bytes in use and holes, by address; ``room`` is the largest of these."""

    __slots__ = ("end", "holes", "room", "start", "used")

    def __init__(self, start: int, end: int, used: int) -> None:
        self.start = start
        self.end = end
        self.used = used
        self.holes: list[Span] = [[start + used, end]] if used < end - start else []
        self.room = end - start - used

    def take(self, size: int) -> int:
        """Use the beginning of the smallest hole that is large enough."""
        hole = min((h for h in self.holes if h[1] - h[0] >= size), key=_length)
        address = hole[0]
        hole[0] += size
        if hole[0] == hole[1]:
            self.holes.remove(hole)
        self.used += size
        self.room = max(map(_length, self.holes), default=0)
        return address

    def give(self, address: int, size: int) -> None:
        """Make a hole of what was used."""
        self.used -= size
        _join(self.holes, address, address + size)
        self.room = max(map(_length, self.holes))


class AddressSpace:
    """What the driver has given out.

    Args:
        holes: Offsets and sizes in bytes of what the CUDA context left free in ranges of its own,
            from its lowest address on, oldest range first.
    """

    def __init__(self, holes: Iterable[tuple[int, int]] = CONTEXT_HOLES) -> None:
        self._free: list[Span] = [[0, TOP]]
        self._ranges: list[_Range] = []  # oldest first
        self._of: dict[int, _Range] = {}  # address of a piece in use -> its range
        for offset, size in holes:
            start = TOP + offset
            self._ranges.append(_Range(start - RANGE, start + size, RANGE))

    def place(self, size: int) -> int:
        """The address of ``size`` bytes."""
        for found in reversed(self._ranges):
            if found.room >= size:
                address = found.take(size)
                break
        else:
            length = -(-size // RANGE) * RANGE
            stretch = next(s for s in reversed(self._free) if _length(s) > length)
            stretch[1] -= length
            address = stretch[1]
            found = _Range(address, address + length, size)
            self._ranges.append(found)
        self._of[address] = found
        return address

    def release(self, address: int, size: int) -> None:
        """Take bytes back."""
        home = self._of.pop(address)
        home.give(address, size)
        if not home.used:
            self._ranges.remove(home)
            _join(self._free, home.start, home.end)


def _length(span: Span) -> int:
    return span[1] - span[0]


def _join(spans: list[Span], start: int, end: int) -> None:
    """Add a span to a list by address; neighbours become one."""
    index = bisect_left(spans, [start, end])
    if index < len(spans) and spans[index][0] == end:
        end = spans.pop(index)[1]
    if index and spans[index - 1][1] == start:
        start = spans.pop(index - 1)[0]
    insort(spans, [start, end])
