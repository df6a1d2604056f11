"""``--max-seq-len-of``: plan the longest sample of a data set, and say what a card would cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from vramplan.advice import SEQ_STEP, search_largest
from vramplan.estimate import Estimate
from vramplan.job import Job
from vramplan.lengths import Lengths, read_lengths
from vramplan.model import Model
from vramplan.prediction import Prediction, judge, predict
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.gpus import Gpu

LengthsOption = Annotated[
    Path | None,
    typer.Option(
        "--max-seq-len-of",
        help="JSON lines with length or input_ids, or a CSV with length: plan the longest sample; "
        "--seq-len is then where samples are cut.",
        show_default=False,
    ),
]
PERCENTILES = (50, 95, 99)
MAX_CEILINGS = 12  # cards; each takes a search


class Plan(NamedTuple):
    """A data set's lengths and the one that was planned."""

    lengths: Lengths
    ceiling: int | None
    seq_len: int


class Ceiling(NamedTuple):
    """The longest sequence that a card holds; 0 if not even the shortest tried."""

    card: str
    seq_len: int


def plan(path: Path, job: Job, context: typer.Context) -> tuple[Plan, Job]:
    """The job at the length to plan: the longest sample's, or where ``--seq-len`` cuts it.

    Args:
        path: The file.
        job: The job as its options say.
        context: The command's, which knows whether ``--seq-len`` was given.

    Raises:
        UsageError: If the file is not usable.
    """
    lengths = read_lengths(path)
    source = context.get_parameter_source("seq_len")
    given = source is not None and source.name != "DEFAULT"
    ceiling = job.seq_len if given else None
    seq_len = lengths.longest if ceiling is None else min(ceiling, lengths.longest)
    return Plan(lengths, ceiling, seq_len), job.but(seq_len=seq_len)


def longest_fitting(model: Model, prediction: Prediction, name: str, usable: int,
                    gpu: Gpu | None) -> Ceiling:  # fmt: skip
    """The longest sequence with which a job fits a card at ease, in steps of 64 tokens.

    Args:
        model: The model.
        prediction: The job at some length.
        name: How the card was named.
        usable: What a process can have of it, in bytes.
        gpu: The card, None for a plain size.
    """
    job = prediction.job
    top = max(model.dims.max_positions, job.seq_len) // SEQ_STEP * SEQ_STEP

    def peak(seq_len: int) -> int:
        similar = predict(model, job.but(seq_len=seq_len), gpu, like=prediction)
        return similar.device_peak_bytes

    if top < SEQ_STEP or peak(SEQ_STEP) > usable:
        return Ceiling(name, 0)
    walked = prediction.estimate
    assert isinstance(walked, Estimate)
    slope = (walked.peak_allocated_bytes - walked.static_bytes) / job.seq_len
    found = search_largest(peak, usable, SEQ_STEP, top, SEQ_STEP, slope)
    while found:  # the search goes by similar jobs; the answer is the job itself
        own = predict(model, job.but(seq_len=found), gpu)
        if judge(own, name, usable).verdict == "fits":
            break
        found -= SEQ_STEP
    return Ceiling(name, found)


def lengths_document(planned: Plan, ceilings: Sequence[Ceiling], job: Job) -> dict[str, Any]:
    """The part of the JSON document about the data set."""
    lengths = planned.lengths
    return {
        "file": lengths.name,
        "num_samples": lengths.num_samples,
        "mean": lengths.mean,
        **{f"p{percent}": lengths.percentile(percent) for percent in PERCENTILES},
        "longest": lengths.longest,
        "planned_seq_len": planned.seq_len,
        "share_cut": lengths.share_above(planned.seq_len),
        "padded_batch_tokens": job.batch_size * planned.seq_len,
        "padded_batch_filled": _filled(planned),
        "ceilings": [
            {
                "gpu": ceiling.card,
                "seq_len": ceiling.seq_len,
                "share_above": lengths.share_above(ceiling.seq_len),
            }
            for ceiling in ceilings
        ],
    }


def print_lengths(out: Console, planned: Plan, ceilings: Sequence[Ceiling],
                  prediction: Prediction) -> None:  # fmt: skip
    """The same for people."""
    lengths, batch = planned.lengths, prediction.job.batch_size
    ranks = ", ".join(f"{p} % up to {lengths.percentile(p):,}" for p in PERCENTILES)
    takes = format_bytes(prediction.device_peak_bytes)
    how = "where --seq-len cuts" if planned.seq_len < lengths.longest else "the longest sample"
    cut = lengths.share_above(planned.seq_len)
    out.print()
    out.print(Text(f"Lengths in {lengths.name}", style="bold"))
    out.print(
        f"{lengths.num_samples:,} samples, mean {lengths.mean:,.0f} tokens; {ranks}; longest "
        f"{lengths.longest:,}."
    )
    out.print(
        f"Planned: {planned.seq_len:,} tokens, {how}: {takes}."
        + (f" {cut:.1%} of the samples are cut." if cut else "")
    )
    out.print(
        f"A batch is padded to its longest sample: {batch} x {planned.seq_len:,} tokens at worst, "
        f"{_filled(planned):.0%} filled by samples of mean length."
    )
    for card, seq_len in ceilings:
        above = lengths.share_above(seq_len)
        out.print(
            f"{card} holds {seq_len:,} tokens at ease; {above:.1%} of the samples are longer."
            if seq_len
            else f"{card} does not hold {SEQ_STEP} tokens."
        )


def _filled(planned: Plan) -> float:
    """Share of a padded batch that is not padding if its samples are of mean length."""
    counts, seq_len = planned.lengths.counts, planned.seq_len
    tokens = sum(min(length, seq_len) * count for length, count in counts)
    return tokens / planned.lengths.num_samples / seq_len
