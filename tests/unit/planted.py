"""A recorded run, and the same run with a regression planted in it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from vramplan.resources import profiles_dir

RUNS = profiles_dir() / "calibrations" / "h100-sxm-80gb" / "runs"
NAME = "pythia-410m-full-2x512-no-checkpointing-history"
LOGITS_BYTES = 206045184  # one fp32 copy of the logits
WEIGHTS, ACTIVATIONS, LOGITS = 0, 4, 6  # kinds and phases as the timeline numbers them
LOAD, FORWARD, LOSS, BACKWARD, STEP = 0, 2, 3, 4, 5

Run = tuple[dict[str, Any], dict[str, Any]]


def recorded(name: str = NAME) -> Run:
    """A record and its timeline, as JSON."""
    with gzip.open(RUNS / f"{name}.timeline.json.gz", "rt", encoding="utf-8") as file:
        return json.loads((RUNS / f"{name}.json").read_text()), json.load(file)


def write(folder: Path, run: Run, name: str = NAME) -> Path:
    """The files of a run, as a measurement leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(run[0]))
    with gzip.open(path.with_suffix(".timeline.json.gz"), "wt", encoding="utf-8") as file:
        json.dump(run[1], file)
    return path


def _grow(record: dict[str, Any], nbytes: int, phases: Iterable[str]) -> None:
    for name in ("peak_allocated", "peak_reserved", "reserved_at_end", "device_used_at_end"):
        record[f"{name}_bytes"] += nbytes
    for phase in phases:
        record["phases"][phase]["peak_allocated_bytes"] += nbytes


def _rewrite(timeline: dict[str, Any], more: Callable[[list[int]], list[list[int]]]) -> None:
    section = timeline["sections"][0]
    section["events"] = [new for event in section["events"] for new in (event, *more(event))]


def extra_logits() -> Run:
    """The loss makes one more copy of the logits and keeps it for backward."""
    record, timeline = deepcopy(recorded())
    twins: dict[int, int] = {}
    made = 0

    def more(event: list[int]) -> list[list[int]]:
        nonlocal made
        block, nbytes, _, owner, phase, _ = event
        if nbytes == LOGITS_BYTES and phase == LOSS:
            made += 1
            if made % 3 == 2:  # the second of three is kept
                twins[block] = 900_000 + made
                return [[twins[block], nbytes, LOGITS, owner, phase, 1]]
        if nbytes < 0 and block in twins:
            return [[twins.pop(block), nbytes, LOGITS, owner, phase, 1]]
        return []

    _rewrite(timeline, more)
    _grow(record, LOGITS_BYTES, ("loss", "backward"))
    record["versions"]["transformers"] = "5.18.0"
    return record, timeline


def layer_keeps_activations(layer: str = "gpt_neox.layers.7.") -> Run:
    """One layer keeps a second copy of its activations until the step."""
    record, timeline = deepcopy(recorded())
    owners = {n for n, name in enumerate(timeline["owners"]) if name.startswith(layer)}
    kept: dict[int, list[int]] = {}
    most = number = 0

    def more(event: list[int]) -> list[list[int]]:
        nonlocal most, number
        _, nbytes, kind, owner, phase, _ = event
        if owner in owners and kind == ACTIVATIONS and phase == FORWARD and nbytes > 0:
            number += 1
            kept[910_000 + number] = event
            return [[910_000 + number, nbytes, kind, owner, phase, 1]]
        if phase == STEP and kept:
            most = sum(event[1] for event in kept.values())
            freed = [[block, -e[1], e[2], e[3], STEP, 1] for block, e in kept.items()]
            kept.clear()
            return freed
        return []

    _rewrite(timeline, more)
    _grow(record, most, ("forward", "loss", "backward"))
    return record, timeline


def load_doubled() -> Run:
    """The weights are there twice while they are loaded."""
    record, timeline = deepcopy(recorded())
    peak = record["load_peak_bytes"]
    record["load_peak_bytes"] = record["phases"]["load"]["peak_allocated_bytes"] = 2 * peak
    timeline["owners"].append("load")
    owner = len(timeline["owners"]) - 1
    events = timeline["sections"][0]["events"]
    end = next(n for n, event in enumerate(events) if event[4] != LOAD)
    events[end:end] = [
        [920_000, peak, WEIGHTS, owner, LOAD, 1],
        [920_000, -peak, WEIGHTS, owner, LOAD, 1],
    ]
    return record, timeline


def leaking() -> Run:
    """Every step leaves 1 % of the peak behind."""
    record, timeline = deepcopy(recorded())
    leak = record["peak_allocated_bytes"] // 100 // 512 * 512
    for number, step in enumerate(record["steps"]):
        step["begin_allocated_bytes"] += number * leak
    _grow(record, 3 * leak, ("forward", "loss", "backward", "step"))
    before = number = 0

    def more(event: list[int]) -> list[list[int]]:
        nonlocal before, number
        began, before = before == LOSS and event[4] == BACKWARD, event[4]
        if not began:
            return []
        number += 1
        return [[930_000 + number, leak, LOGITS, event[3], BACKWARD, 1]]

    _rewrite(timeline, more)
    return record, timeline
