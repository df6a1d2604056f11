"""Whether a job needs more than it did: two measurements of it, figure by figure.

Records, regions measured in a test, and traces all become a Measurement; two of them a Check.
Memory is nearly deterministic, so a small share more of it is a finding. Times are not: they are
judged only where both sides were repeated, and only when the two sets of repeats do not overlap.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vramplan.errors import UnknownNameError, UsageError
from vramplan.names import any_layer
from vramplan.units import MIB, parse_size

Outcome = Literal["same", "better", "worse", "not judged"]

# Fewer do not tell a slower program from a slower moment: of 210 pairs of three unchanged runs 18
# were called slower or faster by 10 %, of 60 pairs of five none (tests/unit/test_unchanged.py).
MIN_REPEATS = 5
LEAKS = frozenset(("leaked", "per_step"))
UNSTEADY = "depends on what the process did before"
NEVER_FAILS = "never fails"
SILENT = (UNSTEADY, NEVER_FAILS)  # reasons that need not be told
OUTSIDE_TRAINING = ("load", "prepare", "evaluate", "save")  # phases that "allocated" leaves out


class Threshold(NamedTuple):
    """How much worse a figure may get.

    Attributes:
        share: Of the baseline's figure, as 0.01 for 1 %.
        nbytes: Or a number of bytes; the larger of the two holds.
    """

    share: float = 0.0
    nbytes: int = 0

    def allowed(self, base: float) -> float:
        """What a figure may lose against a base, in the base's unit."""
        return max(self.share * base, self.nbytes)


class Metric(NamedTuple):
    """One figure that is compared.

    Attributes:
        title: For people.
        threshold: How much worse it may get; None for a figure that is shown and never fails.
        relative_to: The metric whose baseline the share is of; empty for its own.
        timed: Whether it is a time or a rate, which repeats must bear out.
        higher_is_better: Whether less of it is worse.
    """

    title: str
    threshold: Threshold | None
    relative_to: str = ""
    timed: bool = False
    higher_is_better: bool = False


# Allocated memory was equal to the byte in every repeat that was measured, reserved memory within
# 0.4 %; what the driver adds comes in steps of some MiB, and limits are searched in such of 32 MiB.
METRICS: Mapping[str, Metric] = {
    "load": Metric("load peak", Threshold(0.01)),
    "ready": Metric("ready to train", Threshold(0.005)),
    "allocated": Metric("peak allocated", Threshold(0.005)),
    "reserved": Metric("peak reserved", Threshold(0.03)),
    "device": Metric("device peak", Threshold(0.05)),
    "min_limit": Metric("smallest limit", Threshold(0.03, 32 * MIB)),
    "evaluate": Metric("evaluation peak", Threshold(0.005)),
    "save": Metric("saving peak", Threshold(0.005)),
    "leaked": Metric("held after", Threshold(0.001), relative_to="allocated"),
    "per_step": Metric("growth a step", Threshold(0.001), relative_to="allocated"),
    "paged": Metric("paged state", Threshold(0.01)),
    "paging": Metric("moved by paging", Threshold(0.05)),
    "host_ram": Metric("host RAM", None),
    "tokens_per_s": Metric("tokens/s", Threshold(0.10), timed=True, higher_is_better=True),
    "seconds": Metric("time", Threshold(0.10), timed=True),
}

_SHARE = re.compile(r"([+-]?)(\d+(?:\.\d*)?|\.\d+)\s*%")
_SIZE = re.compile(r"\+?(\d.*)")


def thresholds(text: str) -> dict[str, Threshold | None]:
    """The default thresholds with some replaced.

    Args:
        text: Such as ``allocated:1%,reserved:200MiB,tokens_per_s:-10%,device:off``.

    Raises:
        UsageError: If an entry cannot be read.
        UnknownNameError: If there is no such metric.
    """
    found = {name: metric.threshold for name, metric in METRICS.items()}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition(":"))
        if name not in METRICS:
            raise UnknownNameError("figure", name, METRICS)
        found[name] = _threshold(name, value)
    return found


