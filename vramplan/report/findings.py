"""What a Check found, in words: shared by the terminal, pull requests, JUnit and annotations.

Names come from files that others wrote: every text here is printable, on one line and not too long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vramplan.names import OUTSIDE, printable
from vramplan.regression import LEAKS, METRICS, SILENT, Change, Check, Checked, Growth, Outcome
from vramplan.units import GIB, MIB, format_bytes, format_seconds

MAX_OWNERS = 5
MAX_VERSIONS = 8
MOST = 0.9  # of the growth, for one module to answer for it
FIRST = ("per_step", "leaked", "allocated", "min_limit", "ready", "load")  # what explains the rest
ORDER: tuple[Outcome, ...] = ("worse", "not judged", "better", "same")
FIGURE_HEADINGS = ("figure", "baseline", "now", "change", "allowed", "")


def amount(metric: str, value: float | None) -> str:
    """A figure with its unit; "-" where there is none."""
    if value is None:
        return "-"
    if not METRICS[metric].timed:
        return format_bytes(int(value))
    return f"{value:,.0f}" if METRICS[metric].higher_is_better else format_seconds(value)


def difference(change: Change) -> str:
    """By how much, absolute and relative: ``+196.5 MiB (+4.9%)``; empty if equal or unknown."""
    if change.before is None or change.after is None or change.before == change.after:
        return ""
    text = signed(change.metric, change.after - change.before)
    return text if change.share is None else f"{text} ({change.share:+.1%})"


def signed(metric: str, value: float) -> str:
    """An amount with its sign."""
    return ("-" if value < 0 else "+") + step(metric, abs(value))


def step(metric: str, value: float) -> str:
    """A difference without its sign: finer than a figure, in MiB up to a GiB."""
    if not METRICS[metric].timed and MIB <= value < GIB:
        return f"{value / MIB:,.1f} MiB"
    return amount(metric, value)


def principal(check: Check) -> Change | None:
    """The change to tell first: of those that decide the outcome, the one that explains most."""
    found = {c.metric: c for c in check.changes if c.outcome == check.outcome != "same"}
    return next((found[name] for name in (*FIRST, *METRICS) if name in found), None)


def by_outcome(checks: Iterable[Check]) -> dict[Outcome, list[Check]]:
    """The checks in the order in which they matter."""
    found: dict[Outcome, list[Check]] = {}
    for outcome in ORDER:
        if own := [check for check in checks if check.outcome == outcome]:
            found[outcome] = own
    return found


def summary(checked: Checked) -> str:
    """The one answer, or how many of what: ``Of 12 measurements 1 is worse, 1 is missing.``."""
    checks, whole = checked.checks, sum(map(len, (checked.checks, checked.missing, checked.new)))
    if len(checks) == whole == 1:
        return headline(checks[0])
    found = by_outcome(checks)
    same = "as it was" if len(found.get("same", ())) == 1 else "as they were"
    words = {"worse": "worse", "not judged": "not compared", "better": "better", "same": same}
    counts = [(len(found[outcome]), words[outcome]) for outcome in found]
    counts += [(len(checked.missing), "missing"), (len(checked.new), "new")]
    texts = [f"{n} {'is' if n == 1 else 'are'} {word}" for n, word in counts if n]
    plural = "" if whole == 1 else "s"
    return f"Of {whole} measurement{plural} {', '.join(texts)}."


def headline(check: Check) -> str:
    """The answer in one sentence."""
    name = printable(check.name)
    if check.refused:
        return f"{name}: {printable(check.refused, 400)}."
    if check.failed:
        return f"{name} no longer runs: {printable(check.failed)}."
    change = principal(check)
    if change is None and check.mended:
        return f"{name} runs; the baseline ran {printable(check.mended)}."
    if change is None:
        return f"{name} is as it was{_whole(check)}."
    metric = METRICS[change.metric]
    words = ("is slower", "is faster") if metric.timed else ("needs more", "needs less")
    before, after = amount(change.metric, change.before), amount(change.metric, change.after)
    phase = f", {_where(check)}" if check.phase == OUTSIDE else f" {_where(check)}"
    if not check.phase or metric.timed:
        phase = ""
    by = f", {difference(change)}" if change.before else ""
    word = words[check.outcome == "better"]
    return f"{name} {word}: {metric.title} {before} -> {after}{by}{phase}."


def moment(check: Check) -> str:
    """When the modules held what they are said to hold."""
    change = principal(check)
    if change is not None and change.metric in LEAKS:
        return "left behind by a step" if change.metric == "per_step" else "left behind"
    if check.phase == OUTSIDE:
        return f"at the fullest moment {OUTSIDE}"
    return f"at the fullest moment of {printable(check.phase)}" if check.phase else "at the peak"


def _where(check: Check) -> str:
    return OUTSIDE if check.phase == OUTSIDE else f"in {printable(check.phase)}"


def _whole(check: Check) -> str:
    """The figure that stands for a measurement in which nothing changed."""
    same = {c.metric: c for c in check.changes if c.outcome == "same"}
    name = next((name for name in ("allocated", *METRICS) if name in same), None)
    if name is None:
        return ""
    return f": {METRICS[name].title} {amount(name, same[name].after)}"


# -- modules ---------------------------------------------------------------------------------------


def growth_name(growth: Growth) -> str:
    """Kind and module: ``activations of model.layers.*.mlp (24 layers)``."""
    layers = f" ({growth.num_layers} layers)" if growth.num_layers > 1 else ""
    return _named(growth.kind, growth.owner) + layers


def _named(kind: str, module: str) -> str:
    """Kind, module, or both: what regions of a test hold need not be a module's."""
    return " of ".join(filter(None, (printable(kind).replace("_", " "), printable(module))))


