"""Two timelines side by side at their peaks: where witnesses part, term by term."""

from __future__ import annotations

from typing import NamedTuple

from vramplan.timeline import Kind, Timeline


class Term(NamedTuple):
    """Bytes of one kind and owner at the peak, predicted and measured (or traced)."""

    kind: str
    owner: str
    measured: int
    predicted: int


def compare(measured: Timeline, predicted: Timeline) -> list[Term]:
    """Both peaks by kind and owner (any layer), the largest difference first.

    Args:
        measured: A recorded history or a trace.
        predicted: An estimate.

    Returns:
        Every term, equal ones too; each side sums to its peak.
    """
    sides = [timeline.peak().by_kind_and_owner for timeline in (measured, predicted)]
    keys: set[tuple[Kind, str]] = set(sides[0]) | set(sides[1])
    found = [
        Term(kind.value, owner, *(side.get((kind, owner), 0) for side in sides))
        for kind, owner in keys
    ]
    return sorted(found, key=lambda term: (-abs(term.predicted - term.measured), term))
