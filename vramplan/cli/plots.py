"""``estimate --plot`` and ``measure --plot``: the charts of one job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vramplan.comparing import parts_of
from vramplan.files import write_text
from vramplan.prediction import Prediction, usable_bytes
from vramplan.report.charts import Bar, Line, job_chart
from vramplan.report.drawing import Chart
from vramplan.report.measured_charts import PhaseBar, phases_chart
from vramplan.report.series import stretches
from vramplan.timeline import Phase

if TYPE_CHECKING:
    from vramplan.gpus import Gpu
    from vramplan.record import Record


ORDER = [phase.value for phase in Phase]


def in_order(item: tuple[str, object]) -> int:
    """Where a phase comes in a run; those of other versions last."""
    return ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)


def plot_job(path: Path, prediction: Prediction, card: Gpu | None) -> None:
    """Draw where a predicted job's bytes go, and its step."""
    job, model = prediction.job, prediction.model
    title = f"{job.method} of {model.name}, batch {job.batch_size} of {job.seq_len} tokens"
    usable = usable_bytes(card) if card is not None else None
    lines = [Line(card.slug, usable)] if card is not None and usable is not None else []
    bar = Bar(job.method, parts_of(prediction))
    step = stretches(prediction.estimate.timeline)
    _write(path, job_chart("job", title, bar, step, lines))


def plot_run(path: Path, record: Record) -> None:
    """Draw a measured run's peaks phase by phase, beside what is predicted of them."""
    from vramplan.accuracy import phase_figures, predicted  # noqa: PLC0415 - needs pydantic

    told = {f.name: f.predicted for f in phase_figures(record, predicted(record))}
    bars = [
        PhaseBar(name, peak.peak_allocated_bytes, peak.peak_reserved_bytes, told.get(name))
        for name, peak in sorted(record.phases.items(), key=in_order)
    ]
    limit = record.run.limit_bytes
    room = None if limit is None else Line("limit", limit)
    title = f"{record.name} on {record.gpu.name or 'the CPU'}"
    _write(path, phases_chart("run", title, bars, room))


def _write(path: Path, chart: Chart) -> None:
    write_text(path, chart.standalone())
    print(f"written: {path}", file=sys.stderr)
