"""Measured step times -> the rates of a host and a card, with their residuals.

A least-squares fit of few constants over all runs of a card. Nothing in it knows a model or a
family; each family is left out in turn to see how well the others tell its times.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vramplan.catalogue import model_from_config
from vramplan.estimate import DEFAULT_CAPABILITY, Estimate, estimate
from vramplan.job import Job
from vramplan.record import Record
from vramplan.timing import Rates, at_pace, step_time

# What is fitted, with the order of magnitude to begin from; the rest of the rates are measured in
# loops of their own (``measure/rates.py``).
START = {
    "operation_s": 30e-6,
    "quantised_call_s": 200e-6,
    "micro_step_s": 10e-3,
    "fp32_flops_per_s": 20e12,
    "attention_flops_per_s": 200e12,
    "moved_bytes_per_s": 2e12,
    "dequantised_per_s": 0.5e12,
    "updated_8bit_per_s": 50e9,
    "pace_exponent": 1.0,
}
MEASURED = ("launch_overhead_s", "thin_flops_per_s")
# A constant that the runs say nothing about stays at its start: weight of a factor e away from it,
# against a run that is off by its whole time.
PULL = 0.003
OUTLIER = 0.2  # a run that is off by more counts as if its square grew in a straight line
STEP = 0.02  # of the numerical derivative, in logarithms
MAX_ROUNDS = 40
ENOUGH = 1e-6
MIN_RUNS = 20
# The loop at the end of the run before tells the host's pace when this one began, if it began
# within so many seconds.
JUST_BEFORE_S = 30
MIN_FAMILIES = 3


@dataclass(frozen=True, slots=True)
class Timed:
    """A recorded run that tells a step time.

    Attributes:
        name: Name of the run.
        family: Its model family.
        job: Its job.
        walked: The walk of the job.
        measured_s: Median of its steps after the first, in seconds.
        launch_overhead_s: What the host took to launch an operation around it; None if unknown.
    """

    name: str
    family: str
    job: Job
    walked: Estimate
    measured_s: float
    launch_overhead_s: float | None


class TimeFit(NamedTuple):
    """Fitted rates.

    Attributes:
        runs: The runs.
        rates: From all of them.
        without: From all runs but those of one family, by that family.
        ratios: Predicted over measured of every run, by the rates without its family, at the
            host's usual pace.
        at_pace: The same at the pace that the host was seen to have; runs whose host's is unknown
            are left out.
    """

    runs: Sequence[Timed]
    rates: Rates
    without: Mapping[str, Rates]
    ratios: Mapping[str, float]
    at_pace: Mapping[str, float]


def measured_step_time(record: Record) -> float | None:
    """Median of a run's steps after the first, in seconds; None where something else slowed them.

    Recording the allocator's history and counting paging events slow every step, retries of the
    allocator those in which they happen, a save or an evaluation the one behind it.
    """
    run = record.run
    if record.status != "done" or run.device != "cuda" or run.history or run.paging:
        return None
    if record.num_alloc_retries:
        return None
    steps = record.steps[1:-1] if run.evaluate or run.save else record.steps[1:]
    times = [step.time_s for step in steps if step.time_s is not None]
    return statistics.median(times) if times else None


def launch_overheads(records: Sequence[Record]) -> dict[str, float]:
    """Seconds of one launch on the host, around each run that tells it.

    The mean (geometric) of the loop at the end of the run and of the one at the end of the run
    just before it.
    """
    loops = sorted(
        (_ended(record), record.rates["launch_overhead_s"])
        for record in records
        if record.rates and record.created
    )
    found = {}
    for record in records:
        if not record.created:
            continue
        ended = _ended(record)
        began = ended - (record.wall_s or 0)
        around = [
            seconds for at, seconds in loops if began - JUST_BEFORE_S <= at <= began or at == ended
        ]
        if around:
            found[record.name] = math.exp(statistics.mean(map(math.log, around[-2:])))
    return found


def _ended(record: Record) -> float:
    return datetime.datetime.fromisoformat(str(record.created)).timestamp()


def timed_runs(records: Sequence[Record]) -> list[Timed]:
    """The jobs among records that tell a step time; runs of the same job count once."""
    paces = launch_overheads(records)
    jobs: dict[str, list[tuple[Record, float]]] = {}
    for record in records:
        measured = measured_step_time(record)
        if measured is not None:
            same = json.dumps((record.config, record.job), sort_keys=True)
            jobs.setdefault(same, []).append((record, measured))
    found = []
    for same_runs in jobs.values():
        record = same_runs[0][0]
        model, job = model_from_config(record.config, record.model), Job.from_dict(record.job)
        capability = record.gpu.compute_capability
        major, minor = map(int, capability.split(".")) if capability else DEFAULT_CAPABILITY
        walked = estimate(model, job, capability=(major, minor))
        seconds = statistics.median(measured for _, measured in same_runs)
        launches = [paces[run.name] for run, _ in same_runs if run.name in paces]
        pace = statistics.median(launches) if launches else None
        found.append(Timed(record.name, model.family, job, walked, seconds, pace))
    return found


def fit_times(records: Sequence[Record]) -> TimeFit | None:
    """Fit the rates to recorded runs of one card.

    Returns:
        The fit; None from fewer than ``MIN_RUNS`` jobs or ``MIN_FAMILIES`` families, or where no
        run measured the rest of the rates.
    """
    runs = timed_runs(records)
    families = sorted({run.family for run in runs})
    loops = {
        name: [record.rates[name] for record in records if record.rates and name in record.rates]
        for name in MEASURED
    }
    if len(runs) < MIN_RUNS or len(families) < MIN_FAMILIES or not all(loops.values()):
        return None
    measured = {name: statistics.median(values) for name, values in loops.items()}
    begin = Rates(**measured, **START)
    rates = _fit(runs, begin, begin)
    without = {
        family: _fit([run for run in runs if run.family != family], begin, rates)
        for family in families
    }
    ratios = {
        run.name: step_time(run.walked, run.job, without[run.family]).step_s / run.measured_s
        for run in runs
    }
    seen = {
        run.name: _error(run, without[run.family]) + 1
        for run in runs
        if run.launch_overhead_s is not None
    }
    return TimeFit(runs, rates, without, ratios, seen)


def _error(run: Timed, rates: Rates) -> float:
    """Relative error at the pace that the host was seen to have; at its usual one if unknown."""
    if run.launch_overhead_s is not None:
        rates = at_pace(rates, run.launch_overhead_s)
    return step_time(run.walked, run.job, rates).step_s / run.measured_s - 1


def _fit(runs: Sequence[Timed], begin: Rates, start: Rates) -> Rates:
    """Least squares of the relative errors, in the logarithms of the constants.

    Levenberg and Marquardt's method; an outlier's weight falls with its distance (Huber).
    """
    names = list(START)
    origin = [math.log(getattr(begin, name)) for name in names]
    point = [math.log(getattr(start, name)) for name in names]

    def errors(at: Sequence[float]) -> list[float]:
        rates = replace(begin, **{n: math.exp(value) for n, value in zip(names, at, strict=True)})
        return [_error(run, rates) for run in runs]

    def loss(at: Sequence[float], found: Sequence[float]) -> float:
        pulled = PULL * sum((a - o) ** 2 for a, o in zip(at, origin, strict=True)) / 2
        return pulled + sum(
            e * e / 2 if abs(e) < OUTLIER else OUTLIER * (abs(e) - OUTLIER / 2) for e in found
        )

    now = errors(point)
    cost, damping = loss(point, now), 0.01
    for _ in range(MAX_ROUNDS):
        slopes = []
        for index in range(len(names)):
            moved = [*point]
            moved[index] += STEP
            slopes.append([(b - a) / STEP for a, b in zip(now, errors(moved), strict=True)])
        weights = [min(1.0, OUTLIER / abs(e)) if e else 1.0 for e in now]
        normal = [
            [sum(w * x * y for w, x, y in zip(weights, a, b, strict=True)) for b in slopes]
            for a in slopes
        ]
        gradient = [
            sum(w * e * x for w, e, x in zip(weights, now, a, strict=True)) + PULL * (p - o)
            for a, p, o in zip(slopes, point, origin, strict=True)
        ]
        for _ in range(MAX_ROUNDS):
            matrix = [
                [v + (PULL + damping * v if i == j else 0.0) for j, v in enumerate(row)]
                for i, row in enumerate(normal)
            ]
            trial = [p - d for p, d in zip(point, _solve(matrix, gradient), strict=True)]
            then = errors(trial)
            better = loss(trial, then)
            if better < cost:
                break
            damping *= 4
        else:
            break
        gained, cost, point, now = cost - better, better, trial, then
        damping /= 4
        if gained < ENOUGH:
            break
    return replace(begin, **{n: math.exp(value) for n, value in zip(names, point, strict=True)})


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """A small symmetric positive system, by elimination."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [b - factor * a for a, b in zip(rows[i], rows[j], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (rows[i][size] - known) / rows[i][i]
    return found
