"""``@pytest.mark.limit_vram``: what a test may take, and what to say of one that takes more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vramplan.errors import UnknownNameError, UsageError, VramplanError
from vramplan.names import OUTSIDE, any_layer, printable
from vramplan.regression import METRICS, Measurement
from vramplan.units import format_bytes, parse_size

KINDS = ("allocated", "reserved", "device")
NUM_OWNERS = 8
NOT_SHARED = ("load", "evaluate", "save")  # peaks of a job outside its training steps
EXAMPLE = '@pytest.mark.limit_vram("11 GiB", kind="allocated")'


class Limit(NamedTuple):
    """What one test may take.

    Attributes:
        nbytes: Bytes.
        kind: Of which figure.
    """

    nbytes: int
    kind: str = "allocated"


def parse_limit(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Limit:
    """The limit that a marker's arguments say.

    Raises:
        UsageError: If they say none.
    """
    unknown = sorted(kwargs.keys() - {"kind"})
    if unknown:
        raise UsageError(f"limit_vram has no argument {unknown[0]!r}; write {EXAMPLE}")
    if len(args) != 1 or isinstance(args[0], bool) or not isinstance(args[0], (str, int)):
        raise UsageError(f"limit_vram takes one size, a text or a number of bytes: {EXAMPLE}")
    kind = kwargs.get("kind", "allocated")
    if kind not in KINDS:
        raise UnknownNameError("kind of limit_vram", str(kind), KINDS)
    try:
        return Limit(parse_size(str(args[0])), kind)
    except VramplanError as error:
        raise UsageError(f"limit_vram: {error}") from None


def excess(limit: Limit, measured: Iterable[Measurement]) -> str:
    """What to say of a test that took more than it may; empty if it did not.

    Args:
        limit: What it may take.
        measured: The test as a whole, its regions and its jobs.
    """
    unknown, found = "", []
    for measurement in measured:
        peak = _peak(measurement, limit.kind)
        if peak is None:
            unknown = unknown or measurement.name
        else:
            found.append((peak, measurement))
    if not found:
        return (
            f"{METRICS[limit.kind].title} of this test is not known ({unknown or 'no figures'}), "
            f"so its limit of {format_bytes(limit.nbytes)} cannot be judged."
        )
    peak, fullest = max(found, key=lambda pair: pair[0])
    if peak <= limit.nbytes:
        return ""
    return "\n".join(_lines(limit, peak, fullest))


def _peak(measurement: Measurement, kind: str) -> int | None:
    """The highest figure of a kind; the allocated one of every phase of a job counts."""
    figure = measurement.figures.get(kind)
    if kind != "allocated":
        return figure
    others = [measurement.figures[name] for name in NOT_SHARED if name in measurement.figures]
    found = [*others, *measurement.phases.values(), *([] if figure is None else [figure])]
    return max(found, default=None)


def _lines(limit: Limit, peak: int, fullest: Measurement) -> Iterable[str]:
    phase = max(fullest.phases, key=lambda name: fullest.phases[name], default="")
    where = f", {phase}" if phase == OUTSIDE else f", in {printable(phase)}" if phase else ""
    own = where if limit.kind == "allocated" else ""
    yield (
        f"{printable(fullest.name)}: {METRICS[limit.kind].title} {format_bytes(peak)} is "
        f"{format_bytes(peak - limit.nbytes)} above the limit of {format_bytes(limit.nbytes)}{own}."
    )
    allocated = _peak(fullest, "allocated")
    if limit.kind != "allocated" and allocated is not None:
        yield f"Of it {format_bytes(allocated)} were allocated at most{where}."
    if fullest.peak:
        yield ""
        yield from owner_table(fullest.peak)


def owner_table(holdings: Mapping[tuple[str, str], int]) -> list[str]:
    """The largest owners at a peak, all layers of a module as one."""
    found: dict[tuple[str, str], int] = {}
    for (kind, owner), nbytes in holdings.items():
        key = (kind.replace("_", " "), any_layer(owner))
        found[key] = found.get(key, 0) + nbytes
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    rows = [(format_bytes(n), kind, printable(owner)) for (kind, owner), n in ordered[:NUM_OWNERS]]
    rest = sum(nbytes for _, nbytes in ordered[NUM_OWNERS:])
    if rest:
        rows.append((format_bytes(rest), f"{len(ordered) - NUM_OWNERS} smaller ones", ""))
    rows = [("at the peak", "kind", "module"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{n:>{widths[0]}}  {k:<{widths[1]}}  {o}".rstrip() for n, k, o in rows]
