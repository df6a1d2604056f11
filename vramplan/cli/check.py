"""``vramplan check``: whether a measurement needs more than its baseline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.cli.checked import print_accepted, print_checked
from vramplan.errors import UnknownNameError, UsageError
from vramplan.files import write_text
from vramplan.regression import Checked, thresholds
from vramplan.report.checks import to_document, to_github, to_junit, to_markdown

EXIT_CODES = {"same": 0, "better": 0, "worse": 1, "not judged": 2}
FORMATS = ("text", "markdown", "junit", "github", "json")
SUFFIXES = {".md": "markdown", ".xml": "junit", ".json": "json"}


@app.command("check")
def check_command(
    current: Annotated[
        Path,
        typer.Argument(metavar="CURRENT", help="A record, or a folder of them, as it is now."),
    ],
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="The same as it was.")],
    fail: Annotated[
        str,
        typer.Option(
            metavar="FIGURE:BY,...",
            help="How much worse a figure may get: allocated:1%,reserved:200MiB,device:off.",
            show_default=False,
        ),
    ] = "",
    form: Annotated[
        str, typer.Option("--format", help=f"What to print: {', '.join(FORMATS)}.")
    ] = "text",
    json_: o.JsonOption = False,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", help=f"Where to write it too ({', '.join(SUFFIXES)}), repeatable.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing; the exit code says it.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Accept CURRENT as the new BASELINE.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files that exist; accept runs that failed."),
    ] = False,
) -> None:  # fmt: skip
    """Whether records need more than their baselines: exit code 1 if so, 2 if it cannot be told."""
    form = _form(form, json_)
    paths = out or []
    o.check_outputs(paths, tuple(SUFFIXES), force=force)
    o.needs("reading records", "pydantic")
    from vramplan.pairing import accept, compare  # noqa: PLC0415 - needs pydantic

    allowed = thresholds(fail)
    accepted = accept(current, baseline, allowed, force=force) if update else None
    checked = accepted.checked if accepted else compare(current, baseline, allowed)
    for path in paths:
        write_text(path, rendered(checked, SUFFIXES[path.suffix]))
        print(f"written: {path}", file=sys.stderr)
    if not quiet and form != "text":
        print(rendered(checked, form), end="")
    elif not quiet and (checked.checks or not accepted):
        print_checked(output.console(), checked)
    if accepted and not quiet:
        print_accepted(accepted.fates, baseline)
    raise typer.Exit(0 if accepted else EXIT_CODES[checked.outcome])


def _form(form: str, json_: bool) -> str:
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    if json_ and form not in ("text", "json"):
        raise UsageError(f"--json and --format {form}: choose one")
    return "json" if json_ else form


def rendered(checked: Checked, form: str) -> str:
    """A finished check in one of the formats for machines and pages."""
    if form == "json":
        return json.dumps(to_document(checked), indent=2) + "\n"
    return {"markdown": to_markdown, "junit": to_junit, "github": to_github}[form](checked)
