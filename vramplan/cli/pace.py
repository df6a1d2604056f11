"""Step time, tokens per second, and a whole run's time, energy and cost, on the command line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from vramplan.errors import UsageError
from vramplan.job import Job
from vramplan.profile import REFERENCE_GPU
from vramplan.timing import Pace, WholeRun, whole_run
from vramplan.units import format_seconds

if TYPE_CHECKING:
    from vramplan.gpus import Gpu

MAX_SAMPLES = 10**12
MAX_EPOCHS = 10**6
MAX_PRICE = 10**6
DEFAULT_EPOCHS = 3.0  # transformers' num_train_epochs

SamplesOption = Annotated[
    int | None,
    typer.Option(
        help="Sequences in the data set: adds the whole run's time, energy and cost.",
        show_default=False,
    ),
]
EpochsOption = Annotated[
    float | None,
    typer.Option(
        help="Passes over the data set [default: 3, as transformers].", show_default=False
    ),
]
PriceOption = Annotated[
    float | None, typer.Option(help="Price of an hour of the machine.", show_default=False)
]


class DataSet(NamedTuple):
    """What a whole run goes over, and what an hour costs."""

    num_samples: int
    epochs: float
    price_per_hour: float | None


def data_set(
    num_samples: int | None, epochs: float | None, price_per_hour: float | None
) -> DataSet | None:
    """The options together; None where no data set was named.

    Raises:
        UsageError: If a number is out of range, or there is no ``--num-samples`` to go with it.
    """
    for option, value, top in (
        ("--num-samples", num_samples, MAX_SAMPLES),
        ("--epochs", epochs, MAX_EPOCHS),
        ("--price-per-hour", price_per_hour, MAX_PRICE),
    ):
        if value is None:
            continue
        if not math.isfinite(value) or not 0 < value <= top:
            raise UsageError(f"{option} must be above 0 and at most {top:,}, not {value}")
        if num_samples is None:
            raise UsageError(f"{option} needs --num-samples: how many sequences there are")
    if num_samples is None:
        return None
    return DataSet(num_samples, DEFAULT_EPOCHS if epochs is None else epochs, price_per_hour)


def run_of(found: Pace | None, job: Job, gpu: Gpu | None, data: DataSet | None) -> WholeRun | None:
    """A whole run at that pace; None without a data set or a pace."""
    if found is None or gpu is None or data is None:
        return None
    return whole_run(
        found, job, data.num_samples, data.epochs, gpu.board_power_w, data.price_per_hour
    )


# -- for people ----------------------------------------------------------------------------------


def pace_line(found: Pace) -> str:
    """The pace in one short line."""
    whence = "" if found.source == "calibrated" else f", extrapolated from {REFERENCE_GPU}"
    return (
        f"About {format_seconds(found.step_s)} a step, {found.tokens_per_s:,.0f} tokens/s "
        f"({format_seconds(found.low_s)} to {format_seconds(found.high_s)}{whence})"
    )


def run_line(run: WholeRun, data: DataSet) -> str:
    """A whole run in one line."""
    parts = [f"{run.num_steps:,} steps", format_hours(run.hours)]
    if run.energy_kwh is not None:
        parts.append(f"at most {run.energy_kwh:,.3g} kWh for the card")
    if run.cost is not None:
        parts.append(f"cost {run.cost:,.2f}")
    return f"{data.num_samples:,} sequences, {data.epochs:g} epochs: {', '.join(parts)}"


def tokens_text(found: Pace | None) -> str:
    """Tokens per second in a table of cards; ``~`` marks what was extrapolated."""
    if found is None:
        return "?"
    return f"{'' if found.source == 'calibrated' else '~'}{found.tokens_per_s:,.0f}"


def print_pace(
    out: Console, found: Pace | None, run: WholeRun | None, data: DataSet | None
) -> None:
    """The pace and, with a data set, the whole run; nothing where no pace is known."""
    if found is not None:
        out.print(pace_line(found))
    if run is not None and data is not None:
        out.print(run_line(run, data))
    elif data is not None:
        out.print("Time, energy and cost of the run are not known for this card.")


def format_hours(hours: float) -> str:
    """A long time for people: ``13.5 h``, ``4.1 days``."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


# -- for machines --------------------------------------------------------------------------------


def pace_document(found: Pace | None, run: WholeRun | None) -> dict[str, Any]:
    """The pace's part of ``prediction``; null is "not known"."""
    return {
        "step_time_s": None if found is None else found.step_s,
        "tokens_per_s": None if found is None else found.tokens_per_s,
        "step_time_range_s": None if found is None else [found.low_s, found.high_s],
        "time_source": None if found is None else found.source,
        "whole_run": None if run is None else run._asdict(),
    }
