"""Measured runs on a page: each beside its prediction, and where, when and with what it ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vramplan.comparison import Run
from vramplan.report.drawing import Chart
from vramplan.report.measured_charts import Point, residual_chart
from vramplan.report.page import Table, Toned
from vramplan.units import GIB, format_seconds

SYMBOLS = {"fits": "✓", "tight": "!", "no": "✗", "unknown": "?"}


def gib(nbytes: int | None) -> str:
    """GiB as a bare number, for columns that name the unit; empty where not known."""
    return "" if nbytes is None else f"{nbytes / GIB:,.2f}"


def residuals(runs: Sequence[Run], *, draw: bool) -> Table:
    """Every figure that is both measured and predicted."""
    points = [
        Point(run.record.name, figure.name, figure.measured, figure.predicted)
        for run in runs
        for figure in run.figures
        if figure.measured
    ]
    names = list(dict.fromkeys(point.figure for point in points))
    found = {(point.run, point.figure): point for point in points}
    rows = [(run.record.name, *_beside(run, names, found)) for run in runs]
    charts: tuple[Chart, ...] = ()
    if draw and points:
        charts = (residual_chart("residuals", "How far off each figure is", points),)
    return Table(
        "Measured beside predicted",
        ("run", *(part for name in names for part in (f"{name}, GiB", "off by")), "note"),
        tuple(rows),
        "Measured sizes. Off by: predicted over measured, minus one; above zero the prediction is "
        "too high, which is the safe side.",
        charts,
    )


def _beside(
    run: Run, names: Sequence[str], found: Mapping[tuple[str, str], Point]
) -> Iterable[str]:
    """Cells of one run: each figure's size and error, and why there is none."""
    for name in names:
        point = found.get((run.record.name, name))
        yield "" if point is None else gib(point.measured)
        yield "" if point is None else f"{point.error:+.2%}".replace("-", "\u2212")
    yield run.why_not


def measured(runs: Sequence[Run]) -> Table:
    """Every run: where, when, with what, and how it ended."""
    rows = []
    for run in runs:
        record = run.record
        time, rate = record.step_time_s, record.tokens_per_s
        rows.append(
            (
                record.name,
                run.card,
                Toned(f"{SYMBOLS['fits' if record.status == 'done' else 'no']} {run.ending}",
                      "fits" if record.status == "done" else "no"),
                gib(record.peak_allocated_bytes),
                gib(record.peak_reserved_bytes),
                format_seconds(time.median) if time else "",
                f"{rate.median:,.0f}" if rate else "",
                record.gpu.driver or "",
                record.versions.get("torch") or "",
                record.versions.get("transformers") or "",
                (record.commit or "")[:9],
                (record.created or "")[:10],
            )
        )  # fmt: skip
    headings = (
        "run", "card", "ended", "peak allocated, GiB", "peak reserved, GiB", "step", "tokens/s",
        "driver", "torch", "transformers", "commit", "date",
    )  # fmt: skip
    return Table("Measured runs", headings, tuple(rows), "Empty cells were not measured.")
