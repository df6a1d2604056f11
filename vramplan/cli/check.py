"""``vramplan check``: whether a measurement needs more than its baseline."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.cli.checked import print_accepted, print_checked
from vramplan.errors import UnknownNameError, UsageError
from vramplan.files import write_text
from vramplan.regression import Accepted, Checked, Threshold, thresholds
from vramplan.report.checks import to_document, to_github, to_junit, to_markdown

EXIT_CODES = {"same": 0, "better": 0, "worse": 1, "not judged": 2}
FORMATS = ("text", "markdown", "junit", "github", "json")
SUFFIXES = {".md": "markdown", ".xml": "junit", ".json": "json"}


@app.command("check")
def check_command(
    current: Annotated[
        Path | None,
        typer.Argument(metavar="CURRENT", help="A record, or a folder of them, as it is now."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Argument(metavar="BASELINE", help="The same as it was.")
    ] = None,
    predicted: Annotated[
        Path | None,
        typer.Option(
            metavar="BASELINE",
            help="Without a GPU: what the installed libraries would need, against this file.",
            show_default=False,
        ),
    ] = None,
    matrix: Annotated[
        Path | None,
        typer.Option(
            help="With --predicted: TOML file with its [[run]] tables [default: its own jobs].",
            show_default=False,
        ),
    ] = None,
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
        bool, typer.Option("--update", help="Accept what is now as the new BASELINE.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files that exist; accept runs that failed."),
    ] = False,
) -> None:  # fmt: skip
    """Whether records or predictions need more than before: exit code 1 if so, 2 if unknown."""
    form = _form(form, json_)
    paths = out or []
    o.check_outputs(paths, tuple(SUFFIXES), force=force)
    o.needs("reading records", "pydantic")
    allowed = thresholds(fail)
    if predicted is not None:
        if current is not None:
            raise UsageError("--predicted BASELINE needs no records: leave out CURRENT")
        from vramplan.cli.gate import gate  # noqa: PLC0415 - records need none of the estimator

        found, kept = gate(predicted, matrix, allowed, update=update), predicted
    else:
        if current is None or baseline is None or matrix is not None:
            raise UsageError("name CURRENT and BASELINE, or --predicted BASELINE [--matrix FILE]")
        found, kept = _measured(current, baseline, allowed, update=update, force=force), baseline
    checked = found.checked
    for path in paths:
        write_text(path, rendered(checked, SUFFIXES[path.suffix]))
        print(f"written: {path}", file=sys.stderr)
    if not quiet and form != "text":
        print(rendered(checked, form), end="")
    elif not quiet and (checked.checks or not update):
        print_checked(output.console(), checked)
    if update and not quiet:
        print_accepted(found.fates, kept)
    raise typer.Exit(0 if update else EXIT_CODES[checked.outcome])


def _measured(
    current: Path,
    baseline: Path,
    allowed: Mapping[str, Threshold | None],
    *,
    update: bool,
    force: bool,
) -> Accepted:
    """Records against records."""
    from vramplan.pairing import accept, compare  # noqa: PLC0415 - needs pydantic

    if update:
        return accept(current, baseline, allowed, force=force)
    return Accepted(compare(current, baseline, allowed), {})


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
