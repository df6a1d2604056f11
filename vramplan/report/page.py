"""A page of tables, and its three forms. Needs jinja2 for HTML alone."""

from __future__ import annotations

import csv
import io
from typing import NamedTuple

from vramplan.errors import EnvironmentProblem


class Table(NamedTuple):
    """One table.

    Attributes:
        title: Its heading; empty for the first of a page.
        headings: One per column.
        rows: Cells as text.
        text: A sentence above it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: str = ""


class Page(NamedTuple):
    """A title, an introduction and tables."""

    title: str
    text: str
    tables: tuple[Table, ...]


def table_to_markdown(table: Table) -> list[str]:
    """The lines of one table, without its title."""
    return [
        "| " + " | ".join(table.headings) + " |",
        "|" + "---|" * len(table.headings),
        *("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in table.rows),
    ]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def to_markdown(page: Page) -> str:
    """The page as Markdown that reads well as it is."""
    lines = [f"# {page.title}", "", page.text, ""]
    for table in page.tables:
        lines += [f"## {table.title}", ""] if table.title else []
        lines += [table.text, ""] if table.text else []
        lines += [*table_to_markdown(table), ""]
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """One table for a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.headings)
    writer.writerows(table.rows)
    return out.getvalue()


def to_html(page: Page) -> str:
    """The page as one self-contained file, without script.

    Raises:
        EnvironmentProblem: If jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise EnvironmentProblem(
            "HTML pages need jinja2: pip install 'vramplan[report]' (from a checkout '.[report]')"
        ) from None
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(page=page) + "\n"


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
</style>
</head>
<body>
<main>
<h1>{{ page.title }}</h1>
<p>{{ page.text }}</p>
{% for table in page.tables %}
<section>
{% if table.title %}
<h2>{{ table.title }}</h2>
{% endif %}
{% if table.text %}
<p>{{ table.text }}</p>
{% endif %}
<div class="wide" tabindex="0" role="region" aria-label="{{ table.title or page.title }}">
<table>
<thead><tr>{% for heading in table.headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endfor %}
</main>
</body>
</html>"""  # noqa: E501 - one line of HTML a row
