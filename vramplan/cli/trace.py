"""``vramplan trace``: the libraries' own code on fake tensors, without a GPU."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vramplan.catalogue import FoundConfig, find_config, model_from_config
from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.cli.documents import SCHEMA_VERSION, prediction_keys
from vramplan.cli.explain import print_owners
from vramplan.cli.measured import print_comparison
from vramplan.errors import EnvironmentProblem, UsageError
from vramplan.estimate import DEFAULT_CAPABILITY
from vramplan.estimate import estimate as walk
from vramplan.families import NAMES
from vramplan.gpus import find_gpu
from vramplan.job import Job
from vramplan.prediction import job_for
from vramplan.units import format_bytes, format_count

if TYPE_CHECKING:
    from vramplan.trace import Trace

NEEDED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@app.command()
@o.with_job
def trace(
    model: o.ModelArgument,
    *,
    gpu: Annotated[
        str | None,
        typer.Option(help="Card whose kernels and workspaces to take.", show_default=False),
    ] = None,
    job: Job,
    as_json: o.JsonOption = False,
    explain: o.ExplainOption = False,
) -> None:
    """The same numbers from transformers' own code on fake tensors; any family, no GPU."""
    found = find_config(model)
    capability = DEFAULT_CAPABILITY
    if gpu is not None:
        card = find_gpu(gpu)
        job, capability = job_for(job, card), card.compute_capability
    traced = run_trace(found, job, capability)
    if as_json:
        output.print_json(trace_document(found, job, traced))
        return
    out = output.console()
    print_trace(out, found, job, traced)
    if explain:
        _explain(out, found, job, traced, capability)


def run_trace(
    found: FoundConfig,
    job: Job,
    capability: tuple[int, int] = DEFAULT_CAPABILITY,
    workspace_bytes: int | None = None,
    *,
    fold: bool = True,
) -> Trace:
    """Trace a job.

    Args:
        found: The model's config.
        job: The job.
        capability: Compute capability of the card that the trace stands for.
        workspace_bytes: cuBLAS's workspaces of both threads as measured on the card.
        fold: Trace equal layers once; otherwise every layer, which takes longer.

    Raises:
        EnvironmentProblem: If the libraries that it runs are not installed.
        UsageError: If the job evaluates.
    """
    if job.evaluate:
        raise UsageError("a trace runs training steps alone; leave out --eval")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"a trace runs {', '.join(NEEDED)}; {', '.join(missing)} not installed here: "
            "pip install 'vramplan[trace]' (CPU torch will do)"
        )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what bitsandbytes says of CPU kernels is not the user's
    try:
        from vramplan.trace import trace as run  # noqa: PLC0415 - torch takes seconds to import
    finally:
        logging.disable(before)
    return run(
        found.config,
        job,
        capability=capability,
        workspace_bytes=workspace_bytes,
        where=found.where,
        fold=fold,
    )


def print_trace(out: Console, found: FoundConfig, job: Job, traced: Trace) -> None:
    """A table of every number, then the peak by kind."""
    out.print(
        f"{found.name} ({format_count(traced.num_parameters)} parameters), {job.method}, "
        f"batch {job.batch_size} x {job.seq_len} tokens, traced"
    )
    out.print()
    table = output.plain_table(("number", "left"), ("bytes", "right"), ("what it is", "left"))
    for name, size, what in (
        ("ready", traced.ready_bytes, "allocated when training starts"),
        ("peak allocated", traced.peak_allocated_bytes, "torch max_memory_allocated"),
        ("paged", traced.paged_bytes, "optimizer state that can leave the card"),
    ):
        table.add_row(name, format_bytes(size), what)
    out.print(table)
    out.print()
    peak = traced.peak()
    out.print(f"At the peak ({peak.phase.value} of {peak.owner}):")
    parts = {kind.value: size for kind, size in peak.by_kind.items()}
    output.print_parts(out, parts, peak.nbytes, "peak allocated")


def _explain(
    out: Console, found: FoundConfig, job: Job, traced: Trace, capability: tuple[int, int]
) -> None:
    """Term by term against the estimate, or the largest owners where there is none."""
    if found.config.get("model_type") in NAMES:
        model = model_from_config(found.config, found.name)
        estimated = walk(model, job, capability=capability).timeline
        print_comparison(out, traced.timeline, estimated, "traced")
        return
    out.print()
    print_owners(out, traced.peak())


def trace_document(found: FoundConfig, job: Job, traced: Trace) -> dict[str, Any]:
    """The document of ``estimate --json``; what a trace does not know is null."""
    peak = traced.peak()
    known = {
        "witness": "trace",
        "ready_bytes": traced.ready_bytes,
        "peak_allocated_bytes": traced.peak_allocated_bytes,
        "paged_bytes": traced.paged_bytes,
        "peak_phase": peak.phase.value,
        "breakdown": {kind.value: size for kind, size in peak.by_kind.items()},
        "num_trainable": traced.num_trainable,
        "bounds": {},
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "job": asdict(job)
        | {"optim": job.optimizer_name, "attn_implementation": traced.attn_implementation},
        "model": {
            "name": found.name,
            "family": traced.family,
            "num_parameters": traced.num_parameters,
            "repository": found.repository,
            "revision": found.revision,
            **traced.dimensions,
        },
        "prediction": dict.fromkeys(prediction_keys()) | known,
        "verdicts": [],
        "advice": [],
    }
