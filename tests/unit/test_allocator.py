"""The rules of the caching allocator: torch 2.11's ``c10/cuda/CUDACachingAllocator.cpp``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vramplan.alloc_conf import AllocatorSettings, parse_alloc_conf
from vramplan.allocator import Block, CachingAllocator, OutOfMemory
from vramplan.catalogue import find_model
from vramplan.expandable import allocator_for
from vramplan.job import Job
from vramplan.prediction import predict
from vramplan.units import GIB, KIB, MIB

EXPANDABLE = "expandable_segments:True"
EMPTY = 0


class Watched:
    """Plays (name, bytes) requests, negative ones release, and sees what the driver is asked."""

    def __init__(self, conf: str = "", limit: int | None = None) -> None:
        self.allocator = allocator_for(parse_alloc_conf(conf), limit)
        self.live: dict[str, Block] = {}

    def play(self, requests: str) -> list[float]:
        """Requests such as ``a30 b1.5 -a empty``, sizes in MiB.

        Returns:
            MiB taken from the driver (negative: given back) by those that changed what is reserved.
        """
        changes = []
        for request in requests.split():
            before = self.allocator.reserved
            if request == "empty":
                self.allocator.empty_cache()
            elif request[0] == "-":
                self.allocator.free(self.live.pop(request[1:]))
            else:
                size = self.allocator.settings.round_size(int(float(request[1:]) * MIB))
                try:
                    self.live[request[0]] = self.allocator.malloc(size)
                except OutOfMemory:
                    changes.append(float("nan"))
                    continue
            if self.allocator.reserved != before:
                changes.append((self.allocator.reserved - before) / MIB)
        return changes


NONE = float("nan")


@pytest.mark.parametrize(
    ("conf", "limit", "requests", "expected", "rule"),
    [
        ("", None, "a1 b1", [2], "get_allocation_size: kSmallBuffer for up to kSmallSize"),
        ("", None, "a1.5 b9", [20], "kLargeBuffer below kMinLargeAlloc, split"),
        ("", None, "a10", [10], "from kMinLargeAlloc on a segment of its own"),
        ("", None, "a11", [12], "kRoundLarge"),
        ("", None, "a1.5 b0.5", [20, 2], "get_pool: small ones never from large segments"),
        ("", None, "a30 -a b29.5 c10", [30, 10], "should_split: 1 MiB or less stays"),
        ("", None, "a30 -a b19 c10", [30], "should_split: more than 1 MiB is split off"),
        ("", None, "a30 -a b20 c10 -b -c d30", [30], "free_block: neighbours merge"),
        ("", None, "a40 b20 -a -b c15", [40, 20], "get_free_block: the smallest that fits"),
        ("", None, "a30 -a empty", [30, -30], "release_blocks: whole segments go"),
        ("", None, "a4 b4 -a empty -b empty", [20, -20], "release_blocks: split ones stay"),
        ("", 50, "a30 -a b40", [30, 10], "malloc: release_cached_blocks, then retry"),
        ("", 50, "a30 b30", [30, NONE], "malloc: nothing to give back"),
        ("large_segment_size_mb:40", None, "a1.5", [40], "large_segment_size"),
        # max_split_size: a large block serves large requests only, and is not split
        ("max_split_size_mb:64", None, "a80 -a b30", [80, 30], "get_free_block: not oversize"),
        ("max_split_size_mb:64", None, "a80 -a b64 c10", [80, 10], "should_split: not oversize"),
        ("max_split_size_mb:64", None, "a90 -a b70", [90, 70], "max_non_split_rounding_size: 20"),
        ("max_split_size_mb:64", None, "a89 -a b70", [90, 70], "... of the segment"),
        ("max_split_size_mb:64", None, "a88 -a b70", [88], "... below it"),
        (
            "max_split_size_mb:64,max_non_split_rounding_mb:40",
            None,
            "a90 -a b70",
            [90],
            "max_non_split_rounding_size",
        ),
        # release_available_cached_blocks: one that is large enough, else from the largest on
        ("max_split_size_mb:64", 200, "a90 b30 -a -b c100", [90, 30, -20], "not enough: all go"),
        ("max_split_size_mb:64", 200, "a90 b70 -a -b c110", [90, 70, -50], "both oversize go"),
        ("max_split_size_mb:64", 200, "a120 b40 -a -b c90", [120, 40, -30], "a alone goes"),
        # garbage_collect_cached_blocks: above 0.5 x 100 MiB, of more than average age first
        (
            "garbage_collection_threshold:0.5",
            100,
            "a30 b12 c12 -a -c d12 -d e40",
            [30, 12, 12, 10],
            "a goes, what was c stays",
        ),
        ("garbage_collection_threshold:0.5", None, "a90 -a b91", [90, 92], "only with a limit"),
        # expandable segments
        (EXPANDABLE, None, "a1.5 b9 c10", [20, 20], "map_block: pages of 20 MiB"),
        (EXPANDABLE, None, "a1 b1 c1", [2, 2], "map_block: pages of 2 MiB"),
        (EXPANDABLE, None, "a30 -a b29.5 c10", [40], "should_split: to the byte"),
        (EXPANDABLE, None, "a30 -a b50", [40, 20], "try_allocate_expandable_block: it grows"),
        (EXPANDABLE, None, "a30 b30 -a c29 d2 e31", [40, 20, 20, 20], "grows at its free end"),
        (EXPANDABLE, None, "a30 b25 -a empty", [40, 20, -20], "unmap_block: whole pages"),
        (EXPANDABLE, None, "a30 b25 -a empty c25", [40, 20, -20, 20], "lowest address first"),
        (EXPANDABLE, 60, "a30 -a b55", [40, 20], "alloc_block compares the whole request"),
        (EXPANDABLE, 60, "a30 b30", [40, NONE], "... and refuses what would fit"),
        (EXPANDABLE, 80, "a30 b5 -a c50", [40, 40], "release_cached_blocks: 20 go, 60 come"),
        ("expandable_segments:True,max_split_size_mb:64", None, "a80 -a b30 c30", [80],
         "try_allocate_expandable_block takes what get_free_block would not"),
    ],
)  # fmt: skip
def test_rule(
    conf: str, limit: int | None, requests: str, expected: list[float], rule: str
) -> None:
    watched = Watched(conf, None if limit is None else limit * MIB)
    assert watched.play(requests) == pytest.approx(expected, nan_ok=True), rule


# -- properties ------------------------------------------------------------------------------------

CONFS = (
    "",
    EXPANDABLE,
    "max_split_size_mb:32",
    "garbage_collection_threshold:0.5",
    "roundup_power2_divisions:4",
    "max_split_size_mb:24,garbage_collection_threshold:0.3",
    "expandable_segments:True,roundup_power2_divisions:[1:8,8:2,>:4]",
)
SIZES = st.one_of(st.integers(1, 3 * KIB), st.integers(1, 3 * MIB), st.integers(1, 90 * MIB))
# a size to allocate, a number of a live block to release, or nothing: empty the cache
STEPS = st.lists(st.one_of(SIZES, st.integers(-60, -1), st.just(0)), max_size=60)


def whole(block: Block) -> Iterable[Block]:
    """The blocks of a block's segment."""
    while block.prev is not None:
        block = block.prev
    piece: Block | None = block
    while piece is not None:
        yield piece
        piece = piece.next


