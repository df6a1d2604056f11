"""A finished check for machines and for other people's pages.

Markdown for a comment on a pull request, JUnit's XML, GitHub's workflow annotations, and JSON. What
comes from records is escaped for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from vramplan.names import printable
from vramplan.regression import Check, Checked
from vramplan.report import findings as f
from vramplan.units import format_bytes

SCHEMA_VERSION = 1
MAX_DETAILS = 20  # GitHub refuses comments of more than 65,536 characters
MAX_ROWS = 60
SIGNS = {"worse": "❌", "not judged": "⚠️", "better": "✅", "same": "✅"}
NOT_COMPARED = "only the baseline has it"

# -- JSON ------------------------------------------------------------------------------------------


def to_document(checked: Checked) -> dict[str, Any]:
    """One document; bytes, seconds and tokens per second as they are, null where unknown."""
    return {
        "schema_version": SCHEMA_VERSION,
        "outcome": checked.outcome,
        "checks": [_check_document(check) for check in checked.checks],
        "missing": list(checked.missing),
        "new": list(checked.new),
    }


def _check_document(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "outcome": check.outcome,
        "headline": f.headline(check),
        "phase": check.phase or None,
        "refused": check.refused or None,
        "failed": check.failed or None,
        "mended": check.mended or None,
        "changes": [
            {
                "metric": change.metric,
                "before": change.before,
                "after": change.after,
                "allowed": change.allowed,
                "share": change.share,
                "outcome": change.outcome,
                "why": change.why or None,
            }
            for change in check.changes
        ],
        "grown": [growth._asdict() for growth in check.grown],
        "versions": {
            name: {"before": before, "after": after}
            for name, (before, after) in check.versions.items()
        },
    }


# -- Markdown --------------------------------------------------------------------------------------


def to_markdown(checked: Checked) -> str:
    """A comment for a pull request: one line, a table of what changed, the details folded."""
    sign = SIGNS[checked.outcome]
    lines = [f"{sign} **vramplan check:** {prose(f.summary(checked))}", ""]
    shown = [c for checks in f.by_outcome(checked.checks).values() for c in checks]
    lines += _markdown_table(shown)
    for title, names in (("Missing", checked.missing), ("New", checked.new)):
        if names:
            more = f" and {len(names) - MAX_ROWS} more" if len(names) > MAX_ROWS else ""
            lines += [f"{title}: {', '.join(map(code, names[:MAX_ROWS]))}{more}", ""]
    detailed = [check for check in shown if check.outcome != "same"]
    for check in detailed[:MAX_DETAILS]:
        title = f"{SIGNS[check.outcome]} {f.headline(check)}" if len(shown) > 1 else "Details"
        lines += _markdown_details(check, prose(title))
    if len(detailed) > MAX_DETAILS:
        lines += [f"{len(detailed) - MAX_DETAILS} more are not shown.", ""]
    return "\n".join(lines)


def code(text: str) -> str:
    """Text of others, as it is, for any place in Markdown."""
    clean = printable(text)
    if clean.strip() and not set("`|\\") & set(clean):
        return f"`{clean}`"
    special = "".join(c if c.isalnum() or c in " .,-/" else f"&#{ord(c)};" for c in clean)
    return f"<code>{special or '(no name)'}</code>"


def prose(text: str) -> str:
    """A sentence with names of others in it: nothing of it is markup, a link, or calls anybody."""
    calls = {c: f"{c}&#8203;" for c in "@#"}  # a space of no width; GitHub reads decoded text
    markup = {c: f"&#{ord(c)};" for c in "&<|`*_[]\\~$"}
    return "".join((calls | markup).get(c, c) for c in text).replace("://", "&#58;//")


def _markdown_table(checks: Sequence[Check]) -> Iterator[str]:
    rows = [(check, change) for check in checks for change in f.changed(check)]
    if not rows:
        return
    yield "| measurement | figure | baseline | now | change | allowed | |"
    yield "|---|---|--:|--:|--:|--:|---|"
    before = None
    for check, change in rows[:MAX_ROWS]:
        cells = (code(check.name) if check is not before else "", *f.figure_row(change))
        yield "| " + " | ".join(cells) + " |"
        before = check
    if len(rows) > MAX_ROWS:
        yield f"| {len(rows) - MAX_ROWS} more | | | | | | |"
    yield ""


def _markdown_details(check: Check, title: str) -> Iterator[str]:
    yield "<details>"
    yield f"<summary>{title}</summary>"
    yield ""
    if blame := f.culprit(check.grown):
        yield f"Most of it: {code(blame)}"
        yield ""
    shown, rest = f.largest(check)
    if shown:
        yield f"| {prose(f.moment(check))} | baseline | now | change |"
        yield "|---|--:|--:|--:|"
        for growth in (*shown, *([rest] if rest else ())):
            sizes = (format_bytes(growth.before_bytes), format_bytes(growth.after_bytes))
            by = f.signed("allocated", growth.nbytes)
            yield f"| {' | '.join((code(f.growth_name(growth)), *sizes, by))} |"
        yield ""
    if differ := f.versions(check):
        yield "| differs | baseline | now |"
        yield "|---|---|---|"
        for row in differ:
            yield f"| {' | '.join(code(cell) if cell else '' for cell in row)} |"
        yield ""
    if reasons := f.unjudged(check):
        yield prose(f"Not judged: {reasons}.")
        yield ""
    yield "</details>"
    yield ""


# -- JUnit -----------------------------------------------------------------------------------------


def to_junit(checked: Checked) -> str:
    """JUnit's XML: one testcase a measurement; missing ones are errors, new ones are skipped."""
    cases = [_junit_case(check) for check in checked.checks]
    cases += [_case(name, "error", "missing", NOT_COMPARED) for name in checked.missing]
    cases += [_case(name, "skipped", "no baseline yet", "") for name in checked.new]
    counts = {
        "tests": len(cases),
        "failures": sum(check.outcome == "worse" for check in checked.checks),
        "errors": len(checked.missing)
        + sum(check.outcome == "not judged" for check in checked.checks),
        "skipped": len(checked.new),
    }
    told = " ".join(f'{name}="{count}"' for name, count in counts.items())
    return "\n".join(
        (
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<testsuites name="vramplan" {told}>',
            f'<testsuite name="vramplan check" {told}>',
            *cases,
            "</testsuite>",
            "</testsuites>\n",
        )
    )


