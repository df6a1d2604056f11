"""``PYTORCH_ALLOC_CONF``, read as torch 2.11's ``AllocatorConfig.cpp`` reads it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.alloc_conf import INTERVALS, AllocatorSettings, parse_alloc_conf
from vramplan.errors import UsageError
from vramplan.job import Job
from vramplan.units import MIB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("expandable_segments:True", {"expandable_segments": True}),
        # ConfigTokenizer leaves out white space
        (" expandable_segments : True , ", {"expandable_segments": True}),
        # the last one counts
        ("expandable_segments:True,expandable_segments:False", {}),
        ("max_split_size_mb:128", {"max_split_bytes": 128 * MIB}),
        ("max_non_split_rounding_mb:64", {"max_non_split_rounding_bytes": 64 * MIB}),
        ("garbage_collection_threshold:0.6", {"garbage_collection_threshold": 0.6}),
        ("large_segment_size_mb:40", {"large_segment_bytes": 40 * MIB}),
        # parseRoundUpPower2Divisions: one number for all
        ("roundup_power2_divisions:4", {"roundup_power2_divisions": (4,) * INTERVALS}),
        # the first entry also rules what is smaller; > what is larger than the last
        (
            "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
            {"roundup_power2_divisions": (1,) * 9 + (2, 4) + (8,) * 5},
        ),
        # no entry, no rounding
        (
            "roundup_power2_divisions:[4:8,32:2]",
            {"roundup_power2_divisions": (8, 8, 8, 0, 0, 2) + (0,) * 10},
        ),
        ("roundup_power2_divisions:[]", {}),
        ("roundup_power2_divisions:[131072:2]", {"roundup_power2_divisions": (2,) * INTERVALS}),
        # nothing on the device depends on these
        ("pinned_use_background_threads:True,backend:native", {}),
    ],
)
def test_what_is_read(text: str, expected: dict[str, Any]) -> None:
    assert parse_alloc_conf(text) == AllocatorSettings(**expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "expandable_segment:True",
            "unknown setting in --alloc-conf 'expandable_segment'; did you mean "
            "expandable_segments or",
        ),
        (
            "expandable_segments:true",
            "--alloc-conf expandable_segments must be True or False, not 'true'",
        ),
        (
            "max_split_size_mb:19",
            "--alloc-conf max_split_size_mb must be at least 20 (large_segment_size_mb), not '19'",
        ),
        # wherever large_segment_size_mb stands
        (
            "max_split_size_mb:30,large_segment_size_mb:40",
            "--alloc-conf max_split_size_mb must be at least 40 (large_segment_size_mb), not '30'",
        ),
        (
            "max_split_size_mb:40abc",
            "--alloc-conf max_split_size_mb must be a whole number of MiB, not '40abc'",
        ),
        (
            "large_segment_size_mb:10",
            "--alloc-conf large_segment_size_mb must be above 10, not '10'",
        ),
        (
            "garbage_collection_threshold:1.0",
            "--alloc-conf garbage_collection_threshold must be between 0 and 1, not '1.0'",
        ),
        (
            "roundup_power2_divisions:3",
            "--alloc-conf roundup_power2_divisions must be a power of two, not '3'",
        ),
        (
            "roundup_power2_divisions:[255:4]",
            "--alloc-conf roundup_power2_divisions must be a list of MB:DIVISIONS with powers of "
            "two, not '[255:4]'",
        ),
        (
            "roundup_power2_divisions:[256:4",
            "--alloc-conf 'roundup_power2_divisions:[256:4': the list of roundup_power2_divisions "
            "has no end",
        ),
        (
            "max_split_size_mb",
            "--alloc-conf 'max_split_size_mb': max_split_size_mb needs a value, as in "
            "max_split_size_mb:VALUE",
        ),
        (
            "expandable_segments:True,,",
            "--alloc-conf 'expandable_segments:True,,': expected a name where ',' stands",
        ),
        (
            "roundup_power2_divisions:4:8",
            "--alloc-conf 'roundup_power2_divisions:4:8': expected a comma after the value of "
            "roundup_power2_divisions, not ':'",
        ),
        (
            "backend:cudaMallocAsync",
            "--alloc-conf backend must be native (no other is modelled), not 'cudaMallocAsync'",
        ),
        (
            "per_process_memory_fraction:0.5",
            "--alloc-conf per_process_memory_fraction: give the card's size instead (--memory, or "
            "--limit to measure)",
        ),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        Job(alloc_conf=text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("divisions", "asked", "given"),
    [
        # round_size without divisions: multiples of 512
        (0, 1, 512),
        (0, 513, 1024),
        (1, 3 * MIB + 1, 3 * MIB + 512),
        # roundup_power2_next_division: 1200 with 4 between 1024 and 2048 (the source's example),
        # in units large enough for it to be used
        (4, 1200 * 1024, 1280 * 1024),
        (4, 1280 * 1024, 1280 * 1024),
        (4, 65 * MIB, 80 * MIB),
        (2, 65 * MIB, 96 * MIB),
        (2, 64 * MIB, 64 * MIB),
        # up to 512 bytes a division it is left alone
        (4, 2048, 2048),
        (4, 2049, 2560),
        (4, 3 * 1024 + 1, 3 * 1024 + 512),
    ],
)
def test_rounding(divisions: int, asked: int, given: int) -> None:
    settings = AllocatorSettings(roundup_power2_divisions=(divisions,) * INTERVALS)
    assert settings.round_size(asked) == given


SETTINGS = st.lists(
    st.sampled_from([0, 1, 2, 4, 8, 16, 64]), min_size=INTERVALS, max_size=INTERVALS
).map(lambda divisions: AllocatorSettings(roundup_power2_divisions=tuple(divisions)))


@given(SETTINGS, st.integers(1, 1 << 37))
def test_sizes_rounded_to_512_round_alike(settings: AllocatorSettings, asked: int) -> None:
    given_size = settings.round_size(asked)
    assert given_size >= asked
    assert given_size % 512 == 0
    assert settings.round_size(-(-asked // 512) * 512) == given_size
    assert settings.round_size(given_size) == given_size
