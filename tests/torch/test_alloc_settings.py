"""``PYTORCH_ALLOC_CONF`` as the installed torch reads it. Settings are a process's: one child."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vramplan.alloc_conf import parse_alloc_conf
from vramplan.errors import UsageError

TEXTS = (
    "",
    "expandable_segments:True",
    " expandable_segments : False , ",
    "expandable_segments:true",
    "max_split_size_mb:20",
    "max_split_size_mb:19",
    "max_split_size_mb:abc",
    "max_split_size_mb",
    "max_split_size_mb:",
    "max_non_split_rounding_mb:19",
    "garbage_collection_threshold:0.6",
    "garbage_collection_threshold:0",
    "garbage_collection_threshold:1.0",
    "large_segment_size_mb:10",
    "large_segment_size_mb:40,max_split_size_mb:40,max_non_split_rounding_mb:40",
    "max_split_size_mb:30,large_segment_size_mb:40",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:3",
    "roundup_power2_divisions:0",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "roundup_power2_divisions:[]",
    "roundup_power2_divisions:[256:3]",
    "roundup_power2_divisions:[255:4]",
    "roundup_power2_divisions:[256:1,512:2",
    "roundup_power2_divisions:4:8",
    "expandable_segments:[True]",
    "expandable_segments:True,,",
    "expandable_segments:True max_split_size_mb:40",
    "backend:native",
)
CODE = """
import json, sys, torch
def refused(text):
    try:
        # sizes are compared with large_segment_size_mb, which otherwise stays from text to text
        torch._C._accelerator_setAllocatorSettings(text)
    except (ValueError, RuntimeError):
        return True
    finally:
        torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")
    return False
print(json.dumps([refused(text) for text in json.load(sys.stdin)]))
"""
WORKER = """
import os, sys
os.environ["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:64"
from vramplan.measure.worker import set_allocator
print(set_allocator(""), set_allocator("expandable_segments:True"))
"""


def ours(text: str) -> bool:
    try:
        parse_alloc_conf(text)
    except UsageError:
        return True
    return False


def run(code: str, given: str = "") -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def test_the_same_texts_are_refused() -> None:
    theirs = json.loads(run(CODE, json.dumps(TEXTS)))
    assert {text: ours(text) for text in TEXTS} == dict(zip(TEXTS, theirs, strict=True))


@pytest.mark.parametrize("text", ["max_split_size_mb:40abc", "max_split_size_mb:-5"])
def test_what_torch_takes_by_accident_is_refused(text: str) -> None:
    assert json.loads(run(CODE, json.dumps([text]))) == [False]
    assert ours(text)


def test_a_worker_says_what_is_in_force() -> None:
    assert run(WORKER).split() == ["max_split_size_mb:64", "expandable_segments:True"]
