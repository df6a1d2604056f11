"""``vramplan compare``: cards, models and methods side by side, and measured runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vramplan import __version__
from vramplan.catalogue import find_model
from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.comparing import compare
from vramplan.comparison import Comparison, Entry, Run, differences
from vramplan.errors import UsageError
from vramplan.files import provenance, write_text
from vramplan.gpus import find_gpu, load_gpus
from vramplan.job import Job, expand
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.record import Record

FORMS = (".html", ".md", ".csv", ".json")


@app.command("compare")
@o.with_sweep
def compare_command(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RECORDS]", help="Records of vramplan measure, or folders.", show_default=False
        ),
    ] = None,
    *,
    model: Annotated[
        list[str] | None, typer.Option(help=f"{o.MODEL_HELP} Repeatable.", show_default=False)
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A card (see `vramplan gpus`), repeatable, or all.", show_default=False),
    ] = None,
    sweep: dict[str, Any],
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="CARD=PRICE", help="What an hour of a card costs, repeatable."),
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", help=f"Where to write it ({', '.join(FORMS)}), repeatable.",
            show_default=False,
        ),
    ] = None,
    force: o.ForceOption = False,
) -> None:  # fmt: skip
    """Cards, models and methods side by side; with records, measured beside predicted."""
    paths = out or []
    o.check_outputs(paths, FORMS, force=force)
    if any(path.suffix == ".html" for path in paths):
        o.needs("an HTML page", "jinja2", "matplotlib")
    names = list(load_gpus()) if "all" in (gpu or []) else gpu or []
    jobs = [Job.from_dict(values) for values in expand(sweep)]
    kept = read_records(records or [])
    models = [find_model(name) for name in model or []]
    for found in models:
        for job in jobs:
            o.check_length(found, job)
    number = len(kept) + len(models) * len(jobs)
    with output.progress(number) as begin:
        comparison = compare(
            models, names, jobs, records=kept, prices=prices(price or []), told=begin
        )
    if not paths:
        print_comparison(comparison)
    for path in paths:
        write_text(path, form(comparison, path.suffix))
        print(f"written: {path}", file=sys.stderr)


def read_records(paths: list[Path]) -> list[Record]:
    """The records of files and folders, in the order given.

    Raises:
        UsageError: If a folder has none.
        RecordError: If one cannot be read, or is of a newer version.
    """
    if not paths:
        return []
    o.needs("reading records", "pydantic")
    from vramplan.record import read_record  # noqa: PLC0415 - needs pydantic

    found = []
    for path in paths:
        own = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not own:
            raise UsageError(f"{path} holds no records (*.json)")
        found += own
    return [read_record(path) for path in dict.fromkeys(found)]


def prices(texts: list[str]) -> dict[str, float]:
    """Price of an hour by card.

    Raises:
        UsageError: If a text is not ``CARD=PRICE``.
    """
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            found[find_gpu(name).slug] = float(number)
        except ValueError:
            raise UsageError(f"--price {text}: write CARD=PRICE, such as t4-16gb=0.35") from None
    return found


def origin() -> dict[str, Any]:
    """Command, date, commit and version, for whoever wants to make it again."""
    return provenance() | {"vramplan": __version__}


def form(comparison: Comparison, suffix: str) -> str:
    """The comparison in the form of a file name."""
    from vramplan.report.page import to_csv, to_html, to_markdown  # noqa: PLC0415
    from vramplan.report.rows import csv_table, json_document  # noqa: PLC0415

    if suffix == ".json":
        return json.dumps(json_document(comparison, origin()), indent=1) + "\n"
    if suffix == ".csv":
        return to_csv(csv_table(comparison))
    from vramplan.report.comparison import comparison_page  # noqa: PLC0415

    page = comparison_page(comparison, origin(), draw=suffix == ".html")
    return to_html(page) if suffix == ".html" else to_markdown(page)


# -- for people ----------------------------------------------------------------------------------


def print_comparison(comparison: Comparison) -> None:
    """A table of jobs on cards, and one of runs."""
    if comparison.entries:
        print_entries(comparison.entries)
    if comparison.runs:
        print_runs(comparison.runs)


def print_entries(entries: tuple[Entry, ...]) -> None:
    """One row per job and card; a job is named once."""
    out = output.console()
    table = output.plain_table(
        ("model", "left"), ("method", "left"), ("card", "left"), ("takes", "right"),
        ("verdict", "left"), ("to spare", "right"), ("batch", "right"), ("sequence", "right"),
    )  # fmt: skip
    sizes = {(entry.job.batch_size, entry.job.seq_len) for entry in entries}
    more = differences(entries)
    before = None
    for entry in entries:
        name = (entry.model.name, f"{entry.asked.method} {more[entry.key]}".rstrip())
        largest = (entry.largest_batch_size, entry.largest_seq_len)
        table.add_row(
            *(name if name != before else ("", "")),
            entry.gpu.slug,
            format_bytes(entry.device_peak_bytes),
            output.verdict_text(entry.verdict),
            "" if entry.headroom_bytes is None else format_bytes(entry.headroom_bytes),
            *("-" if number is None else f"{number:,}" for number in largest),
        )
        before = name
    out.print(table)
    if len(sizes) == 1:
        batch_size, seq_len = sizes.pop()
        out.print(f"Batch {batch_size} of {seq_len:,} tokens.", style="dim", end=" ")
    out.print("batch, sequence: the largest that fits, the rest unchanged.", style="dim")
    out.print("-o report.html makes a page of it", style="dim")


def print_runs(runs: tuple[Run, ...]) -> None:
    """One row per record; what all runs share is said once."""
    out = output.console()
    optional = {
        "card": [run.card for run in runs],
        "torch": [run.record.versions.get("torch") or "" for run in runs],
        "commit": [(run.record.commit or "")[:9] for run in runs],
    }
    differ = {name: texts for name, texts in optional.items() if len(set(texts)) > 1}
    table = output.plain_table(
        ("run", "left"), ("ended", "left"), ("allocated", "right"), ("predicted", "right"),
        ("off by", "right"), *((name, "left") for name in differ),
    )  # fmt: skip
    for number, run in enumerate(runs):
        figure = next((f for f in run.figures if f.name == "peak allocated"), None)
        measured = run.record.peak_allocated_bytes
        error = figure.error if figure else None
        table.add_row(
            run.record.name,
            run.ending,
            "" if measured is None else format_bytes(measured),
            format_bytes(figure.predicted) if figure else run.why_not,
            "" if error is None else f"{error:+.2%}",
            *(texts[number] for texts in differ.values()),
        )
    out.print(table)
    shared = [
        f"{name} {texts[0]}" for name, texts in optional.items() if name not in differ and texts[0]
    ]
    if shared:
        out.print(f"All with {', '.join(shared)}.", style="dim")
    out.print("-o report.html shows every figure", style="dim")
