"""The step-time tables of the accuracy record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from vramplan.accuracy import SPREAD, Row, percent, spread
from vramplan.gpus import find_gpu
from vramplan.profile import REFERENCE_GPU, profile_for
from vramplan.report.page import Table
from vramplan.timefit import Timed, TimeFit, fit_times, timed_runs
from vramplan.timing import at_pace, rates_of, scaled, step_time


def times(found: Sequence[Row]) -> Iterator[Table]:
    """Step times: each family predicted by rates fitted to the others, or by another card's."""
    records = [row.record for row in found]
    fitted = fit_times(records)
    if fitted is None:
        yield times_elsewhere(timed_runs(records), found[0].record.gpu.slug)
        return
    clocks = {run.name: step_time(run.walked, run.job, fitted.rates) for run in fitted.runs}
    bound: Callable[[Timed], str] = lambda run: (  # noqa: E731
        "decided by the card"
        if clocks[run.name].card_s > clocks[run.name].host_s
        else "decided by the host"
    )
    brief: tuple[Callable[[Timed], str], ...] = (lambda run: "all", bound)
    yield Table(
        "Step time, each family left out in turn",
        ("jobs", *SPREAD),
        _spreads(
            fitted, fitted.at_pace, *brief, lambda run: run.job.method, lambda run: run.family
        ),
        "Rates fitted to the other families' runs; the host at the pace that a loop of small "
        "launches showed before and after the run. Median step of a run, runs of one job counted "
        "once; runs that recorded a history or paging events, whose allocator retried, or around "
        "which no loop ran, are left out.",
    )
    yield Table(
        "Step time, the host's pace not known",
        ("jobs", *SPREAD),
        _spreads(fitted, fitted.ratios, *brief),
        "The same runs and those without a loop, all at the host's usual pace, as `estimate` "
        "predicts and as its range says. The pace of one host differs by a third between runs of "
        "one job (see the repeats).",
    )


def _spreads(
    fitted: TimeFit, ratios: Mapping[str, float], *keys: Callable[[Timed], str]
) -> tuple[tuple[str, ...], ...]:
    runs = [run for run in fitted.runs if run.name in ratios]
    return tuple(
        (name, *spread({run.name: ratios[run.name] - 1 for run in runs if key(run) == name}))
        for key in keys
        for name in sorted({key(run) for run in runs})
    )


def times_elsewhere(runs: Sequence[Timed], slug: str | None) -> Table:
    """Step times of a card with too few runs to fit rates to: by the reference card's, scaled."""
    known = rates_of(profile_for(REFERENCE_GPU))
    rates = (
        None if slug is None or known is None
        else scaled(known, find_gpu(slug), find_gpu(REFERENCE_GPU))
    )  # fmt: skip
    lines = []
    for run in runs if rates is not None else ():
        assert rates is not None
        usual = step_time(run.walked, run.job, rates).step_s
        cells = [f"{usual:.3f}", percent(usual / run.measured_s - 1, sign=True)]
        if run.launch_overhead_s is not None:
            own = step_time(run.walked, run.job, at_pace(rates, run.launch_overhead_s)).step_s
            cells += [f"{own:.3f}", percent(own / run.measured_s - 1, sign=True)]
        lines.append((run.name, f"{run.measured_s:.3f}", *cells, *[""] * (4 - len(cells))))
    return Table(
        f"Step time by the rates of {REFERENCE_GPU}",
        ("run", "measured, s", "predicted, s", "error", "at this host's pace, s", "error"),
        tuple(lines),
        "No rate was fitted to these runs: the card is taken to reach the same share of its "
        "datasheet as the other. The host's pace is first the other machine's, then what a loop "
        "of small launches showed before and after the run.",
    )