def _threshold(name: str, value: str) -> Threshold | None:
    if value == "off":
        return None
    metric = METRICS[name]
    share, size = _SHARE.fullmatch(value), _SIZE.fullmatch(value)
    if share and (share[1] == "-") <= metric.higher_is_better and float(share[2]) <= 1000:
        return Threshold(share=float(share[2]) / 100)
    if value in ("0", "+0"):
        return Threshold()
    if size and not metric.timed:
        return Threshold(nbytes=parse_size(size[1]))
    example = "-10%" if metric.higher_is_better else "1%" if metric.timed else "1%, 200MiB, 0"
    raise UsageError(f"cannot read {name}:{value} as a threshold; write for example {example}, off")


class Growth(NamedTuple):
    """What one module holds of one kind, then and now.

    Attributes:
        kind: What the memory is for (a ``timeline.Kind``).
        owner: The module, ``*`` for any layer.
        num_layers: Layers that changed alike; 0 where the owner is no layer's.
        before_bytes, after_bytes: Of all of these together.
    """

    kind: str
    owner: str
    num_layers: int
    before_bytes: int
    after_bytes: int

    @property
    def nbytes(self) -> int:
        """By how much it grew; negative if it shrank."""
        return self.after_bytes - self.before_bytes


Holdings = Mapping[tuple[str, str], int]  # (kind, module) -> bytes


@dataclass(frozen=True, slots=True)
class Measurement:
    """One thing that was measured (or predicted), perhaps several times.

    Attributes:
        name: What it is called on both sides.
        figures: Metric -> value: bytes; the highest of the repeats.
        repeats: Timed metric -> its value in each repeat: seconds, tokens per second.
        phases: Phase -> peak allocated bytes in it.
        peak: What every module held at the fullest moment; empty where it was not recorded.
        ready: What every module held when training was about to start; as above.
        left: What the region, or a step of it, left behind; empty too where nothing was.
        moments: Phase -> what every module held at the fullest moment of it; as ``peak``.
        where: GPU, limit, allocator settings: must be equal for figures to be comparable.
        versions: Versions of everything that decides the figures, and fields of the job.
        failed: How it ended if it did not end well: "out of memory in backward".
        unsteady: Figures that depend on what else its process has done: they are never judged.
        oom: Whether it ran out of memory; other failures cannot be compared.
    """

    name: str
    figures: Mapping[str, int] = field(default_factory=dict)
    repeats: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    phases: Mapping[str, int] = field(default_factory=dict)
    peak: Holdings = field(default_factory=dict)
    ready: Holdings = field(default_factory=dict)
    left: Holdings = field(default_factory=dict)
    moments: Mapping[str, Holdings] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    failed: str = ""
    unsteady: frozenset[str] = frozenset()
    oom: bool = False


class Change(NamedTuple):
    """One figure, then and now.

    Attributes:
        metric: Its name in ``METRICS``.
        before, after: Bytes, seconds or tokens per second (the median of the repeats); None where
            a side has none.
        allowed: How much worse it might have got, in the same unit; None if it never fails.
        outcome: What follows from it.
        why: Why it was not judged.
    """

    metric: str
    before: float | None
    after: float | None
    allowed: float | None
    outcome: Outcome
    why: str = ""

    @property
    def share(self) -> float | None:
        """Relative change; None from nothing."""
        if self.before is None or self.after is None or not self.before:
            return None
        return self.after / self.before - 1


@dataclass(frozen=True, slots=True)
class Check:
    """One measurement against its baseline.

    Attributes:
        name: Of what.
        changes: Figure by figure; those that neither side has are left out.
        grown: Modules and kinds that hold more, the largest first.
        versions: What -> (then, now), where they differ.
        phase: The fullest phase, if the peak is worse; else the one that grew most; none for a
            leak.
        refused: Why nothing was compared; empty if it was.
        failed: A run that used to end well and ran out of memory, in words.
        mended: How the baseline ran out of memory, where this run did not, in words.
    """

    name: str
    changes: tuple[Change, ...] = ()
    grown: tuple[Growth, ...] = ()
    versions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    phase: str = ""
    refused: str = ""
    failed: str = ""
    mended: str = ""

    @property
    def outcome(self) -> Outcome:
        """Worse if anything is, else better if anything is."""
        if self.refused:
            return "not judged"
        found = {change.outcome for change in self.changes}
        if self.failed or "worse" in found:
            return "worse"
        return "better" if self.mended or "better" in found else "same"