def largest(check: Check) -> tuple[Sequence[Growth], Growth | None]:
    """The growths to show, and all others as one."""
    shown, rest = check.grown[:MAX_OWNERS], check.grown[MAX_OWNERS:]
    if not rest:
        return shown, None
    before, after = (sum(sizes) for sizes in zip(*(g[3:5] for g in rest), strict=True))
    return shown, Growth("", f"{len(rest)} smaller ones", 0, before, after)


def culprit(grown: Iterable[Growth]) -> str:
    """The innermost module that most of the growth is in, with its kind; empty if none is.

    A layer has many modules: where all of one's grew, the layer is to blame.
    """
    found = list(grown)
    whole = sum(growth.nbytes for growth in found) * MOST
    inside: dict[str, int] = {}
    kinds: dict[str, int] = {}
    for growth in found:
        parts = growth.owner.split(".")
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            inside[module] = inside.get(module, 0) + growth.nbytes
        kinds[growth.kind] = kinds.get(growth.kind, 0) + growth.nbytes
    modules = [name for name, size in inside.items() if size >= whole]
    owners = {growth.owner for growth in found}
    module = max(modules, key=lambda name: name.count("."), default="")
    kind = next((name for name, size in kinds.items() if size >= whole), "")
    if not module and inside.get("", 0) >= whole:
        return _named(kind, "")
    if not module or ("." not in module and module not in owners):  # the whole model is no culprit
        return ""
    return _named(kind, module)


# -- versions and figures --------------------------------------------------------------------------


def versions(check: Check) -> list[tuple[str, str, str]]:
    """What differs besides the figures: (what, then, now); a last line for those not shown."""
    items = [(printable(n), printable(a, 60), printable(b, 60)) for n, (a, b)
             in check.versions.items()]  # fmt: skip
    hidden = len(items) - MAX_VERSIONS
    return items[:MAX_VERSIONS] + ([(f"{hidden} more", "", "")] if hidden > 0 else [])


def versions_text(check: Check) -> str:
    """The same in one line; empty if nothing differs."""
    return ", ".join(
        f"{name} {then} -> {now}" if then or now else f"and {name}"
        for name, then, now in versions(check)
    )


def figure_row(change: Change) -> tuple[str, ...]:
    """Cells of one figure, as ``FIGURE_HEADINGS`` name them."""
    allowed = "" if change.allowed is None else step(change.metric, change.allowed)
    return (
        METRICS[change.metric].title,
        amount(change.metric, change.before),
        amount(change.metric, change.after),
        difference(change),
        allowed,
        "" if change.outcome == "same" or change.why in SILENT else change.outcome,
    )


def changed(check: Check) -> list[Change]:
    """The figures that are not what they were; where nothing is worse, those that were judged."""
    quiet = check.outcome == "same"
    return [c for c in check.changes if difference(c) and not (quiet and c.outcome != "same")]


def equal(check: Check) -> str:
    """The figures that are equal on both sides."""
    return ", ".join(
        METRICS[c.metric].title for c in check.changes if c.outcome == "same" and not difference(c)
    )


def unjudged(check: Check) -> str:
    """Figures that were not judged, with the reason once; empty if all were."""
    reasons: dict[str, list[str]] = {}
    for change in check.changes:
        if change.outcome == "not judged" and change.why not in SILENT:
            reasons.setdefault(change.why, []).append(METRICS[change.metric].title)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())


def lines(check: Check) -> list[str]:
    """All of it as plain text, the answer first."""
    told = [headline(check)]
    if blame := culprit(check.grown):
        told.append(f"Most of it: {blame}.")
    shown, rest = largest(check)
    told += [
        f"{signed('allocated', growth.nbytes)} {growth_name(growth)}"
        for growth in (*shown, *([rest] if rest else ()))
    ]
    if text := versions_text(check):
        told.append(f"Changed: {text}.")
    for change in changed(check):
        title, before, after, by, allowed, outcome = figure_row(change)
        limit = f", allowed {allowed}" if allowed else ""
        told.append(f"{title}: {before} -> {after}, {by}{limit}{', ' if outcome else ''}{outcome}")
    return told
