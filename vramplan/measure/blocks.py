"""What became of every block in an allocator's trace, and whose it was.

The trace knows addresses and sizes. Modules and phases are noted beside it as marks, tensors that
are known by name as labels; both carry the number of allocations made so far, which puts them in
their place in the trace. No torch.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vramplan.timeline import Kind

Meaning = tuple[Kind, str]  # what a block is for, and its module


class Mark(NamedTuple):
    """Where the program is from here on.

    Attributes:
        at: Allocations made before it.
        phase: Phase of the step.
        owner: Module at work, empty for none.
        inside: Whether that is a module's forward (a recomputed one too), not its backward.
    """

    at: int
    phase: str
    owner: str
    inside: bool


Label = tuple[int, Mapping[int, Meaning]]  # allocations made before it; address -> meaning


class Blocks:
    """Follows a trace, entry by entry.

    Args:
        base: Allocations made before the trace began.
        marks: In the order in which they were made.
        labels: As well; of several labels on a block the first holds.
        round_size: What the allocator makes of a request.
        released: The trace's action that ends a block.

    Attributes:
        order: (block, + or - its bytes), in the order of the trace. A block is the number of the
            allocation that made it.
        made: Block -> the entry that made it.
        gone: Block -> allocations made when it was released.
        known: Block -> its meaning, for those that a label named.
    """

    def __init__(
        self,
        base: int,
        marks: Sequence[Mark],
        labels: Sequence[Label],
        round_size: Callable[[int], int],
        released: str = "free_completed",
    ) -> None:
        self.count = base
        self.round_size, self.released = round_size, released
        self.order: list[tuple[int, int]] = []
        self.made: dict[int, Mapping[str, Any]] = {}
        self.gone: dict[int, int] = {}
        self.known: dict[int, Meaning] = {}
        self._marks, self._at = marks, [mark.at for mark in marks]
        self._labels = deque(labels)
        self._live: dict[int, int] = {}  # address -> block

    def hold(self, block: int, address: int, nbytes: int) -> None:
        """A block that was there before the trace."""
        self._live[address] = block
        self.made[block] = {"size": nbytes}
        self.order.append((block, nbytes))

    def see(self, entry: Mapping[str, Any]) -> int:
        """One entry of the trace; returns the block it makes or ends, 0 for none."""
        action = entry["action"]
        if action == "alloc":
            self.settle()
            self.count += 1
            self._live[entry["addr"]] = self.count
            self.made[self.count] = entry
            self.order.append((self.count, self.round_size(entry["size"])))
            return self.count
        if action != self.released:
            return 0
        self.settle()
        block = self._live.pop(entry["addr"], 0)
        if block:
            self.gone[block] = self.count
            nbytes = self.made[block]["size"]
            self.order.append((block, -(self.round_size(nbytes) if block > 0 else nbytes)))
        return block

    def settle(self) -> None:
        """Give their meaning to the blocks that the labels up to here name."""
        while self._labels and self._labels[0][0] <= self.count:
            for address, meaning in self._labels.popleft()[1].items():
                if address in self._live:
                    self.known.setdefault(self._live[address], meaning)

    def mark(self, number: int) -> Mark | None:
        """The last mark before the allocation of a number."""
        index = bisect.bisect_left(self._at, number) - 1
        return self._marks[index] if index >= 0 else None

    def between_marks(self, first: int, last: int) -> bool:
        """Whether no mark lies between an allocation and a later count."""
        return bisect.bisect_left(self._at, first) == bisect.bisect_right(self._at, last)