def check(allocator: CachingAllocator, live: list[Block]) -> None:
    """Blocks tile their segments, segments do not overlap, and the sums are right."""
    heads = {next(iter(whole(block))) for block in [*live, *allocator._blocks.values()]}
    spans = []
    mapped = 0
    for head in heads:
        pieces = list(whole(head))
        for before, after in itertools.pairwise(pieces):
            assert after.prev is before
            assert before.address + before.size == after.address
            assert not (before.free and after.free), "free neighbours are one"
        assert all(piece.size > 0 and piece.address % 512 == 0 for piece in pieces)
        spans.append((head.address, sum(piece.size for piece in pieces)))
        mapped += sum(piece.size for piece in pieces if piece.mapped)
    spans.sort()
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
    assert mapped == allocator.reserved <= allocator.peak_reserved
    assert sum(block.size for block in live) == allocator.allocated <= allocator.reserved
    free = [key >> 50 for pool in allocator._free for key in pool]
    assert allocator.allocated + sum(free) == allocator.reserved


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from(CONFS), st.sampled_from([None, 100 * MIB, 200 * MIB]))
def test_blocks_tile_their_segments(steps: list[int], conf: str, limit: int | None) -> None:
    allocator = allocator_for(parse_alloc_conf(conf), limit)
    page = allocator.settings.large_segment_bytes
    live: list[Block] = []
    for step in steps:
        if step > 0:
            try:
                live.append(allocator.malloc(allocator.settings.round_size(step)))
            except OutOfMemory:
                assert limit is not None
        elif step == 0:
            allocator.empty_cache()
        elif live:
            allocator.free(live.pop(step % len(live)))
        check(allocator, live)
        if limit is not None:
            slack = page if allocator.settings.expandable_segments else 0
            assert allocator.reserved < limit + slack + 1
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved == allocator.allocated == 0