def check(
    current: Measurement, baseline: Measurement, allowed: Mapping[str, Threshold | None]
) -> Check:
    """Compare a measurement with its baseline.

    Args:
        current: What is.
        baseline: What was.
        allowed: As ``thresholds`` gives them.
    """
    versions = _differences(baseline.versions, current.versions)
    elsewhere = _differences(baseline.where, current.where)
    if elsewhere:
        told = ", ".join(f"{name}: {was} then, {now} now" for name, (was, now) in elsewhere.items())
        return Check(current.name, versions=versions, refused=f"measured elsewhere ({told})")
    for side, found in (("the baseline", baseline), ("this run", current)):
        if found.failed and not found.oom:
            return Check(current.name, versions=versions, refused=f"{side} failed: {found.failed}")
    failed = current.failed if current.oom and not baseline.oom else ""
    mended = baseline.failed if baseline.oom and not current.oom else ""
    changes = tuple(
        _change(name, current, baseline, allowed.get(name))
        for name, metric in METRICS.items()
        if any(name in (side.repeats if metric.timed else side.figures)
               for side in (current, baseline))
    )  # fmt: skip
    if not (failed or mended) and all(change.outcome == "not judged" for change in changes):
        return Check(current.name, changes, versions=versions, refused="no figure that both have")
    worse = {change.metric for change in changes if change.outcome == "worse"}
    phase = _phase(current, baseline, worse) if worse else ""
    return Check(
        current.name,
        changes,
        _grown(current, baseline, worse, phase) if worse or failed else (),
        versions,
        phase,
        failed=failed,
        mended=mended,
    )


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    names = dict.fromkeys((*before, *after))
    pairs = {name: (before.get(name, "none"), after.get(name, "none")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _change(
    name: str, current: Measurement, baseline: Measurement, threshold: Threshold | None
) -> Change:
    metric = METRICS[name]
    if metric.timed:
        return _timed_change(name, current, baseline, threshold)
    before, after = baseline.figures.get(name), current.figures.get(name)
    if before is None or after is None:
        side = "the baseline" if before is None else "this run"
        return Change(name, before, after, None, "not judged", f"not measured in {side}")
    if name in current.unsteady:
        return Change(name, before, after, None, "not judged", UNSTEADY)
    if threshold is None:
        return Change(name, before, after, None, "not judged", NEVER_FAILS)
    base = baseline.figures.get(metric.relative_to, 0) if metric.relative_to else before
    return Change(name, before, after, threshold.allowed(base), _outcome(
        after - before, threshold.allowed(base)
    ))  # fmt: skip


def _outcome(more: float, allowed: float) -> Outcome:
    if more > allowed:
        return "worse"
    return "better" if more < -allowed else "same"


def _timed_change(
    name: str, current: Measurement, baseline: Measurement, threshold: Threshold | None
) -> Change:
    then, now = (side.repeats.get(name, ()) for side in (baseline, current))
    before, after = (statistics.median(times) if times else None for times in (then, now))
    if before is None or after is None or min(len(then), len(now)) < MIN_REPEATS:
        why = f"{len(then)} and {len(now)} repeats; {MIN_REPEATS} each tell a difference"
        return Change(name, before, after, None, "not judged", why)
    if threshold is None:
        return Change(name, before, after, None, "not judged", NEVER_FAILS)
    sign = -1 if METRICS[name].higher_is_better else 1
    allowed = threshold.allowed(before)
    outcome = _outcome(sign * (after - before), allowed)
    if max(min(then), min(now)) <= min(max(then), max(now)):
        outcome = "same"  # the repeats overlap
    return Change(name, before, after, allowed, outcome)


def _phase(current: Measurement, baseline: Measurement, worse: set[str]) -> str:
    if worse & LEAKS:  # they fill every phase
        return ""
    training = {n: size for n, size in current.phases.items() if n not in OUTSIDE_TRAINING}
    if "allocated" in worse and training:
        return max(training, key=lambda name: training[name])
    grown = {
        name: size - baseline.phases[name]
        for name, size in current.phases.items()
        if name in baseline.phases and size > baseline.phases[name]
    }
    return max(grown, key=lambda name: grown[name], default="")


def _grown(
    current: Measurement, baseline: Measurement, worse: set[str], phase: str
) -> tuple[Growth, ...]:
    """Growth at the moment that the worst figure is about."""
    moments = [
        (current.moments.get(phase, {}), baseline.moments.get(phase, {})),
        (current.peak, baseline.peak),
        (current.ready, baseline.ready),
    ]
    if "ready" in worse and "allocated" not in worse:
        moments.reverse()
    if worse & LEAKS and current.left:
        left = growth(current.left, baseline.left)
        if left:
            return left
    found = (growth(after, before) for after, before in moments if after and before)
    return next(filter(None, found), ())


def growth(after: Holdings, before: Holdings) -> tuple[Growth, ...]:
    """Which modules hold more of which kind.

    Layers that changed by the same number of bytes are told together.

    Returns:
        The largest growth first; what shrank is left out.
    """
    alike: dict[tuple[str, str, int], list[tuple[str, int, int]]] = {}
    for kind, owner in dict.fromkeys((*after, *before)):
        was, now = before.get((kind, owner), 0), after.get((kind, owner), 0)
        if now > was:
            key = (kind, any_layer(owner), now - was)
            alike.setdefault(key, []).append((owner, was, now))
    found = [
        Growth(
            kind,
            pattern if len(places) > 1 else places[0][0],
            len(places) if pattern != places[0][0] else 0,
            sum(was for _, was, _ in places),
            sum(now for _, _, now in places),
        )
        for (kind, pattern, _), places in alike.items()
    ]
    return tuple(sorted(found, key=lambda g: (-g.nbytes, g.kind, g.owner)))


def surplus(after: Holdings, before: Holdings) -> Holdings:
    """What is held beyond what was, in bytes; what shrank is left out."""
    return {key: size - before.get(key, 0) for key, size in after.items()
            if size > before.get(key, 0)}  # fmt: skip


def worst(checks: Iterable[Check]) -> Outcome:
    """Of several: worse if one is, then not judged, then better."""
    found = {check.outcome for check in checks}
    order: tuple[Outcome, ...] = ("worse", "not judged", "better", "same")
    return next((outcome for outcome in order if outcome in found), "same")


@dataclass(frozen=True, slots=True)
class Checked:
    """Everything that was compared.

    Attributes:
        checks: One for each measurement that both sides have.
        missing: Names that only the baseline has.
        new: Names that only the current side has.
    """

    checks: tuple[Check, ...] = ()
    missing: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """Worse if one is; else not judged if one could not be compared, or none was."""
        found = worst(self.checks)
        if found != "worse" and (self.missing or not self.checks):
            return "not judged"
        return found


def check_all(
    current: Mapping[str, Measurement],
    baseline: Mapping[str, Measurement],
    allowed: Mapping[str, Threshold | None],
) -> Checked:
    """Compare measurements with their baselines, by name.

    Args:
        current: What is.
        baseline: What was.
        allowed: As ``thresholds`` gives them.
    """
    return Checked(
        tuple(
            check(found, baseline[name], allowed)
            for name, found in current.items()
            if name in baseline
        ),
        missing=tuple(name for name in baseline if name not in current),
        new=tuple(name for name in current if name not in baseline),
    )


class Accepted(NamedTuple):
    """A comparison, and the baseline that was made of it.

    Attributes:
        checked: The comparison with what was there.
        fates: Name -> "replaced", "added", "unchanged", "kept" or "removed".
    """

    checked: Checked
    fates: Mapping[str, str]
