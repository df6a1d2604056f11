"""What ``vramplan check`` shows people: the answer, then what got worse, then the rest briefly."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vramplan.cli import output
from vramplan.names import printable
from vramplan.regression import Change, Check, Checked, Outcome
from vramplan.report import findings as f
from vramplan.units import format_bytes

MAX_LISTED = 10
WORDS: dict[Outcome, tuple[str, str]] = {
    "worse": ("Worse", "red"),
    "better": ("Better", "green"),
    "same": ("Same", "green"),
    "not judged": ("Not compared", "yellow"),
}


def print_checked(out: Console, checked: Checked) -> None:
    """Everything that was compared."""
    found = f.by_outcome(checked.checks)
    single = len(checked.checks) == 1 and not (checked.missing or checked.new)
    if not single:
        out.print(Text(f.summary(checked), style="bold"))
    for outcome, checks in found.items():
        if single or outcome == "worse":
            for check in checks:
                _print_one(out, check, spaced=not single)
        elif outcome != "same":
            _print_list(out, WORDS[outcome][0], map(f.headline, checks))
    _print_list(out, "Missing", map(printable, checked.missing))
    _print_list(out, "New", map(printable, checked.new))


def _print_one(out: Console, check: Check, *, spaced: bool) -> None:
    """One measurement at length."""
    if spaced:
        out.print()
    word, style = WORDS[check.outcome]
    out.print(Text(f"{word}: ", style=style) + Text(f.headline(check)), soft_wrap=True)
    if blame := f.culprit(check.grown):
        out.print(Text(f"Most of it: {blame}."), soft_wrap=True)
    if changed := f.versions_text(check):
        out.print(Text(f"Changed: {changed}."), soft_wrap=True)
    _print_grown(out, check)
    _print_figures(out, f.changed(check))
    if equal := f.equal(check):
        out.print(Text(f"As before: {equal}.", style="dim"))
    if reasons := f.unjudged(check):
        out.print(Text(f"Not judged: {reasons}.", style="dim"))


def _print_grown(out: Console, check: Check) -> None:
    """Which modules hold more of what."""
    shown, rest = f.largest(check)
    if not shown:
        return
    table = output.plain_table((f.moment(check), "left"), ("baseline", "right"), ("now", "right"),
                               ("change", "right"))  # fmt: skip
    for growth in (*shown, *([rest] if rest else ())):
        table.add_row(
            f.growth_name(growth),
            format_bytes(growth.before_bytes),
            format_bytes(growth.after_bytes),
            f.signed("allocated", growth.nbytes),
        )
    out.print()
    out.print(table)


def _print_figures(out: Console, changes: Iterable[Change]) -> None:
    """The figures that are not what they were."""
    table = output.plain_table(
        *((head, "left" if head in ("figure", "") else "right") for head in f.FIGURE_HEADINGS)
    )
    for change in changes:
        *cells, outcome = f.figure_row(change)
        style = WORDS[change.outcome][1] if outcome else ""
        table.add_row(*cells, Text(outcome, style=style))
    if table.row_count:
        out.print()
        out.print(table)


def _print_list(out: Console, title: str, texts: Iterable[str]) -> None:
    """A heading and a line each; the first few of many."""
    found = list(texts)
    if not found:
        return
    out.print()
    out.print(Text(title, style="bold"))
    for text in found[:MAX_LISTED]:
        out.print(Text(text), soft_wrap=True)
    if len(found) > MAX_LISTED:
        out.print(Text(f"and {len(found) - MAX_LISTED} more", style="dim"))


def print_accepted(fates: Mapping[str, str], baseline: Path) -> None:
    """What became of the baseline, on stderr: the comparison alone is the output."""
    for name, fate in fates.items():
        if fate != "unchanged":
            print(f"{fate}: {printable(name)}", file=sys.stderr)
    same = sum(fate == "unchanged" for fate in fates.values())
    print(
        f"{baseline} is the new baseline" + (f"; {same} unchanged" if same else ""),
        file=sys.stderr,
    )
