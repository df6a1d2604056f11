"""A timeline as a curve: how full the card is, by kind, from the first batch to the last update."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.timeline import BEFORE_TRAINING, Kind, Phase, Timeline


@dataclass(frozen=True, slots=True)
class Moment:
    """How full the card is right after one allocation or release.

    Attributes:
        phase: Where in the run.
        by_kind: Allocated bytes by kind.
        nbytes: Their sum.
    """

    phase: Phase
    by_kind: dict[Kind, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive moments of one phase; the fullest of each bin where there were too many."""

    phase: Phase
    moments: tuple[Moment, ...]

    @property
    def fullest(self) -> Moment:
        """Its fullest moment."""
        return max(self.moments, key=lambda moment: moment.nbytes)


def stretches(timeline: Timeline, most: int = 120) -> tuple[Stretch, ...]:
    """The training part of a timeline, phase by phase, repeated sections unrolled.

    Args:
        timeline: Any witness's timeline.
        most: Most moments kept of a phase; of each bin the fullest is.

    Returns:
        One stretch per phase, in the order of the run; where a run has several steps or
        micro-batches, each phase comes several times.

    Known limitations:
        A repeated section books what it hands to its neighbour as its own kind; sums are exact.
    """
    live: dict[Kind, int] = {}
    found: list[tuple[Phase, list[tuple[int, dict[Kind, int]]]]] = []
    total = 0
    for section in timeline.sections:
        for _ in range(section.repeats):
            for event in section.events:
                size = event.nbytes * event.copies
                live[event.kind] = live.get(event.kind, 0) + size
                total += size
                if event.phase in BEFORE_TRAINING or not size:
                    continue
                if not found or found[-1][0] is not event.phase:
                    found.append((event.phase, []))
                found[-1][1].append((total, dict(live)))
    return tuple(Stretch(phase, _thinned(phase, moments, most)) for phase, moments in found)


def _thinned(
    phase: Phase, moments: list[tuple[int, dict[Kind, int]]], most: int
) -> tuple[Moment, ...]:
    """At most so many moments, the fullest of each bin."""
    width = -(-len(moments) // most)
    bins = [moments[start : start + width] for start in range(0, len(moments), width)]
    best = [max(part, key=lambda moment: moment[0]) for part in bins]
    return tuple(Moment(phase, by_kind, total) for total, by_kind in best)