@settings(max_examples=100, deadline=None)
@given(STEPS, SIZES, st.sampled_from(CONFS))
def test_a_block_that_was_released_is_found_again(steps: list[int], size: int, conf: str) -> None:
    allocator = allocator_for(parse_alloc_conf(conf))
    for step in steps:
        if step > 0:
            allocator.malloc(allocator.settings.round_size(step))
    nbytes = allocator.settings.round_size(size)
    block = allocator.malloc(nbytes)
    # a segment can come out as large as those kept for larger requests: PyTorch's own gap
    kept = nbytes < allocator.settings.max_split_bytes <= block.size
    assume(not kept or allocator.settings.expandable_segments)
    allocator.free(block)
    before = allocator.reserved
    allocator.malloc(nbytes)
    assert allocator.reserved == before


# -- in predictions --------------------------------------------------------------------------------


def test_a_prediction_follows_the_settings() -> None:
    model = find_model("gpt-j-6b")
    plain = predict(model, Job(batch_size=4))
    grown = predict(model, Job(batch_size=4, alloc_conf=EXPANDABLE))
    rounded = predict(model, Job(batch_size=4, alloc_conf="roundup_power2_divisions:4"))
    assert grown.estimate.peak_allocated_bytes == plain.estimate.peak_allocated_bytes
    assert grown.peak_reserved_bytes < plain.peak_reserved_bytes - GIB
    assert grown.min_limit_bytes < plain.min_limit_bytes
    assert rounded.peak_allocated_bytes > plain.peak_allocated_bytes
    assert rounded.ready_bytes > plain.ready_bytes
    assert sum(rounded.breakdown().values()) == rounded.peak_allocated_bytes


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_rounding_alone_never_takes_less(method: str) -> None:
    model = find_model("llama-3.2-1b")
    plain = predict(model, Job(method=method))
    rounded = predict(model, Job(method=method, alloc_conf="roundup_power2_divisions:2"))
    assert rounded.estimate.peak_allocated_bytes >= plain.estimate.peak_allocated_bytes


def test_settings_of_a_rounded_timeline() -> None:
    settings_ = AllocatorSettings(roundup_power2_divisions=(8,) * 16)
    model = find_model("llama-3.2-1b")
    walked = predict(model, Job(alloc_conf="roundup_power2_divisions:8")).estimate
    sizes = {event.nbytes for event in walked.timeline.events() if event.nbytes > 0}
    assert sizes == {settings_.round_size(size) for size in sizes}
