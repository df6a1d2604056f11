"""A record, with the timeline beside it, as a Measurement that can be compared."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vramplan.errors import RecordError
from vramplan.job import EVALUATION, Job
from vramplan.names import owner_of
from vramplan.record import Record
from vramplan.regression import Holdings, Measurement, surplus
from vramplan.timeline import BEFORE_TRAINING, Phase, Timeline, timeline_from_document
from vramplan.units import format_bytes

MAX_TIMELINE_BYTES = 512 * 1024**2
TIMELINE_SUFFIX = ".timeline.json.gz"
TOLD = ("device", "limit_bytes", "emulated_gpu", "timeout_s")  # by ``where``; or it tells nothing


def timeline_path(path: Path) -> Path:
    """Where the timeline of a record's file lies, if there is one."""
    return path.with_suffix(TIMELINE_SUFFIX)


def read_timeline(path: Path) -> Timeline:
    """A recorded timeline.

    Raises:
        RecordError: If it is missing, broken or too large.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = file.read(MAX_TIMELINE_BYTES + 1)
        if len(text) > MAX_TIMELINE_BYTES:
            raise RecordError(f"{path} is larger than any timeline")
        return timeline_from_document(json.loads(text), str(path))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise RecordError(f"{path} cannot be read as a timeline: {error}") from None


def measurement(record: Record, timeline: Timeline | None = None) -> Measurement:
    """What a record says, in the form that two of them are compared in.

    Args:
        record: The run.
        timeline: Its recorded history, which knows the modules.

    Known limitations:
        A timeline ends with the second step: what an evaluation or a save holds, no module answers
        for.
    """
    modules: dict[str, Any] = {} if timeline is None else _modules(timeline)
    return Measurement(
        name=record.name,
        figures={name: size for name, size in _figures(record) if size is not None},
        repeats=_times(record),
        phases={
            name: peak.peak_allocated_bytes
            for name, peak in record.phases.items()
            if peak.peak_allocated_bytes is not None
        },
        where=_where(record),
        versions=dict(_versions(record)),
        failed=_failed(record),
        oom=record.status == "oom",
        **modules,
    )


# -- figures ---------------------------------------------------------------------------------------


def _figures(record: Record) -> Iterator[tuple[str, int | None]]:
    """Every figure in bytes; None where it was not measured."""
    yield "load", record.load_peak_bytes
    yield "ready", record.ready_bytes
    yield "allocated", record.peak_allocated_bytes
    search = record.limit_search
    if search is None:  # a search ends at its limit, whatever a roomy card would have reserved
        yield "reserved", record.peak_reserved_bytes
        held = record.device_peak_bytes
        yield "device", None if held is None or held < 0 else held
    else:
        yield "min_limit", search.smallest_running_bytes
    for phase in ("evaluate", "save"):
        if phase in record.phases:
            yield phase, record.phases[phase].peak_allocated_bytes
    yield "per_step", _per_step(record)
    yield "paged", record.paged_bytes
    if record.paging is not None and record.paging.measured:
        yield (
            "paging",
            sum(
                sum(window.host_to_device_bytes.values())
                + sum(window.device_to_host_bytes.values())
                for window in record.paging.windows
            ),
        )
    yield "host_ram", record.host_rss_peak_bytes


def _per_step(record: Record) -> int | None:
    """By how many bytes each step began fuller than the one before, from the second on.

    The lower median: an evaluation or a save adds to one step alone.
    """
    begun = [step.begin_allocated_bytes for step in record.steps[1:]]
    known = [size for size in begun if size is not None]
    if len(known) < 2 or len(known) < len(begun):
        return None
    return statistics.median_low(b - a for a, b in itertools.pairwise(known))


def _times(record: Record) -> dict[str, tuple[float, ...]]:
    """One value a run: its steps are no repeats of each other."""
    spreads = {"tokens_per_s": record.tokens_per_s, "seconds": record.step_time_s}
    return {name: (spread.median,) for name, spread in spreads.items() if spread is not None}


# -- conditions ------------------------------------------------------------------------------------


def _where(record: Record) -> dict[str, str]:
    run = record.run
    limit = "none" if run.limit_bytes is None else format_bytes(run.limit_bytes)
    if record.limit_search is not None:
        limit = "the smallest"
    elif run.emulated_gpu is not None:
        limit = f"as {run.emulated_gpu}"
    return {
        "GPU": record.gpu.slug or record.gpu.name or "none",
        "device": run.device,
        "limit": limit,
        "allocator": record.allocator_settings or "default",
    }


def _versions(record: Record) -> Iterator[tuple[str, str]]:
    """Everything else that decides the figures: libraries, driver, model, job and conditions."""
    for name, version in record.versions.items():
        yield name, version or "none"
    yield "driver", record.gpu.driver or "none"
    yield "model", record.model
    job = asdict(Job()) | record.job  # a record may be older than a field
    for name in (
        "alloc_conf",
        *EVALUATION,
    ):  # the setting in force, and the run's evaluation, count
        job.pop(name, None)
    run = record.run.model_dump(exclude=set(TOLD))
    for group, fields in (("config", record.config), ("job", job), ("run", run)):
        for name, value in fields.items():
            yield f"{group}.{name}", _text(value)
    if record.run.emulated_gpu is not None and record.limit_search is None:
        yield "limit", format_bytes(record.run.limit_bytes)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _failed(record: Record) -> str:
    """How the run ended if it did not end well."""
    if record.status == "done":
        return ""
    lines = (record.error or "").strip().splitlines()
    if record.status == "skipped":
        return f"skipped: {lines[-1] if lines else 'no reason given'}"
    if record.status != "oom":
        where = f" in {record.phase}" if record.phase else ""
        return f"{record.status}{where}" + (f": {lines[-1]}" if lines else "")
    oom = record.oom
    if oom is None:
        return out_of_memory(record.phase)
    module = owner_of(oom.module) if oom.module else ""
    return out_of_memory(oom.phase, module, oom.requested_bytes)


def out_of_memory(phase: str | None, module: str = "", requested_bytes: int | None = None) -> str:
    """An allocation that failed, in words, as far as it is known."""
    text = "out of memory" + (f" in {phase}" if phase else "")
    text += f" of {module}" if module else ""
    if requested_bytes is not None:
        text += f", asking for {format_bytes(requested_bytes)}"
    return text


# -- modules ---------------------------------------------------------------------------------------


def _modules(timeline: Timeline) -> dict[str, Any]:
    """The holdings of a timeline, as fields of a Measurement."""
    peak = timeline.peak(by_layer=True).by_kind_and_owner
    found: dict[str, Any] = {"peak": {(k.value, owner): size for (k, owner), size in peak.items()}}
    if any(s.repeats != 1 for s in timeline.sections) or any(
        e.copies != 1 for e in timeline.events()
    ):
        return found  # moments are looked for in what was recorded one by one
    marks = moments(timeline)
    snapshots = snapshots_at(timeline, set(marks.values()))
    begun, ended = (snapshots.get(marks.get(name, -1), {}) for name in ("step 1", "end"))
    return found | {
        "ready": snapshots.get(marks.get("ready", -1), {}),
        "left": surplus(ended, begun) if begun else {},
        "moments": {
            phase.value: snapshots[marks[phase.value]] for phase in Phase if phase.value in marks
        },
    }  # fmt: skip


def moments(timeline: Timeline) -> dict[str, int]:
    """Name of a moment -> how many events came before it.

    The fullest of each phase, "ready" to train, the end of "step 1", and the "end".
    """
    marks: dict[str, int] = {}
    fullest: dict[Phase, int] = {}
    live = number = 0
    stepped = False
    for number, event in enumerate(timeline.events()):
        if event.phase not in BEFORE_TRAINING:
            marks.setdefault("ready", number)
        stepped = stepped or event.phase is Phase.STEP
        if stepped and event.phase is not Phase.STEP:
            marks.setdefault("step 1", number)
        live += event.nbytes
        if live > fullest.get(event.phase, 0):
            fullest[event.phase] = live
            marks[event.phase.value] = number + 1
    marks["end"] = number + 1
    return marks


def snapshots_at(timeline: Timeline, wanted: set[int]) -> dict[int, Holdings]:
    """What every module held after so many events."""
    live: dict[tuple[str, str], int] = {}
    found: dict[int, Holdings] = {}
    for number, event in enumerate(timeline.events(), start=1):
        key = (event.kind.value, event.owner)
        live[key] = live.get(key, 0) + event.nbytes
        if number in wanted:
            found[number] = {key: size for key, size in live.items() if size}
    return found


# -- repeats ---------------------------------------------------------------------------------------


def merged(name: str, repeats: Sequence[Measurement]) -> Measurement:
    """The repeats of one measurement as one.

    Args:
        name: What they have in common.
        repeats: At least one.

    Returns:
        The fullest of them, with the highest of every figure and every time; if one ran out of
        memory or failed, that.

    Raises:
        RecordError: If they are not of the same job, versions and place.
    """
    first = repeats[0]
    for other in repeats[1:]:
        for before, after in ((first.where, other.where), (first.versions, other.versions)):
            differ = [what for what in {**before, **after} if before.get(what) != after.get(what)]
            if differ:
                raise RecordError(
                    f"{first.name} and {other.name} are no repeats of one run: they differ in "
                    f"{', '.join(differ[:3])}; give them names of their own"
                )
    failed = next((m for m in sorted(repeats, key=lambda m: not m.oom) if m.failed), None)
    known = [m for m in repeats if m.peak] or repeats
    fullest = max(known, key=lambda m: m.figures.get("allocated", 0))
    return replace(
        fullest,
        name=name,
        figures=_highest(m.figures for m in repeats),
        phases=_highest(m.phases for m in repeats),
        repeats={
            metric: tuple(value for m in repeats for value in m.repeats.get(metric, ()))
            for metric in dict.fromkeys(metric for m in repeats for metric in m.repeats)
        },
        failed=failed.failed if failed else "",
        oom=failed is not None and failed.oom,
    )


def _highest(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for own in sizes:
        for name, size in own.items():
            found[name] = max(size, found.get(name, size))
    return found
