"""The one place that prints."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.profile import Profile
from vramplan.units import format_bytes

MIN_WIDTH = 40
PIPED_WIDTH = 100
VERDICT_STYLES = {"fits": "green", "tight": "yellow", "no": "red", "unknown": "dim"}


class _Output(Console):
    """Leaves a reader who went away to ``main``: the exit code that rich takes is an answer."""

    def on_broken_pipe(self) -> None:
        """Raise what rich has caught."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output: the terminal's width, or a fixed one when piped."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        width = max(MIN_WIDTH, min(shutil.get_terminal_size().columns, 120))
    else:
        width = PIPED_WIDTH
    return _Output(width=width, highlight=False, emoji=False, markup=False)


def print_json(document: dict[str, Any]) -> None:
    """One document and nothing else."""
    print(json.dumps(document, indent=2))


def plain_table(*columns: tuple[str, str], title: str | None = None) -> Table:
    """A quiet table; columns are (heading, justification)."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, justify in columns:
        table.add_column(heading, justify=justify, header_style="bold", overflow="fold")  # type: ignore[arg-type]
    return table


def verdict_text(verdict: str) -> Text:
    """A verdict in its colour; the word says it without colour too."""
    return Text(verdict, style=VERDICT_STYLES[verdict])


def bar(share: float, width: int) -> str:
    """A horizontal bar of ``width`` cells for a share of the whole."""
    cells = max(0.0, min(share, 1.0)) * width
    full = int(cells)
    eighths = int((cells - full) * 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")


def print_parts(out: Console, parts: dict[str, int], whole: int, whole_name: str) -> None:
    """A bar per part against the whole."""
    table = plain_table(("", "left"), ("", "right"), ("", "right"), ("", "left"))
    table.show_header = False
    width = max(8, min(40, out.width - 46))
    for name, size in sorted(parts.items(), key=lambda item: -item[1]):
        share = size / whole
        table.add_row(name.replace("_", " "), format_bytes(size), f"{share:.1%}", bar(share, width))
    out.print(table)
    out.print(Text(f"100% = {whole_name}, {format_bytes(whole)}", style="dim"))


def profile_line(profile: Profile) -> str:
    """Which measured constants an answer rests on, and how far they may be off."""
    doubt = format_bytes(profile.doubt_bytes)
    if profile.borrowed:
        return (
            f"CUDA context and kernels are assumed from {profile.name}; this card's may be up to "
            f"{doubt} smaller. `vramplan calibrate` measures them."
        )
    return f"CUDA context and kernels from {profile.name}, within {doubt}."


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], Callable[[str], None]]]:
    """A bar on stderr with the time left; without a terminal, only the lines told.

    Args:
        total: How many things will be done.

    Yields:
        To be called with the name of each thing as it begins; it returns a function that tells a
        line about it.
    """
    from rich.progress import (  # noqa: PLC0415 - only where something takes long
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    err = Console(stderr=True, highlight=False, emoji=False, markup=False)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
        MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as shown:
        task = shown.add_task("", total=total)
        begun = 0

        def begin(name: str) -> Callable[[str], None]:
            nonlocal begun
            shown.update(task, description=name, completed=begun)
            begun += 1
            return lambda line: err.print(line, soft_wrap=True)

        yield begin
        shown.update(task, completed=total)
