"""One test, judged: against its limits and its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vramplan.names import printable
from vramplan.regression import Check, Measurement, check
from vramplan.report import findings
from vramplan.testing import baselines
from vramplan.testing.baselines import Baseline
from vramplan.testing.documents import document_of
from vramplan.testing.limits import Limit, excess, owner_table
from vramplan.testing.plan import Plan
from vramplan.testing.session import WHOLE, GpuCard, Measured
from vramplan.units import format_bytes

SHOWN = ("allocated", "reserved")


def judge(
    test: str, measured: Measured, limits: Sequence[Limit], plan: Plan | None, card: GpuCard
) -> dict[str, Any]:
    """What there is to say of a test, in plain JSON, as xdist can carry it.

    Args:
        test: Its node id.
        measured: What it measured since it was last judged.
        limits: What it may take.
        plan: What to compare with.
        card: Where it ran.

    Returns:
        ``failures``: texts, one for each reason to fail. ``rows``: (region, allocated, reserved,
        against the baseline). ``not_compared``: reasons. ``measured``: name -> document. ``where``,
        ``versions``: of the card. ``baseline``: what was compared with. ``notes``.
    """
    found = measured.take()
    failures = [text for limit in limits if (text := excess(limit, found))]
    baseline: Baseline | None = None
    reasons: list[str] = []
    if plan is not None and plan.baselines is not None:
        baseline, reasons = baselines.choose(plan.baselines, card.where, card.versions)
    checks: dict[str, Check] = {}
    for own in found if baseline is not None and plan is not None else ():
        assert baseline is not None and plan is not None
        then = baseline.measurement(test, own.name)
        if then is None:
            reasons.append(f"{test}, {own.name}: not in {baseline}")
            continue
        checks[own.name] = check(own, then, plan.allowed)
        if checks[own.name].refused:
            reasons.append(f"{test}, {own.name}: {checks[own.name].refused}")
    worse = [found for found in checks.values() if found.outcome == "worse"]
    for found_check in [c for c in worse if c.name != WHOLE] or worse:  # the whole says no more
        failures.append("\n".join((f"Against {baseline}:", *findings.lines(found_check))))
    return {
        "failures": failures,
        "rows": [(own.name, *_figures(own), against(checks.get(own.name))) for own in found],
        "not_compared": [printable(reason, 300) for reason in reasons],
        "measured": {own.name: document_of(own, card.where, card.versions) for own in found},
        "where": dict(card.where),
        "versions": dict(card.versions),
        "baseline": "" if baseline is None else str(baseline),
        "changed": "" if not checks else findings.versions_text(next(iter(checks.values()))),
        "notes": [printable(f"{test}, {note}", 300) for note in measured.notes],
    }


def _figures(measurement: Measurement) -> list[str]:
    return [format_bytes(measurement.figures[name]) if name in measurement.figures else "-"
            for name in SHOWN]  # fmt: skip


def against(found: Check | None) -> str:
    """The allocated peak against its baseline, in a cell."""
    if found is None or found.refused:
        return "-"
    change = next((c for c in found.changes if c.metric == "allocated"), None)
    difference = findings.difference(change) if change else ""
    word = found.outcome if found.outcome != "same" else ""
    return ", ".join(filter(None, (difference or "as it was", word)))


def failure_report(measurement: Measurement) -> str:
    """What to show beside the traceback of a region that ran out of memory."""
    lines = [f"{printable(measurement.name)}: {measurement.failed}."]
    if measurement.peak:
        lines += ["", *owner_table(measurement.peak)]
    return "\n".join(lines)
