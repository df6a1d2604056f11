"""The yardstick: a ten-line typer application that prints two rich tables."""

import typer
from rich.console import Console
from rich.table import Table


def main() -> None:
    for title in ("first", "second"):
        table = Table("name", "value", title=title)
        table.add_row("one", "1")
        Console().print(table)


typer.run(main)
