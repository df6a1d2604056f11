"""A Comparison's rows for programs: JSON, and CSV that a spreadsheet opens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vramplan.comparison import COLUMNS, Comparison
from vramplan.report.page import Table
from vramplan.units import GIB

SCHEMA_VERSION = 1
_HEADINGS = {
    "num_parameters": "parameters",
    "batch_size": "batch size, sequences",
    "seq_len": "sequence length, tokens",
    "largest_batch_size": "largest batch that fits, sequences",
    "largest_seq_len": "longest sequence that fits, tokens",
    "step_time_s": "step time, s",
    "tokens_per_s": "tokens per second",
    "gpu": "card",
    "emulated_gpu": "card it stands for",
    "headroom_bytes": "to spare, GiB",
    "price_per_hour": "price per hour",
    "cost_per_million_tokens": "cost per million tokens",
}


def heading(column: str) -> str:
    """A column's heading for people, its unit included."""
    if column in _HEADINGS:
        return _HEADINGS[column]
    words = column.replace("_", " ")
    return words.removesuffix(" bytes") + ", GiB" if column.endswith("_bytes") else words


def csv_table(comparison: Comparison) -> Table:
    """Every row, sizes in GiB; what is not known is empty."""
    return Table(
        "",
        tuple(heading(column) for column in COLUMNS),
        tuple(tuple(_cell(key, row[key]) for key in COLUMNS) for row in comparison.rows()),
    )


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value / GIB:.4f}" if column.endswith("_bytes") else str(value)


def json_document(comparison: Comparison, origin: Mapping[str, Any]) -> dict[str, Any]:
    """One document: every row in bytes and seconds; null is not known.

    Args:
        comparison: What to write.
        origin: Command, date, commit and versions.
    """
    rows = comparison.rows()
    for row, entry in zip(rows, comparison.entries, strict=False):  # entries come first
        row["parts"] = dict(entry.parts)
    return {"schema_version": SCHEMA_VERSION, **origin, "rows": rows}
