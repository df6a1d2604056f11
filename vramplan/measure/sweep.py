"""Many runs into one folder: one atomic record each, resumed after whatever ended the last try."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vramplan.catalogue import model_from_config
from vramplan.errors import RecordError
from vramplan.files import provenance, write_whole
from vramplan.measure.harness import Harness, Outcome
from vramplan.measure.limit import RESOLUTION_BYTES, find_limit
from vramplan.measure.spec import RunSpec
from vramplan.prediction import predict
from vramplan.record import (
    Record,
    parse_record,
    read_record,
    write_record,
)
from vramplan.units import format_bytes

HOPELESS = 1.1  # skip only what the estimate puts this far above the memory there is
FINAL = ("done", "oom", "skipped")  # anything else is tried again


@dataclass(frozen=True, slots=True)
class Work:
    """One record to make.

    Attributes:
        spec: The run.
        find_limit: Whether to look for its smallest limit.
        resolution_bytes: How closely.
        may_skip: Whether an estimate may say that it need not be tried.
    """

    spec: RunSpec
    find_limit: bool = False
    resolution_bytes: int = RESOLUTION_BYTES
    may_skip: bool = False


def record_path(folder: Path, name: str) -> Path:
    """Where the record of that name lies."""
    return folder / f"{name}.json"


def finished(folder: Path, work: Work) -> Record | None:
    """The record of this very run, if an earlier call finished it.

    Raises:
        RecordError: If the file is another run's, or broken: nothing is overwritten.
    """
    path = record_path(folder, work.spec.name)
    if not path.exists():
        return None
    record = read_record(path)
    searched = record.limit_search is not None
    same = (
        dataclasses.replace(work.spec, limit_bytes=record.run.limit_bytes)
        if work.find_limit
        else work.spec
    ).is_run_of(record)
    if not same or searched != (work.find_limit and record.status == "done"):
        raise RecordError(
            f"{path} is the record of another run; choose another folder with --output, another "
            "name, or --force to replace it"
        )
    return record if record.status in FINAL else None


def perform(
    harness: Harness, work: Work, folder: Path, *, tell: Callable[[str], None] = lambda _: None
) -> Record:
    """Make one record and write it.

    Args:
        harness: Where it runs.
        work: What to run.
        folder: Where the record goes.
        tell: Receives progress of a search.
    """
    reason = None
    if work.may_skip:
        reason = hopeless(harness, work) or harness.refusal(work.spec)
    if reason is not None:
        outcome = Outcome(skipped(work.spec, reason))
    elif work.find_limit:
        model = model_from_config(work.spec.config, work.spec.model)
        outcome = find_limit(
            harness.run,
            work.spec,
            guess_bytes=predict(model, work.spec.job).min_limit_bytes,
            resolution_bytes=work.resolution_bytes,
            most_bytes=harness.gpu.total_bytes if harness.gpu else None,
            tell=tell,
        )
    else:
        outcome = harness.run(work.spec)
    path = record_path(folder, outcome.record.name)
    if outcome.timeline is not None:
        write_whole(path.with_suffix(".timeline.json.gz"), outcome.timeline)
    write_record(path, outcome.record)
    return outcome.record


def hopeless(harness: Harness, work: Work) -> str | None:
    """Why an estimate says that a run need not be tried; None if it should be."""
    spec = work.spec
    if harness.gpu is None or work.find_limit:
        return None
    prediction = predict(model_from_config(spec.config, spec.model), spec.job)
    room = spec.limit_bytes or harness.gpu.total_bytes - prediction.process_bytes
    needed = prediction.min_limit_bytes
    if needed <= room * HOPELESS:
        return None
    return (
        f"the estimate needs at least {format_bytes(needed)} of {format_bytes(room)} "
        "(--no-skip runs it all the same)"
    )


def skipped(spec: RunSpec, reason: str) -> Record:
    """The record of a run that was not tried."""
    document = spec.record_document("skipped") | {"error": reason}
    return parse_record(document | provenance(), spec.name)


def unused_name(folder: Path, name: str) -> str:
    """The name itself, or the first numbered one that no record has."""
    candidate, number = name, 1
    while record_path(folder, candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def clean(folder: Path) -> None:
    """Remove what a killed run left half written."""
    for path in folder.glob(".*.json.*"):
        path.unlink(missing_ok=True)


def exit_code(records: Iterable[Record]) -> int:
    """0 if every run ended well, 1 if one ran out of memory, 2 if one could not be measured."""
    statuses = {record.status for record in records}
    if statuses & {"error", "killed", "timeout"}:
        return 2
    return 1 if "oom" in statuses else 0
