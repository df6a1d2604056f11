"""What ``vramplan measure`` shows: measured beside predicted, and where the two part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vramplan.accuracy import figures, predicted
from vramplan.cli import output
from vramplan.evidence import read_timeline
from vramplan.record import Paging, Record, Spread
from vramplan.terms import compare
from vramplan.timeline import Timeline
from vramplan.units import format_bytes, format_rate, format_seconds

SCHEMA_VERSION = 1
MAX_TERMS = 30
STATUS_STYLES = {"done": "green", "oom": "red", "skipped": "yellow"}


def document(records: list[Record]) -> dict[str, Any]:
    """``measure --json``: every record, and the estimate beside it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "records": [record.model_dump(mode="json") for record in records],
        "comparisons": [
            {
                "name": record.name,
                "figures": {
                    figure.name.replace(" ", "_"): {
                        "measured_bytes": figure.measured,
                        "predicted_bytes": figure.predicted,
                        "error": figure.error,
                    }
                    for figure in figures(record, predicted(record))
                },
            }
            for record in records
        ],
    }


# -- one run -------------------------------------------------------------------------------------


def print_run(out: Console, record: Record) -> None:
    """One run at length."""
    out.print(headline(record))
    job = record.job
    out.print(
        f"{record.model}, {job['method']}, batch {job['batch_size']} x {job['seq_len']} tokens, "
        f"{job['optim']}, {record.run.num_steps} steps"
    )
    if record.error and record.status not in ("done", "oom"):
        out.print(Text(record.error.strip().splitlines()[-1], style="red"))
    out.print()
    if record.gpu.name is None:
        out.print("No GPU: its memory is not measured, only that it runs and how long it takes.")
    else:
        _print_figures(out, record)
    _print_phases(out, record)
    _print_speed(out, record)
    if record.paged_bytes:
        _print_paged(out, record)
    if record.paging is not None:
        _print_paging(out, record.paging)


def headline(record: Record) -> Text:
    """How it ended, in one line."""
    where = record.gpu.name or "the CPU"
    limit = record.run.limit_bytes
    if limit is not None:
        stands = f" ({record.run.emulated_gpu})" if record.run.emulated_gpu else ""
        where += f", held to {format_bytes(limit)}{stands}"
    style = f"bold {STATUS_STYLES.get(record.status, 'red')}"
    if record.status == "done":
        return Text(f"It ran on {where}.", style=style)
    if record.status == "oom" and record.oom is not None:
        failed = record.oom
        asked = f" asking for {format_bytes(failed.requested_bytes)}"
        text = f"Out of memory on {where}: in {failed.phase}"
        text += asked if failed.requested_bytes else ""
        text += f" in {failed.module}" if failed.module else ""
        text += f" ({failed.where})" if failed.where else ""
        return Text(text + ".", style=style)
    return Text(f"{record.status.capitalize()} on {where}, in {record.phase}.", style=style)


def _print_figures(out: Console, record: Record) -> None:
    table = output.plain_table(
        ("memory", "left"), ("measured", "right"), ("estimated", "right"), ("off by", "right")
    )
    for figure in figures(record, predicted(record)):
        error = figure.error
        table.add_row(
            figure.name,
            "not measured" if figure.measured is None else format_bytes(figure.measured),
            format_bytes(figure.predicted),
            "" if error is None else f"{error:+.2%}",
        )
    out.print(table)
    extra = [
        ("context", record.context_bytes),
        ("first step's peak", record.first_step_peak_allocated_bytes),
        ("asked for at the peak, unrounded", record.peak_requested_bytes),
        ("NVML, process", record.sampling.process_peak_bytes if record.sampling else None),
        ("NVML, card", record.sampling.card_peak_bytes if record.sampling else None),
        ("host RAM", record.host_rss_peak_bytes),
    ]
    out.print(
        Text(
            "; ".join(f"{name} {format_bytes(size)}" for name, size in extra if size is not None),
            style="dim",
        )
    )
    if record.num_alloc_retries or record.num_ooms:
        again = "once" if record.num_alloc_retries == 1 else f"{record.num_alloc_retries} times"
        out.print(f"The allocator gave back its cache and tried again {again}.")
    search = record.limit_search
    if search is not None:
        below = (
            f"not at {format_bytes(search.largest_failing_bytes, 3)}"
            if search.largest_failing_bytes is not None
            else "and at no smaller one tried"
        )
        out.print(
            f"Runs at a limit of {format_bytes(search.smallest_running_bytes, 3)}, {below} "
            f"({len(search.tries)} runs)."
        )
    out.print()


def _print_phases(out: Console, record: Record) -> None:
    phases = {
        name: peak for name, peak in record.phases.items() if peak.peak_allocated_bytes is not None
    }
    if not phases:
        return
    table = output.plain_table(("phase", "left"), ("allocated", "right"), ("reserved", "right"))
    for name, peak in phases.items():
        table.add_row(
            name, format_bytes(peak.peak_allocated_bytes), format_bytes(peak.peak_reserved_bytes)
        )
    out.print(table)
    out.print()


def _print_speed(out: Console, record: Record) -> None:
    if record.step_time_s is not None and record.tokens_per_s is not None:
        out.print(
            f"{_spread(record.step_time_s, format_seconds)} a step, "
            f"{_spread(record.tokens_per_s, lambda v: format_rate(v, 'tokens'))}"
        )
    seen = record.sampling
    if seen is not None:
        parts = [
            (seen.sm_clock_mhz, "MHz"), (seen.power_w, "W"), (seen.temperature_c, "C"),
        ]  # fmt: skip
        texts = [f"{part.median:.0f} {unit}" for part, unit in parts if part is not None]
        if seen.throttle_reasons:
            texts.append("held back by " + ", ".join(seen.throttle_reasons))
        if texts:
            out.print(Text(", ".join(texts), style="dim"))


