"""The tables of the accuracy record, from recorded runs and what is predicted of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vramplan.accuracy import (
    FIGURES,
    REPEAT,
    SPREAD,
    Row,
    distinct,
    errors_of,
    figures,
    percent,
    rows,
    spread,
)
from vramplan.accuracy_times import times
from vramplan.errors import RecordError
from vramplan.foretold import TRACES, Round, read, rounds
from vramplan.prediction import judge
from vramplan.record import Record
from vramplan.report.page import Page, Table
from vramplan.timefit import measured_step_time
from vramplan.units import MIB

NOTICEABLE = 0.01
PHASES = (
    "load", "first step", "forward", "loss", "backward", "step", "evaluate",
    "reserved by evaluating", "save",
)  # fmt: skip


def summary(found: Sequence[Row]) -> Table:
    """One row per figure; repeats of one job count once."""
    lines = [(name, *spread(errors)) for name in FIGURES if (errors := errors_of(found, name))]
    return Table("", ("figure", *SPREAD), tuple(lines))


def as_written(found: Sequence[Row], written: Round) -> list[Row]:
    """The runs that a file foretells, with its numbers in place of today's."""
    then = written.predictions
    return [
        Row(row.record, row.prediction, figures(row.record, then[row.record.name]))
        for row in found
        if row.record.name in then
    ]


def beforehand(found: Sequence[Row], written: Round) -> Table:
    """The errors of what was written down before the runs were measured."""
    times_then = {
        row.record.name: seconds / measured - 1
        for row in distinct(found)
        if (was := written.predictions.get(row.record.name)) is not None
        and (seconds := was.step_time_s) is not None
        and (measured := measured_step_time(row.record)) is not None
    }
    return Table(
        f"Predicted before they were measured, {written.created[:16].replace('T', ' ')} UTC",
        ("figure", *SPREAD),
        summary(as_written(found, written)).rows
        + ((("step time", *spread(times_then)),) if times_then else ()),
        "The predictions were committed before the runs were made. These are the errors of the "
        "predictions as they stood; what they taught is in all other tables.",
    )


def traces(found: Sequence[Row], written: Round) -> Table:
    """The errors of the second witness, as it was last asked."""
    return Table(
        "The trace, the second witness",
        ("figure", *SPREAD),
        summary(as_written(found, written)).rows,
        "transformers, peft, bitsandbytes and torch run on fake tensors, then the allocator's "
        f"replay (vramplan accuracy --traces, {written.created[:10]}). It loads weights as "
        "from_pretrained does; the runs made theirs on the card.",
    )


def too_low(found: Sequence[Row]) -> Table:
    """The dangerous side: predicted below measured."""
    lines = []
    for name in FIGURES:
        errors = errors_of(found, name)
        low = {run: error for run, error in errors.items() if error < -NOTICEABLE}
        high = [error for error in errors.values() if error > NOTICEABLE]
        if errors:
            worst = min(low, key=lambda run: low[run]) if low else ""
            lines.append(
                (
                    name,
                    str(len(errors)),
                    str(len(low)),
                    percent(low[worst], sign=True) if low else "",
                    worst,
                    str(len(high)),
                )
            )
    return Table(
        "Too low and too high",
        ("figure", "runs", "too low", "worst of them", "which", "too high"),
        tuple(lines),
        f"Runs whose prediction is off by more than {percent(NOTICEABLE)}. Too low is the "
        "dangerous side.",
    )


def groups(found: Sequence[Row]) -> Table:
    """Peak allocated by family, method and checkpointing."""
    keys: tuple[Callable[[Row], str], ...] = (
        lambda r: str(r.record.config["model_type"]),
        lambda r: str(r.record.job["method"]),
        lambda r: (
            "checkpointing" if r.record.job["gradient_checkpointing"] else "no checkpointing"
        ),
    )
    lines = [
        (name, *spread(errors))
        for key in keys
        for name in sorted({key(row) for row in found})
        if (errors := errors_of([row for row in found if key(row) == name], "peak allocated"))
    ]
    return Table("Peak allocated by kind of run", ("runs of", *SPREAD), tuple(lines))


