"""``vramplan accuracy``: every recorded run beside its prediction."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from vramplan import foretold
from vramplan.accuracy import distinct, rows
from vramplan.accuracy_tables import accuracy_page
from vramplan.catalogue import FoundConfig, model_from_config
from vramplan.cli import app
from vramplan.cli.options import check_outputs
from vramplan.files import write_text
from vramplan.gpus import find_gpu
from vramplan.job import Job, recorded_job
from vramplan.measure.spec import RunSpec, read_matrix
from vramplan.prediction import Prediction
from vramplan.prediction import predict as predict_job
from vramplan.profile import REFERENCE_GPU
from vramplan.ratchet import read_errors, worse
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
    predict: Annotated[
        Path | None,
        typer.Option(
            "--predict",
            metavar="MATRIX",
            help="Write predictions of this matrix's runs that are not measured yet (.json).",
            show_default=False,
        ),
    ] = None,
    traces: Annotated[
        bool,
        typer.Option("--traces", help="Trace every recorded job and write what comes out (.json)."),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            metavar="CSV",
            help="Compare with a committed record: exit code 1 if any figure got worse.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """How right the predictions are, from recorded runs."""
    forms = (".json",) if traces or predict is not None else FORMS
    check_outputs(output or [], forms, force=force)
    folder = folder or profiles_dir() / "calibrations" / REFERENCE_GPU
    if traces or predict is not None:
        told = traced(folder) if predict is None else unmeasured(folder, predict)
        text = json.dumps(foretold.document(told, find_gpu(folder.name)), indent=1) + "\n"
        if not output:
            print(text, end="")
        for path in output or []:
            write_text(path, text)
        return
    if check is not None:
        grown = worse(rows(folder), read_errors(check))
        for line in grown:
            print(line)
        print("no figure got worse" if not grown else f"worse than {check}", file=sys.stderr)
        raise typer.Exit(1 if grown else 0)
    page = accuracy_page(folder)
    if not output:
        print(to_markdown(page), end="")
    for path in output or []:
        write_text(path, form(page, path.suffix))
        print(f"written: {path}", file=sys.stderr)


def unmeasured(folder: Path, matrix: Path) -> Iterator[tuple[str, Prediction]]:
    """Predictions for the runs of a matrix that have no record yet, on the folder's card."""
    card = find_gpu(folder.name)
    blank = RunSpec(name="", model="", config={}, job=Job())
    for row in read_matrix(matrix, blank):
        for spec in row.specs:
            if not (folder / "runs" / f"{spec.name}.json").exists():
                model = model_from_config(spec.config, spec.model)
                yield spec.name, predict_job(model, spec.job, card, random_weights=True)


def traced(folder: Path) -> Iterator[tuple[str, Prediction]]:
    """What the trace says of every recorded job, repeats left out; jobs that it refuses are not."""
    from vramplan.cli.witness import tracer_of  # noqa: PLC0415 - needs torch

    card = find_gpu(folder.name)
    for row in distinct(rows(folder)):
        record = row.record
        if record.peak_allocated_bytes is None:
            continue
        found = FoundConfig(record.model, record.config, record.name)
        print(record.name, file=sys.stderr)
        yield record.name, tracer_of(found)(recorded_job(record), card)


def form(page: Page, suffix: str) -> str:
    """The page in the form of a file name; a CSV holds its last table, every run."""
    if suffix == ".csv":
        return to_csv(page.tables[-1])
    return to_html(page) if suffix == ".html" else to_markdown(page)