def _junit_case(check: Check) -> str:
    if check.outcome == "worse":
        return _case(check.name, "failure", f.headline(check), "\n".join(f.lines(check)))
    if check.outcome == "not judged":
        return _case(check.name, "error", f.headline(check), "\n".join(f.lines(check)))
    return _case(check.name, "system-out", "", "\n".join(f.lines(check)))


def _case(name: str, element: str, message: str, text: str) -> str:
    attribute = f" message={quoteattr(_xml(message))}" if message else ""
    return (
        f'<testcase classname="vramplan.check" name={quoteattr(_xml(printable(name)))}>'
        f"<{element}{attribute}>{escape(_xml(text))}</{element}></testcase>"
    )


def _xml(text: str) -> str:
    """Without what XML 1.0 has no place for."""
    return "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# -- GitHub ----------------------------------------------------------------------------------------


def to_github(checked: Checked) -> str:
    """Workflow commands: an error for each that is worse or was not compared, else notices."""
    found: list[tuple[str, str, Iterable[str]]] = []
    for outcome, checks in f.by_outcome(checked.checks).items():
        title = {"worse": "Needs more memory", "not judged": "Not compared"}.get(outcome)
        if title is not None:
            found += [("error", title, f.lines(check)) for check in checks]
        elif outcome == "better":
            found += [("notice", "Better", f.lines(check)) for check in checks]
    found += [("error", "Missing", [f"{printable(n)}: {NOT_COMPARED}"]) for n in checked.missing]
    found += [("notice", "New", [f"{printable(n)} has no baseline yet"]) for n in checked.new]
    if len(found) != 1:
        level = "notice" if checked.outcome in ("same", "better") else "error"
        found.append((level, "vramplan check", [f.summary(checked)]))
    return "".join(
        f"::{level} title={_property(title)}::{_message(chr(10).join(lines))}\n"
        for level, title, lines in found
    )


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