def phases(found: Sequence[Row]) -> Table:
    """The peak of every phase."""
    lines = [(name, *spread(errors)) for name in PHASES if (errors := errors_of(found, name))]
    return Table(
        "Phase by phase",
        ("phase", *SPREAD),
        tuple(lines),
        "Allocated bytes, largest in the phase. Evaluation and saving happen behind the last step "
        "but one. Random weights are not loaded as a checkpoint is: loading is left out.",
    )


def left_out(found: Sequence[Row]) -> Table:
    """What the process holds beyond the allocator, from the other families' runs alone."""
    held = {
        row.record.name: (str(row.record.config["model_type"]), beyond)
        for row in distinct(found)
        if not (row.record.paged_bytes or row.record.run.paging)
        and (beyond := row.record.beyond_reserved_bytes) is not None
    }
    lines = []
    for family in sorted({name for name, _ in held.values()}):
        others = [size for name, size in held.values() if name != family]
        own = [size for name, size in held.values() if name == family]
        if others:
            fitted = statistics.median(others)
            off = max((size - fitted for size in own), key=abs)
            lines.append(
                (family, str(len(own)), f"{fitted / MIB:,.0f} MiB", f"{off / MIB:+,.0f} MiB")
            )
    return Table(
        "The calibrated constant, each family left out in turn",
        ("family", "runs", "fitted to the others", "worst of its own"),
        tuple(lines),
        "What a process holds beyond reserved memory (context, kernels, handles).",
    )


def emulated(found: Iterable[Row]) -> Table:
    """Runs on emulated cards: the verdict at their limit beside what happened."""
    lines = []
    for row in found:
        limit, prediction = row.record.run.limit_bytes, row.prediction
        if row.record.run.emulated_gpu is None or limit is None:
            continue
        # judged with the kernels of the card at work: all of its memory but this limit is process
        card = limit + prediction.device_peak_bytes - prediction.peak_reserved_bytes
        lines.append(
            (
                row.record.name,
                f"{limit // MIB} MiB",
                "yes" if row.record.status == "done" else "out of memory",
                judge(prediction, row.record.name, card).verdict,
                f"{prediction.peak_reserved_bytes // MIB} MiB",
                f"{prediction.min_limit_bytes // MIB} MiB",
            )
        )
    return Table(
        "Emulated cards",
        ("run", "limit", "ran", "verdict", "would reserve", "predicted smallest limit"),
        tuple(lines),
        "The allocator was held to what the card's driver reports, less the CUDA context, kernels "
        "and paged state. Kernels are the H100's.",
    )


def limits(found: Iterable[Row]) -> Table:
    """Searched limits: the bracket, and what was predicted."""
    lines = []
    for row in found:
        search = row.record.limit_search
        if search is None:
            continue
        failing = search.largest_failing_bytes
        lines.append(
            (
                row.record.name.removesuffix("-smallest"),
                f"{search.smallest_running_bytes // MIB} MiB",
                "none failed" if failing is None else f"{failing // MIB} MiB",
                str(len(search.tries)),
                f"{row.prediction.min_limit_bytes // MIB} MiB",
            )
        )
    return Table(
        "The smallest limit",
        ("job", "runs at", "does not at", "runs tried", "predicted smallest limit"),
        tuple(lines),
        "Found by running at one limit after another. Under a limit the outcome is not always "
        "monotone: a job can fail a little above a limit at which it runs.",
    )


