"""How right the estimates are: every recorded run beside its prediction.

``vramplan accuracy`` writes the accuracy record (``reports/accuracy.*``) from a card's records.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vramplan.calibrate import ninetieth
from vramplan.catalogue import model_from_config
from vramplan.errors import UnknownNameError
from vramplan.foretold import Foretold
from vramplan.gpus import Gpu, find_gpu
from vramplan.job import recorded_job
from vramplan.prediction import Prediction, predict
from vramplan.record import Record, read_record
from vramplan.timeline import BEFORE_TRAINING, Phase

REPEAT = "-repeat"
SPREAD = ("runs", "median", "off by, median", "90 % within", "worst", "which")
FIGURES = ("ready", "peak allocated", "peak reserved", "device peak", "smallest limit")


class Figure(NamedTuple):
    """One number that is both predicted and measured, in bytes."""

    name: str
    measured: int | None
    predicted: int

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus one; None where it was not measured."""
        return None if not self.measured else self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded run and its prediction.

    Attributes:
        record: The run.
        prediction: What the code says of it today.
        figures: What both have.
    """

    record: Record
    prediction: Prediction
    figures: tuple[Figure, ...]

    def error(self, figure: str) -> float | None:
        """Relative error of one figure; None where it was not measured."""
        return next((f.error for f in self.figures if f.name == figure), None)


def predicted(record: Record, *, evaluated: bool = False) -> Prediction:
    """The estimate of a recorded job on its card.

    Args:
        record: The run.
        evaluated: Whether with its evaluation, which the figures of its steps leave out.
    """
    gpu: Gpu | None = None
    if record.gpu.slug:
        try:
            gpu = find_gpu(record.gpu.slug)
        except UnknownNameError:
            gpu = None
    model = model_from_config(record.config, record.model)
    job = recorded_job(record)
    return predict(
        model,
        job.evaluated(record.run) if evaluated else job,
        gpu,
        random_weights=record.run.weights == "random",
    )


def figures(record: Record, prediction: Prediction | Foretold) -> tuple[Figure, ...]:
    """Every number that both have, and that means the same in both.

    Reserved memory is compared on a roomy card only, and the process's whole memory only where
    nothing but training happened in it. Random weights are not loaded as a checkpoint is, so their
    load peak says nothing.
    """
    run = record.run
    roomy = run.limit_bytes is None
    found = [Figure("ready", record.ready_bytes, prediction.ready_bytes)]
    if run.weights != "random" and not isinstance(prediction, Foretold):
        found.append(Figure("load", record.load_peak_bytes, prediction.replayed_load()[0]))
    found.append(
        Figure("peak allocated", record.peak_allocated_bytes, prediction.peak_allocated_bytes)
    )
    if roomy:
        found.append(
            Figure("peak reserved", record.peak_reserved_bytes, prediction.peak_reserved_bytes)
        )
    if roomy and not (run.evaluate or run.save or run.paging):
        found.append(Figure("device peak", record.device_peak_bytes, prediction.device_peak_bytes))
    if record.limit_search is not None:
        least = record.limit_search.smallest_running_bytes
        found.append(Figure("smallest limit", least, prediction.min_limit_bytes))
    if record.paged_bytes is not None:
        found.append(Figure("paged", record.paged_bytes, prediction.paged_bytes))
    if not isinstance(prediction, Foretold):  # what was written down says nothing of evaluations
        found += evaluation_figures(record)
    return tuple(found)


def evaluation_figures(record: Record) -> Iterator[Figure]:
    """The peaks of an evaluation, and what it leaves reserved for the training behind it."""
    if not record.run.evaluate:
        return
    planned = predicted(record, evaluated=True)
    allocated = planned.evaluate_peak_allocated_bytes
    measured = record.phases.get(Phase.EVALUATE.value)
    if measured is None or allocated is None:
        return
    yield Figure("evaluate", measured.peak_allocated_bytes, allocated)
    if record.run.limit_bytes is None and not record.num_alloc_retries:
        reserved = measured.peak_reserved_bytes
        yield Figure("reserved by evaluating", reserved, planned.peak_reserved_bytes)


def phase_figures(record: Record, prediction: Prediction) -> Iterator[Figure]:
    """The peaks of the first step, of the phases of later ones and of a save, in bytes."""
    first = prediction.first_step_peak_allocated_bytes
    if first is not None:
        yield Figure("first step", record.first_step_peak_allocated_bytes, first)
    for phase, size in prediction.phases().items():
        if phase not in BEFORE_TRAINING and phase in record.phases:
            yield Figure(phase, record.phases[phase].peak_allocated_bytes, size)


def rows(folder: Path) -> list[Row]:
    """Every record of a calibration folder with its prediction, by name."""
    found = []
    for path in sorted((folder / "runs").glob("*.json")):
        record = read_record(path)
        prediction = predicted(record)
        compared = (*figures(record, prediction), *phase_figures(record, prediction))
        found.append(Row(record, prediction, compared))
    return found


def errors_of(found: Iterable[Row], figure: str) -> dict[str, float]:
    """Relative errors of one figure by run, repeats of one job counted once."""
    return {
        row.record.name: error
        for row in distinct(found)
        if (error := row.error(figure)) is not None
    }


def distinct(found: Iterable[Row]) -> list[Row]:
    """The rows without the repeats of a job."""
    return [r for r in found if REPEAT not in r.record.name or r.record.name.endswith(f"{REPEAT}1")]


def percent(value: float, *, sign: bool = False) -> str:
    """A share for people."""
    return f"{100 * value:{'+' if sign else ''}.2f} %"


def spread(errors: dict[str, float]) -> tuple[str, ...]:
    """Count, signed median, then median, 90th percentile and worst of the absolute errors."""
    sizes = [abs(value) for value in errors.values()]
    worst = max(errors, key=lambda name: abs(errors[name]))
    return (
        str(len(errors)),
        percent(statistics.median(errors.values()), sign=True),
        percent(statistics.median(sizes)),
        percent(ninetieth(sizes)),
        percent(errors[worst], sign=True),
        worst,
    )
