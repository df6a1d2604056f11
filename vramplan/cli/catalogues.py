"""``vramplan gpus`` and ``vramplan models``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vramplan.catalogue import load_shipped, model_slugs
from vramplan.cli import app, output
from vramplan.cli.documents import SCHEMA_VERSION, model_document
from vramplan.cli.options import JsonOption
from vramplan.errors import UsageError
from vramplan.gpus import load_gpus
from vramplan.units import format_bytes, format_count

Filter = Annotated[str, typer.Argument(help="Show only names with this text.", metavar="[TEXT]")]


@app.command()
def gpus(text: Filter = "", as_json: JsonOption = False) -> None:
    """List the cards vramplan knows."""
    found = [
        gpu for gpu in load_gpus().values() if text.lower() in f"{gpu.slug} {gpu.name}".lower()
    ]
    if not found:
        raise UsageError(f"no card has {text!r} in its name; `vramplan gpus` lists all")
    if as_json:
        output.print_json(
            {"schema_version": SCHEMA_VERSION, "gpus": [asdict(gpu) for gpu in found]}
        )
        return
    table = output.plain_table(
        ("card", "left"),
        ("memory", "right"),
        ("GB/s", "right"),
        ("16-bit TFLOP/s", "right"),
        ("bf16", "left"),
        ("cc", "left"),
    )
    for gpu in found:
        rate = gpu.bf16_flops_per_s or gpu.fp16_flops_per_s
        table.add_row(
            gpu.slug,
            format_bytes(gpu.memory_bytes),
            f"{(gpu.bandwidth_bytes_per_s or 0) / 1e9:,.0f}",
            "?" if rate is None else f"{rate / 1e12:,.0f}",
            "yes" if gpu.supports_bf16 else "no",
            ".".join(map(str, gpu.compute_capability)),
        )
    output.console().print(table)


@app.command()
def models(text: Filter = "", as_json: JsonOption = False) -> None:
    """List the models whose config is shipped; any other works by folder or hub id."""
    found = [load_shipped(slug) for slug in model_slugs() if text.lower() in slug]
    if not found:
        raise UsageError(f"no shipped model has {text!r} in its name; `vramplan models` lists all")
    if as_json:
        output.print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "models": [model_document(model) for model in found],
            }
        )
        return
    table = output.plain_table(
        ("model", "left"),
        ("parameters", "right"),
        ("family", "left"),
        ("layers", "right"),
        ("vocabulary", "right"),
        ("repository", "left"),
    )
    for model in found:
        table.add_row(
            model.name,
            format_count(model.num_parameters),
            model.family,
            str(model.dims.num_layers),
            f"{model.dims.vocab_size:,}",
            model.repository or "",
        )
    output.console().print(table)