def repeats(found: Iterable[Row]) -> Table:
    """Repeated runs: do they agree, and how far do step times spread."""
    jobs: dict[str, list[Record]] = {}
    for row in found:
        name, mark, _ = row.record.name.partition(REPEAT)
        if mark:
            jobs.setdefault(name, []).append(row.record)
    lines = []
    for name, records in sorted(jobs.items()):
        times = [r.step_time_s.median for r in records if r.step_time_s is not None]
        lines.append(
            (
                name,
                str(len(records)),
                _agreement(r.peak_allocated_bytes for r in records),
                _agreement(r.peak_reserved_bytes for r in records),
                f"{min(times) * 1000:.0f} to {max(times) * 1000:.0f} ms",
            )
        )
    return Table(
        "The same run again",
        ("job", "repeats", "peak allocated", "peak reserved", "step time, medians"),
        tuple(lines),
    )


def _agreement(sizes: Iterable[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    if len(set(known)) == 1:
        return f"{known[0]:,} bytes, equal"
    return f"{min(known):,} to {max(known):,} bytes"


def paging(found: Iterable[Row]) -> Table:
    """What unified memory moved."""
    lines = []
    for row in found:
        seen = row.record.paging
        if seen is None:
            continue
        state = f"{row.record.paged_bytes or 0:,}"
        if not seen.measured:
            lines.append((row.record.name, state, f"not measured: {seen.reason}", "", ""))
            continue
        names = [window.window for window in seen.windows]
        saved = names.index("save") if "save" in names else len(names)
        moved = [
            (sum(w.host_to_device_bytes.values()), sum(w.device_to_host_bytes.values()))
            for w in seen.windows
        ]
        before = f"{sum(sum(both) for both in moved[:saved]):,}"
        around = ("no save", "")
        if saved < len(names):
            around = (f"{moved[saved][1]:,}", f"{moved[saved + 1][0]:,}")
        lines.append((row.record.name, state, before, *around))
    return Table(
        "Paging events",
        ("run", "paged", "steps before the save", "save, to the host", "next step, to the card"),
        tuple(lines),
        "Bytes as CUPTI counted them, with a canary buffer seen to the byte before and after. "
        "Without memory pressure nothing moves; a save reads the state on the host, and the next "
        "step brings it back.",
    )


def details(found: Iterable[Row]) -> Table:
    """One row per run."""
    lines = []
    for row in found:
        if not row.record.peak_allocated_bytes:
            continue
        cells = [row.record.name]
        for name in FIGURES:
            figure = next((f for f in row.figures if f.name == name and f.measured), None)
            cells += (
                ["", ""]
                if figure is None or figure.measured is None or figure.error is None
                else [f"{figure.measured / MIB:.1f}", percent(figure.error, sign=True)]
            )
        lines.append(tuple(cells))
    headings = [part for name in FIGURES for part in (f"{name}, MiB", "error")]
    return Table("Every run", ("run", *headings), tuple(lines), "Measured, and how far off.")


def accuracy_page(folder: Path) -> Page:
    """The whole accuracy record of a card's calibration folder."""
    found = rows(folder)
    if not found:
        raise RecordError(f"{folder / 'runs'} holds no records")
    record = found[0].record
    versions = ", ".join(
        f"{name} {version}" for name, version in record.versions.items() if name != "vramplan"
    )
    return Page(
        f"Accuracy on {record.gpu.name}",
        f"Stock transformers.Trainer, random weights; driver {record.gpu.driver}, {versions}. "
        f"Made by: vramplan accuracy. The runs by: {record.command}. All have been looked at "
        "since; what was predicted beforehand has tables of its own. Errors are predicted over "
        "measured, minus one.",
        tuple(
            table
            for table in (
                summary(found),
                *(beforehand(found, written) for written in rounds(folder)),
                *([traces(found, read(folder / TRACES))] if (folder / TRACES).exists() else []),
                *(
                    make(found)
                    for make in (too_low, groups, phases, left_out, emulated, limits, repeats)
                ),
                *times(found),
                *(make(found) for make in (paging, details)),
            )
            if table.rows
        ),
    )
