"""The allocator alone, against PyTorch's real one: every request's block, segment and count.

``tests/data/allocator-*.json.gz`` was written on a GPU by
``python -m vramplan.measure.allocator_probe``: the same requests under fourteen settings. The
recorded histories beside the records are whole training runs, with the segments they took.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from vramplan.accuracy import predicted
from vramplan.alloc_conf import parse_alloc_conf
from vramplan.allocator import Block, CachingAllocator, OutOfMemory
from vramplan.driver import AddressSpace
from vramplan.expandable import ExpandableAllocator
from vramplan.record import read_record
from vramplan.resources import profiles_dir

FILES = sorted((Path(__file__).parents[1] / "data").glob("allocator-*.json.gz"))
UNIT = 512
HISTORIES = sorted(
    path
    for path in (profiles_dir() / "calibrations" / "h100-sxm-80gb" / "runs").glob(
        "*.timeline.json.gz"
    )
    if "expandable" not in path.name  # the segments of its record are pages
)
SEARCHES = sorted(path for path in HISTORIES[0].parent.glob("*-smallest.json"))
# Segments taken some requests earlier or later: the driver keeps memory of its own in between,
# for kernels loaded while training runs.
MOVED = {
    "bloom-560m-qlora-2x512": 7,
    "falcon-rw-1b-lora-2x512": 1,
    "gemma-3-1b-qlora-2x1024": 22,
    "gpt-j-6b-qlora-1x512-history": 1,
    "gpt-j-6b-qlora-2x512-history": 2,
    "gpt2-full-8x512": 1,
    "llama-3.2-1b-qlora-1x512-int8": 2,
    "llama-3.2-1b-qlora-2x1024": 1,
    "pythia-1.4b-qlora-2x1024": 5,
    "qwen2.5-0.5b-qlora-2x512-no-checkpointing-eager": 12,
}
MISSED = {  # bytes, in one or two of its segments
    "bloom-560m-qlora-2x512": 16 * 1024**2,
    "gpt-j-6b-qlora-2x512-history": -64 * 1024**2,
}


@lru_cache
def recording(path: Path) -> dict[str, Any]:
    return dict(json.loads(gzip.decompress(path.read_bytes())))


def runs() -> list[Any]:
    found = [
        pytest.param(path, number, id=f"{run['sequence']}-{run['setting'] or 'default'}")
        for path in FILES
        for number, run in enumerate(recording(path)["runs"])
        if "error" not in run
    ]
    missing = pytest.mark.skip(reason="no recording of the allocator is shipped")
    return found or [pytest.param(None, 0, marks=missing)]


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
def test_every_address_the_driver_chose(path: Path) -> None:
    checked = 0
    for run in recording(path)["runs"]:
        if "error" in run or "expandable" in run["setting"]:
            continue
        space = AddressSpace()
        shift: int | None = None
        for _, action, units, size in run["segment_events"]:
            address = units * UNIT
            if action == "segment_free":
                assert shift is not None
                space.release(address - shift, size)
                continue
            own = space.place(size)
            shift = address - own if shift is None else shift
            assert own + shift == address
            checked += 1
    assert checked > 1500


class Logged(CachingAllocator):
    """Notes each segment it takes or gives back, as a history does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.log: list[tuple[int, int]] = []

    def _place(self, size: int) -> int:
        self.log.append((self.now, size))
        return super()._place(size)

    def _release(self, block: Block) -> None:
        self.log.append((self.now, -block.size))
        super()._release(block)


@pytest.mark.parametrize(
    "path", HISTORIES, ids=[path.name.removesuffix(".timeline.json.gz") for path in HISTORIES]
)
def test_the_segments_of_a_whole_run(path: Path) -> None:
    document = json.loads(gzip.decompress(path.read_bytes()))
    recorded = [tuple(segment) for segment in document["segments"]]
    emptied = {number for number, size in recorded if size < 0}  # by whom a history does not say
    allocator = Logged()
    live: dict[int, Block] = {}
    events = [event for section in document["sections"] for event in section["events"]]
    for number, (block, nbytes, *_) in enumerate(events):
        allocator.now = number
        if number in emptied:
            allocator.empty_cache()
        if nbytes > 0:
            live[block] = allocator.malloc(nbytes)
        else:
            allocator.free(live.pop(block))
    name = path.name.removesuffix(".timeline.json.gz")
    assert len(set(allocator.log) - set(recorded)) == MOVED.get(name, 0)
    assert name in MOVED or allocator.log == recorded
    assert allocator.reserved + MISSED.get(name, 0) == sum(size for _, size in recorded)


# Tries of recorded searches that the replay decides otherwise; all within 1 % of the border.
OTHERWISE = {
    "gpt-j-6b-qlora-1x512-smallest": 2,
    "llama-3.1-8b-qlora-2x1024-smallest": 1,
    "pythia-1.4b-qlora-2x1024-smallest": 1,
}


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_every_try_of_a_recorded_search(path: Path) -> None:
    record = read_record(path)
    assert record.limit_search is not None
    cache = predicted(record).cache
    found = [
        (limit, status)
        for limit, status in record.limit_search.tries
        if cache.runs_within(limit) != (status == "done")
    ]
    assert len(found) == OTHERWISE.get(path.stem, 0)
    least = record.limit_search.smallest_running_bytes
    assert all(abs(limit / least - 1) < 0.01 for limit, _ in found)
