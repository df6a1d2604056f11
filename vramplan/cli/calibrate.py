"""``vramplan calibrate``: records of measured runs become the constants of a card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from vramplan.calibrate import Fitted, find_records, fit_profiles, write_profile
from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.profile import Constant
from vramplan.resources import user_calibrations_dir
from vramplan.units import format_bytes, format_rate, format_seconds

FOLDER = Path("vramplan-records")


@app.command()
def calibrate(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Records, or folders of them [default: vramplan-records].", show_default=False
        ),
    ] = None,
    output_folder: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where profiles go [default: your data folder].",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a profile that exists.")] = False,
    as_json: o.JsonOption = False,
) -> None:
    """Fit a card's constants to measured runs; `fit` and `estimate` then use them by themselves."""
    fitted = fit_profiles(find_records(records or [FOLDER]))
    if not dry_run:
        folder = output_folder or user_calibrations_dir()
        for one in fitted:
            path = write_profile(folder, one, force=force)
            print(f"profile: {path}", file=sys.stderr)
    if as_json:
        output.print_json({"schema_version": 1, "profiles": [dict(one.document) for one in fitted]})
        return
    for one in fitted:
        print_profile(one)


def print_profile(fitted: Fitted) -> None:
    """The constants with their residuals."""
    out = output.console()
    profile = fitted.profile
    out.print(
        f"{profile.gpu_name}, driver {profile.driver}, torch {profile.torch}: "
        f"{fitted.document['num_records']} runs"
    )
    out.print()
    table = output.plain_table(
        ("constant", "left"), ("value", "right"), ("off by", "right"), ("lowest", "right"),
        ("highest", "right"), ("runs", "right"), ("confidence", "left"),
    )  # fmt: skip
    for name, constant in profile.constants.items():
        unit = constant.unit
        table.add_row(
            name.replace("_", " "),
            text_of(constant.value, unit),
            text_of(constant.residual, unit),
            text_of(constant.low, unit),
            text_of(constant.high, unit),
            str(constant.num_observations),
            _confidence(constant),
        )
    out.print(table)
    out.print(Text("off by: median distance from the value over the runs", style="dim"))


def _confidence(constant: Constant) -> str:
    return constant.confidence if constant.num_observations else "assumed"


def text_of(value: float, unit: str) -> str:
    """A constant for people."""
    if unit == "bytes":
        return format_bytes(int(value))
    if not unit:
        return f"{value:.3g}"
    if unit == "s":
        return format_seconds(value)
    return format_rate(value, unit.removesuffix("/s"))