def _spread(spread: Spread, form: Any) -> str:
    return f"{form(spread.median)} ({form(spread.minimum)} to {form(spread.maximum)})"


def _print_paged(out: Console, record: Record) -> None:
    out.print(
        f"Paged optimizer state: {format_bytes(record.paged_bytes)} in "
        f"{record.num_paged_tensors} tensors; too small to be paged: "
        f"{format_bytes(record.unpaged_bytes)} in {record.num_unpaged_tensors}."
    )


def _print_paging(out: Console, paging: Paging) -> None:
    out.print()
    if not paging.measured:
        out.print(Text(f"Paging events: not measured. {paging.reason}", style="yellow"))
        return
    table = output.plain_table(
        ("paging", "left"), ("to the card", "right"), ("to the host", "right"),
        ("GPU fault groups", "right"), ("CPU faults", "right"), ("major faults", "right"),
        ("thrashing", "right"),
    )  # fmt: skip
    for window in paging.windows:
        table.add_row(
            window.window,
            _moved(window.host_to_device_bytes),
            _moved(window.device_to_host_bytes),
            str(window.gpu_fault_groups),
            str(window.cpu_faults),
            "" if window.major_faults is None else str(window.major_faults),
            str(window.thrashing),
        )
    out.print(table)
    for window in paging.windows:
        if window.note:
            out.print(Text(f"{window.window}: {window.note}", style="yellow"))


def _moved(causes: dict[str, int]) -> str:
    if not sum(causes.values()):
        return "0"
    return ", ".join(f"{format_bytes(size)} ({cause})" for cause, size in causes.items() if size)


# -- many runs -------------------------------------------------------------------------------------


def print_runs(out: Console, records: list[Record]) -> None:
    """One row per run."""
    table = output.plain_table(
        ("run", "left"), ("ended", "left"), ("allocated", "right"), ("off by", "right"),
        ("reserved", "right"), ("smallest limit", "right"), ("tokens/s", "right"),
    )  # fmt: skip
    for record in records:
        peak = record.peak_allocated_bytes
        error = predicted(record).peak_allocated_bytes / peak - 1 if peak else None
        search = record.limit_search
        table.add_row(
            record.name,
            Text(record.status, style=STATUS_STYLES.get(record.status, "red")),
            _known(record.peak_allocated_bytes),
            "" if error is None else f"{error:+.2%}",
            _known(record.peak_reserved_bytes),
            _known(search.smallest_running_bytes if search else None),
            f"{record.tokens_per_s.median:,.0f}" if record.tokens_per_s else "",
        )
    out.print(table)


def _known(size: int | None) -> str:
    return "" if size is None else format_bytes(size)


# -- term by term ----------------------------------------------------------------------------------


def print_terms(out: Console, record: Record, path: Path) -> None:
    """Where measurement and estimate part at their peaks, term by term."""
    print_comparison(out, read_timeline(path), predicted(record).estimate.timeline, "measured")


def print_comparison(out: Console, measured: Timeline, estimated: Timeline, witness: str) -> None:
    """Where two timelines part at their peaks, term by term.

    Args:
        out: Where to print.
        measured: What was measured or traced.
        estimated: The estimate.
        witness: How to call the first.
    """
    peaks = [timeline.peak() for timeline in (measured, estimated)]
    out.print()
    out.print(Text("At the two peaks, by kind", style="bold"))
    out.print(
        f"{witness} in {peaks[0].phase} of {peaks[0].owner}, estimated in {peaks[1].phase} of "
        f"{peaks[1].owner}"
    )
    kinds = sorted(set(peaks[0].by_kind) | set(peaks[1].by_kind), key=lambda kind: kind.value)
    rows = [
        (kind.value.replace("_", " "), peaks[0].by_kind.get(kind, 0), peaks[1].by_kind.get(kind, 0))
        for kind in kinds
    ]
    _print_differences(out, ("kind", witness), [*rows, ("sum", peaks[0].nbytes, peaks[1].nbytes)])
    found = compare(measured, estimated)
    parts = [
        (f"{term.kind.replace('_', ' ')} of {term.owner}", term.measured, term.predicted)
        for term in found
        if term.predicted != term.measured
    ]
    out.print()
    if not parts:
        out.print("Every term is equal to the byte.")
        return
    out.print(
        Text(f"Terms that differ ({len(parts)} of {len(found)}), largest first", style="bold")
    )
    _print_differences(out, ("term", witness), parts[:MAX_TERMS])
    if len(parts) > MAX_TERMS:
        out.print(Text(f"{len(parts) - MAX_TERMS} smaller ones not shown", style="dim"))


def _print_differences(
    out: Console, heads: tuple[str, str], rows: list[tuple[str, int, int]]
) -> None:
    table = output.plain_table(
        (heads[0], "left"), (heads[1], "right"), ("estimated", "right"), ("difference", "right")
    )
    for name, measured, estimated in rows:
        table.add_row(
            name, format_bytes(measured), format_bytes(estimated),
            format_bytes(estimated - measured) if estimated != measured else "",
        )  # fmt: skip
    out.print(table)
