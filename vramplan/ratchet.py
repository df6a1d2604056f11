"""No figure of the accuracy record may get worse than the committed one.

``vramplan accuracy --check reports/accuracy.csv`` compares. Runs that only one side has are left
out: a new run is news about the prediction, not a change for the worse.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vramplan.accuracy import FIGURES, Row, errors_of, percent
from vramplan.calibrate import ninetieth
from vramplan.errors import RecordError

ROUNDING = 0.0001  # errors are written in hundredths of a percent
MAX_BYTES = 16 * 1024**2

STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "median": lambda errors: statistics.median(map(abs, errors)),
    "90 % within": lambda errors: ninetieth(map(abs, errors)),
    "worst": lambda errors: max(map(abs, errors)),
    "too low, worst": lambda errors: max(0.0, -min(errors)),
}


class Worse(NamedTuple):
    """One figure that got worse.

    Attributes:
        figure: Which number.
        statistic: Which summary of its errors.
        was: The committed value, a share.
        now: Today's.
    """

    figure: str
    statistic: str
    was: float
    now: float

    def __str__(self) -> str:
        return f"{self.figure}, {self.statistic}: {percent(self.was)} was, {percent(self.now)} is"


def read_errors(path: Path) -> dict[str, dict[str, float]]:
    """The errors of a committed record, by figure and run.

    Args:
        path: A CSV as ``vramplan accuracy -o NAME.csv`` writes it.

    Raises:
        RecordError: If it is not one.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is too large for an accuracy record")
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        headings, *lines = rows
        places = {
            name: headings.index(f"{name}, MiB") + 1
            for name in FIGURES
            if f"{name}, MiB" in headings
        }
        found = {
            name: {line[0]: _share(line[place]) for line in lines if line[place]}
            for name, place in places.items()
        }
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise RecordError(f"{path} cannot be read as an accuracy record: {error}") from None
    if not found:
        raise RecordError(f"{path} is not an accuracy record: it has none of {', '.join(FIGURES)}")
    return found


def _share(text: str) -> float:
    return float(text.removesuffix("%").strip()) / 100


def worse(found: Iterable[Row], committed: Mapping[str, Mapping[str, float]]) -> list[Worse]:
    """Every figure whose errors, over the runs that both have, are larger than they were."""
    rows = list(found)
    grown = []
    for figure, was in committed.items():
        now = errors_of(rows, figure)
        names = sorted(was.keys() & now.keys())
        if not names:
            continue
        before, after = [was[name] for name in names], [now[name] for name in names]
        for statistic, of in STATISTICS.items():
            old, new = of(before), of(after)
            if new > old + ROUNDING:
                grown.append(Worse(figure, statistic, old, new))
    return grown
