"""A page of tables and charts, and its forms: Markdown, HTML, and CSV of one table.

Needs jinja2 for HTML alone. The HTML is one file that asks for nothing from outside and can be read
without script, in light, dark and print.
"""

from __future__ import annotations

import csv
import io
import re
from importlib.resources import files
from typing import NamedTuple

from vramplan.report import missing
from vramplan.report.drawing import Chart

MADE = "How this was made"


class Toned(str):
    """A cell that also says something by its colour: ``fits``, ``tight``, ``no``, ``unknown``."""

    __slots__ = ("tone",)
    tone: str

    def __new__(cls, text: str, tone: str) -> Toned:
        """A cell of this text and tone."""
        cell = super().__new__(cls, text)
        cell.tone = tone
        return cell


class Table(NamedTuple):
    """One section of a page: a heading, a sentence, charts and a table.

    Attributes:
        title: Its heading; empty for the first of a page.
        headings: One per column; empty for a section without a table.
        rows: Cells as text.
        text: A sentence above it.
        charts: What shows the same as a picture.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: str = ""
    charts: tuple[Chart, ...] = ()

    def words(self) -> frozenset[int]:
        """Columns of words, which are set to the left; numbers are set to the right."""
        return (
            frozenset(
                column
                for column in range(1, len(self.headings))
                if any(
                    row[column] and not re.match(r"[-+\u2212]?\d", row[column]) for row in self.rows
                )
            )
            - self.toned()
        )

    def toned(self) -> frozenset[int]:
        """Columns with a colour."""
        return frozenset(c for row in self.rows for c, cell in enumerate(row) if _tone(cell))


def _tone(cell: str) -> str:
    return cell.tone if isinstance(cell, Toned) else ""


class Page(NamedTuple):
    """A whole page.

    Attributes:
        title: Its heading.
        text: An introduction.
        tables: Its sections.
        assumptions: What the figures rest on, one sentence each.
        made: How to make it again: (what, value).
    """

    title: str
    text: str
    tables: tuple[Table, ...]
    assumptions: tuple[str, ...] = ()
    made: tuple[tuple[str, str], ...] = ()


def table_to_markdown(table: Table) -> list[str]:
    """The lines of one table, without its title."""
    if not table.headings:
        return []
    return [
        "| " + " | ".join(_escaped(heading) for heading in table.headings) + " |",
        "|" + "---|" * len(table.headings),
        *("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in table.rows),
    ]


def _escaped(cell: str) -> str:
    """Text as text: what Markdown takes for markup gets a backslash."""
    return re.sub(r"([|<*`\[])", r"\\\1", cell).replace("\n", " ")


def to_markdown(page: Page) -> str:
    """The page as Markdown that reads well as it is; charts as what one sees in them."""
    lines = [f"# {_escaped(page.title)}", "", _escaped(page.text), ""]
    for table in page.tables:
        lines += [f"## {_escaped(table.title)}", ""] if table.title else []
        lines += [_escaped(table.text), ""] if table.text else []
        lines += [*table_to_markdown(table), ""] if table.headings else []
    if page.assumptions:
        lines += ["## Assumptions", "", *(f"- {_escaped(a)}" for a in page.assumptions), ""]
    if page.made:
        lines += [f"## {MADE}", "", *(f"- {_escaped(k)}: {_escaped(v)}" for k, v in page.made), ""]
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """One table for a spreadsheet; no cell of it is taken for a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.headings)
    writer.writerows([_harmless(cell) for cell in row] for row in table.rows)
    return out.getvalue()


def _harmless(cell: str) -> str:
    number = re.fullmatch(r"[+-]?[\d.,]+( %)?( MiB)?", cell)
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") and not number else cell


def to_html(page: Page) -> str:
    """The page as one self-contained file.

    Raises:
        EnvironmentProblem: If jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise missing("an HTML page", "jinja2") from None
    template = files("vramplan.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(page=page, made=MADE) + "\n"


def figures(text: str) -> str:
    """What of a written page must stay the same when it is made again: its words and figures.

    Pictures and the command, date and versions that made it are left out.
    """
    text = re.sub(r"<(svg|style|script)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<footer>.*?</footer>", "", text, flags=re.DOTALL)
    return text.split(f"\n## {MADE}\n")[0]
