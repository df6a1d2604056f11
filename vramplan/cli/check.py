"""``vramplan check``: whether a measurement needs more than its baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.cli.checked import print_checked
from vramplan.regression import thresholds

EXIT_CODES = {"same": 0, "better": 0, "worse": 1, "not judged": 2}


@app.command("check")
def check_command(
    current: Annotated[
        Path,
        typer.Argument(metavar="CURRENT", help="A record, or a folder of them, as it is now."),
    ],
    baseline: Annotated[
        Path, typer.Argument(metavar="BASELINE", help="The same as it was.")
    ],
    fail: Annotated[
        str,
        typer.Option(
            metavar="FIGURE:BY,...",
            help="How much worse a figure may get: allocated:1%,reserved:200MiB,device:off.",
            show_default=False,
        ),
    ] = "",
) -> None:  # fmt: skip
    """Whether records need more than their baselines: exit code 1 if so, 2 if it cannot be told."""
    o.needs("reading records", "pydantic")
    from vramplan.pairing import compare  # noqa: PLC0415 - needs pydantic

    checked = compare(current, baseline, thresholds(fail))
    print_checked(output.console(), checked)
    raise typer.Exit(EXIT_CODES[checked.outcome])
