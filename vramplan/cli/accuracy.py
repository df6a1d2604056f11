"""``vramplan accuracy``: every recorded run beside its prediction."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vramplan.accuracy import accuracy_page
from vramplan.cli import app
from vramplan.errors import RecordError, UsageError
from vramplan.profile import REFERENCE_GPU
from vramplan.record import write_text
from vramplan.report.page import Page, to_csv, to_html, to_markdown
from vramplan.resources import profiles_dir

FORMS = (".md", ".html", ".csv")


@app.command()
def accuracy(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A card's calibration folder [default: the shipped one].", show_default=False
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help=f"Where to write it ({', '.join(FORMS)}), repeatable.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """How right the predictions are, from recorded runs."""
    for path in output or []:
        if path.suffix not in FORMS:
            raise UsageError(f"{path}: the name must end in {', '.join(FORMS)}")
        if path.exists() and not force:
            raise RecordError(f"{path} exists; replace it with --force")
    page = accuracy_page(folder or profiles_dir() / "calibrations" / REFERENCE_GPU)
    if not output:
        print(to_markdown(page), end="")
    for path in output or []:
        write_text(path, form(page, path.suffix))
        print(f"written: {path}", file=sys.stderr)


def form(page: Page, suffix: str) -> str:
    """The page in the form of a file name; a CSV holds its last table, every run."""
    if suffix == ".csv":
        return to_csv(page.tables[-1])
    return to_html(page) if suffix == ".html" else to_markdown(page)
