"""No false alarm: jobs that were measured again and again on an H100, nothing changed.

``tests/data/unchanged``: the matrix, and every record of it in one file.
"""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vramplan.evidence import measurement, merged
from vramplan.record import Record, parse_record
from vramplan.regression import MIN_REPEATS, Measurement, check, thresholds

FILE = Path(__file__).parents[1] / "data" / "unchanged" / "h100.json.gz"
EXACT = (
    "load",
    "ready",
    "allocated",
    "reserved",
    "device",
    "evaluate",
    "save",
    "per_step",
    "paged",
)


def jobs() -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for document in json.loads(gzip.decompress(FILE.read_bytes())):
        record = parse_record(document, document["name"])
        found.setdefault(record.name.rpartition("-repeat")[0], []).append(record)
    return found


JOBS = jobs()


def repeats(name: str) -> list[Measurement]:
    return [replace(measurement(record), name=name) for record in JOBS[name]]


def test_five_jobs_twenty_times_and_a_baseline() -> None:
    assert len(JOBS) == 5
    assert all(len(records) == 21 for records in JOBS.values())
    assert all(record.status == "done" for records in JOBS.values() for record in records)


@pytest.mark.parametrize("name", JOBS)
def test_no_run_is_called_worse_or_better(name: str) -> None:
    baseline, *others = repeats(name)
    assert {check(other, baseline, thresholds("")).outcome for other in others} == {"same"}


@pytest.mark.parametrize("name", JOBS)
def test_not_even_where_a_byte_is_too_much(name: str) -> None:
    """Why thresholds can be as low as they are."""
    strict = thresholds(",".join(f"{figure}:0" for figure in EXACT))
    baseline, *others = repeats(name)
    assert {check(other, baseline, strict).outcome for other in others} == {"same"}


def slower(size: int) -> tuple[int, int]:
    """Pairs of so many runs in a row, and those that are called slower (or faster) by 10 %."""
    pairs = alarms = 0
    for name in JOBS:
        found = repeats(name)
        groups = [
            merged(name, found[at : at + size]) for at in range(0, len(found) - size + 1, size)
        ]
        for before, after in itertools.permutations(groups, 2):
            pairs += 1
            alarms += check(after, before, thresholds("")).outcome != "same"
    return pairs, alarms


def test_no_pair_of_five_is_called_slower() -> None:
    pairs, alarms = slower(MIN_REPEATS)
    assert pairs >= 48 and alarms == 0


def test_three_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramplan.regression.MIN_REPEATS", 3)
    pairs, alarms = slower(3)
    assert pairs >= 170 and alarms > 0
