"""``vramplan estimate``: the numbers of one job."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.cli.lengths import (
    LengthsOption,
    lengths_document,
    longest_fitting,
    plan,
    print_lengths,
)
from vramplan.cli.pace import (
    EpochsOption,
    PriceOption,
    SamplesOption,
    data_set,
    print_pace,
    run_of,
)
from vramplan.cli.predictor import predictor
from vramplan.errors import UsageError
from vramplan.job import Job
from vramplan.model import Model
from vramplan.prediction import Prediction, job_for, usable_bytes
from vramplan.timing import pace
from vramplan.units import format_bytes, format_count


@app.command()
@o.with_job
def estimate(
    model: o.ModelArgument,
    *,
    gpu: Annotated[
        str | None, typer.Option(help="Card whose constants to use.", show_default=False)
    ] = None,
    job: Job,
    witness: o.WitnessOption = "estimate",
    max_seq_len_of: LengthsOption = None,
    num_samples: SamplesOption = None,
    epochs: EpochsOption = None,
    price_per_hour: PriceOption = None,
    context: typer.Context,
    plot: o.PlotOption = None,
    force: o.ForceOption = False,
    as_json: o.JsonOption = False,
    explain: o.ExplainOption = False,
) -> None:
    """The numbers of one job: memory by kind, host RAM, disk and, on a card, its pace."""
    data = data_set(num_samples, epochs, price_per_hour)
    if data is not None and gpu is None:
        raise UsageError("--num-samples needs --gpu: a run's time depends on the card")
    planned = None
    if max_seq_len_of is not None:
        planned, job = plan(max_seq_len_of, job, context)
    ask = predictor(model, job, witness)
    card = None
    if gpu is not None:
        from vramplan.gpus import find_gpu  # noqa: PLC0415 - the catalogue takes a while to read

        card = find_gpu(gpu)
    if plot is not None:
        o.check_plot(plot, force=force)
    job = job_for(job, card)
    prediction = ask(job, card)
    found = prediction.model
    speed = pace(prediction.estimate, job, card)
    run = run_of(speed, job, card, data)
    usable = usable_bytes(card) if card is not None and planned is not None else None
    ceilings = []
    if card is not None and usable is not None and isinstance(found, Model):
        ceilings.append(longest_fitting(found, prediction, card.slug, usable, card))
    if plot is not None:
        from vramplan.cli.plots import plot_job  # noqa: PLC0415

        plot_job(plot, prediction, card)
    if as_json:
        from vramplan.cli.documents import document  # noqa: PLC0415

        answer = document(found, job, prediction, speed, run)
        if planned is not None:
            answer["lengths"] = lengths_document(planned, ceilings, job)
        output.print_json(answer)
        return
    print_numbers(prediction)
    print_pace(output.console(), speed, run, data)
    if planned is not None:
        print_lengths(output.console(), planned, ceilings, prediction)
    if explain:
        from vramplan.cli.explain import print_explanation  # noqa: PLC0415

        print_explanation(output.console(), prediction)


def evaluation_row(prediction: Prediction) -> list[tuple[str, int, str]]:
    """The peak of an evaluation, where there is one."""
    size = prediction.evaluate_peak_allocated_bytes
    return [] if size is None else [("evaluate", size, "allocated while evaluating")]


def print_numbers(prediction: Prediction) -> None:
    """A table of every number, then the peak by kind."""
    out = output.console()
    job, model = prediction.job, prediction.model
    out.print(
        f"{model.name} ({format_count(model.num_parameters)} parameters), {job.method}, "
        f"batch {job.batch_size} x {job.seq_len} tokens"
        + (", traced" if prediction.witness == "trace" else "")
    )
    out.print()
    table = output.plain_table(("number", "left"), ("bytes", "right"), ("what it is", "left"))
    for name, size, what in (
        ("ready", prediction.ready_bytes, "allocated when training starts"),
        ("peak allocated", prediction.peak_allocated_bytes, "torch max_memory_allocated"),
        ("peak reserved", prediction.peak_reserved_bytes, "torch max_memory_reserved, roomy card"),
        ("device peak", prediction.device_peak_bytes, "the process in nvidia-smi, roomy card"),
        ("smallest limit", prediction.min_limit_bytes, "reserved bytes it can be held to"),
        ("load peak", prediction.load_peak_bytes, "while loading and preparing"),
        *evaluation_row(prediction),
        ("paged", prediction.paged_bytes, "optimizer state that can leave the card"),
        ("host RAM", prediction.host_ram_bytes, "of the process, paged state evicted (bound)"),
        ("download", prediction.download_bytes, "the checkpoint on disk"),
        ("saved weights", prediction.adapter_bytes, "per checkpoint saved"),
        ("saved optimizer", prediction.optimizer_file_bytes, "per checkpoint saved"),
    ):
        table.add_row(name, format_bytes(size), what)
    out.print(table)
    out.print()
    peak = prediction.peak()
    if prediction.peak_phase != peak.phase.value:
        out.print(f"{prediction.peak_phase} takes more than any step. Of the steps:")
    out.print(f"At the peak ({peak.phase.value} of {peak.owner}):")
    parts = {kind.value: size for kind, size in prediction.breakdown().items()}
    output.print_parts(out, parts, prediction.peak_allocated_bytes, "peak allocated")
    out.print(Text(output.profile_line(prediction.profile), style="dim"))
