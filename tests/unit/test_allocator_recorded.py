"""The allocator alone, against PyTorch's real one: every request's block, segment and count.

``tests/data/allocator-*.json.gz`` was written on a GPU by
``python -m vramplan.measure.allocator_probe``: the same requests under fourteen settings.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from vramplan.alloc_conf import parse_alloc_conf
from vramplan.allocator import Block, CachingAllocator, OutOfMemory
from vramplan.expandable import ExpandableAllocator

FILES = sorted((Path(__file__).parents[1] / "data").glob("allocator-*.json.gz"))
pytestmark = pytest.mark.skipif(not FILES, reason="no recording of the allocator is shipped yet")
UNIT = 512


@lru_cache
def recording(path: Path) -> dict[str, Any]:
    return dict(json.loads(gzip.decompress(path.read_bytes())))


def runs() -> list[Any]:
    return [
        pytest.param(path, number, id=f"{run['sequence']}-{run['setting'] or 'default'}")
        for path in FILES
        for number, run in enumerate(recording(path)["runs"])
        if "error" not in run
    ]


def limit_of(run: dict[str, Any]) -> int | None:
    """As setMemoryFraction computes it."""
    return None if run["fraction"] is None else int(run["fraction"] * run["total_bytes"])


class Followed(CachingAllocator):
    """Segments lie where the driver really put them; every one is compared."""

    def __init__(self, run: dict[str, Any]) -> None:
        super().__init__(limit_of(run), parse_alloc_conf(run["setting"]))
        self.events = iter(run["segment_events"])

    def _place(self, size: int) -> int:
        _, action, address, recorded = next(self.events)
        assert (action, recorded) == ("segment_alloc", size)
        return int(address) * UNIT

    def _release(self, block: Block) -> None:
        _, action, address, recorded = next(self.events)
        assert (action, address * UNIT, recorded) == ("segment_free", block.address, block.size)
        self.reserved -= block.size


class FollowedExpandable(ExpandableAllocator):
    """The same with expandable segments, whose addresses count from where they begin."""

    def __init__(self, run: dict[str, Any]) -> None:
        super().__init__(limit_of(run), parse_alloc_conf(run["setting"]))
        self.events = iter(run["segment_events"])
        self.shift = [0, 0]
        self.mapped = [0, 0]

    def real(self, block: Block) -> int:
        return block.address + self.shift[not block.small]

    def _map(self, block: Block, nbytes: int) -> None:
        _, action, address, recorded = next(self.events)
        pool = int(not block.small)
        if not self.mapped[pool]:  # a new segment, anywhere
            self.shift[pool] = address * UNIT - block.address
        assert (action, address * UNIT) == ("segment_map", self.real(block))
        before = self.reserved
        super()._map(block, nbytes)
        assert self.reserved - before == recorded
        self.mapped[pool] += recorded

    def _unmap(self, block: Block) -> None:
        small, before = block.small, self.reserved
        super()._unmap(block)
        if self.reserved < before:
            _, action, _, recorded = next(self.events)
            assert (action, recorded) == ("segment_unmap", before - self.reserved)
            self.mapped[not small] -= recorded


def follow(run: dict[str, Any]) -> Followed | FollowedExpandable:
    if parse_alloc_conf(run["setting"]).expandable_segments:
        return FollowedExpandable(run)
    return Followed(run)


@pytest.mark.parametrize(("path", "number"), runs())
def test_every_block_and_segment_to_the_byte(path: Path, number: int) -> None:
    document = recording(path)
    run = document["runs"][number]
    allocator = follow(run)
    live: dict[int, Block] = {}
    failed = set(run["oom"])
    for index, (identity, nbytes) in enumerate(document["sequences"][run["sequence"]]):
        before = (allocator.allocated, allocator.reserved, allocator.retries)
        address = None
        if nbytes:
            try:
                block = allocator.malloc(allocator.settings.round_size(nbytes))
            except OutOfMemory:
                assert index in failed
            else:
                assert index not in failed
                live[identity] = block
                address = block.address
                if isinstance(allocator, FollowedExpandable):
                    address = allocator.real(block)
        elif not identity:
            allocator.empty_cache()
        elif identity in live:
            allocator.free(live.pop(identity))
        now = (allocator.allocated, allocator.reserved, allocator.retries)
        change = tuple(new - old for new, old in zip(now, before, strict=True))
        assert change == (
            run["allocated"][index],
            run["small"][index] + run["large"][index],
            run["retries"][index],
        ), f"request {index}"
        assert address == (None if run["address"][index] is None else run["address"][index] * UNIT)
    assert next(allocator.events, None) is None
    assert sorted(block.size for block in live.values()) == sorted(
        size
        for *_, blocks in run["segments"]
        for size, state in blocks
        if state == "active_allocated"
    )
    assert allocator.reserved == sum(size for _, size, *_ in run["segments"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_are_read_as_pytorch_reads_them(path: Path) -> None:
    seen = set()
    for run in recording(path)["runs"]:
        if "error" in run or run["setting"] in seen or not run["effective"]:
            continue
        seen.add(run["setting"])
        own, theirs = parse_alloc_conf(run["setting"]), run["effective"]
        assert own.expandable_segments == theirs["expandable_segments"]
        assert own.garbage_collection_threshold == theirs["garbage_collection_threshold"]
        divisions = theirs.get("roundup_power2_divisions", {})
        assert own.roundup_power2_divisions == tuple(divisions[key] for key in divisions)
    assert seen
