"""``vramplan fit``: will it fit, where the bytes go, and what would help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from vramplan.advice import Advice, Adviser, least_number_of_cards
from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.cli.lengths import (
    MAX_CEILINGS,
    Ceiling,
    LengthsOption,
    lengths_document,
    longest_fitting,
    plan,
    print_lengths,
)
from vramplan.cli.pace import (
    DataSet,
    EpochsOption,
    PriceOption,
    SamplesOption,
    data_set,
    print_pace,
    run_of,
    tokens_text,
)
from vramplan.cli.predictor import predictor
from vramplan.errors import UsageError
from vramplan.job import Job
from vramplan.model import Model, TracedModel
from vramplan.prediction import (
    LIMIT_MARGIN,
    Prediction,
    Verdict,
    alike,
    job_for,
    judge,
    least_bytes,
    usable_bytes,
)
from vramplan.profile import REFERENCE_GPU
from vramplan.timeline import Phase
from vramplan.timing import Pace, WholeRun, pace
from vramplan.units import MIB, format_bytes, format_count, parse_size

if TYPE_CHECKING:
    from vramplan.gpus import Gpu

LEAST_MEMORY_BYTES = 64 * MIB
METHOD_NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}


class Card(NamedTuple):
    """What the job is judged against: a card of the catalogue or a plain size."""

    name: str
    usable_bytes: int | None
    gpu: Gpu | None


class Answer(NamedTuple):
    """The verdict on one card."""

    card: Card
    job: Job
    prediction: Prediction
    verdict: Verdict | None
    pace: Pace | None = None
    run: WholeRun | None = None


@app.command()
@o.with_job
def fit(
    model: o.ModelArgument,
    *,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="A card (see `vramplan gpus`), repeatable, or all.", show_default=False),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="A plain memory size instead, such as 12GiB.", show_default=False),
    ] = None,
    job: Job,
    witness: o.WitnessOption = "estimate",
    max_seq_len_of: LengthsOption = None,
    num_samples: SamplesOption = None,
    epochs: EpochsOption = None,
    price_per_hour: PriceOption = None,
    context: typer.Context,
    as_json: o.JsonOption = False,
    explain: o.ExplainOption = False,
) -> None:
    """Will the job fit? Exit code 0: yes, on a card at least; 1: on none; 2: could not answer."""
    data = data_set(num_samples, epochs, price_per_hour)
    cards = find_cards(gpu or [], memory)
    planned = None
    if max_seq_len_of is not None:
        planned, job = plan(max_seq_len_of, job, context)
    answers = answer_all(predictor(model, job, witness), job, cards, data)
    judged = [a for a in answers if a.verdict is not None]
    if not judged:
        note = answers[0].card.gpu.memory_note if answers[0].card.gpu else ""
        raise UsageError(
            f"the memory of {answers[0].card.name} is not known ({note}); use --memory"
        )
    best = max(judged, key=lambda a: (a.verdict is not None and a.verdict.headroom_bytes))
    found, adviser = best.prediction.model, make_adviser(best)
    ceilings = []
    if planned is not None and isinstance(found, Model) and len(judged) <= MAX_CEILINGS:
        ceilings = [ceiling(found, a) for a in judged]
    elif planned is not None and isinstance(found, Model):
        print(f"note: name at most {MAX_CEILINGS} cards for the length each holds", file=sys.stderr)
    if as_json:
        from vramplan.cli.documents import (  # noqa: PLC0415
            document,
            job_document,
            prediction_document,
        )

        advice = advise(adviser, best) if adviser else []
        verdicts = [a.verdict for a in judged if a.verdict]
        answer = document(found, best.job, best.prediction, best.pace, best.run, verdicts, advice)
        answer["answer_for"] = best.card.name  # whose job, prediction and advice these are
        answer["predictions"] = {
            a.card.name: {"job": job_document(found, a.job)}
            | prediction_document(a.prediction, a.pace, a.run)
            for a in judged
        }
        if planned is not None:
            answer["lengths"] = lengths_document(planned, ceilings, best.job)
        output.print_json(answer)
    elif len(answers) > 1:
        print_cards(found, answers)
    else:
        print_answer(found, best, adviser, data)
        if explain:
            from vramplan.cli.explain import print_explanation  # noqa: PLC0415

            print_explanation(output.console(), best.prediction)
    if planned is not None and not as_json:
        print_lengths(output.console(), planned, ceilings, best.prediction)
    if all(a.verdict is not None and a.verdict.verdict == "no" for a in judged):
        raise typer.Exit(1)


def find_cards(names: list[str], memory: str | None) -> list[Card]:
    """The cards asked about.

    Raises:
        UsageError: If none is named or a name is unknown.
    """
    cards = []
    if memory is not None:
        size = parse_size(memory)
        if size < LEAST_MEMORY_BYTES:
            raise UsageError(f"--memory {memory} is {size} bytes; give a unit, such as 12GiB")
        cards.append(Card(format_bytes(size), size, None))
    if names:
        from vramplan.gpus import load_gpus  # noqa: PLC0415 - only where a card is named

        chosen = list(load_gpus().values()) if "all" in names else [name_card(n) for n in names]
        cards += [Card(gpu.slug, usable_bytes(gpu), gpu) for gpu in dict.fromkeys(chosen)]
    if not cards:
        raise UsageError("name a card with --gpu (see `vramplan gpus`) or a size with --memory")
    return cards


def name_card(name: str) -> Gpu:
    """The card of that name; where the name leaves the size open, say which was taken."""
    from vramplan.gpus import find_gpu, sizes_of  # noqa: PLC0415 - only where a card is named

    gpu = find_gpu(name)
    if name != gpu.slug:
        others = [other.slug for other in sizes_of(name) if other != gpu]
        if others:
            print(
                f"note: {name!r} was taken as {gpu.slug}; there is also {', '.join(others)}",
                file=sys.stderr,
            )
    return gpu


def answer_all(
    ask: Callable[[Job, Gpu | None], Prediction],
    job: Job,
    cards: list[Card],
    data: DataSet | None = None,
) -> list[Answer]:
    """Judge the job on every card; cards that would run it alike share one prediction."""
    shared: dict[object, Prediction] = {}
    answers = []
    for card in cards:
        own = job_for(job, card.gpu)
        key = (own, alike(card.gpu))
        if key not in shared:
            shared[key] = ask(own, card.gpu)
        prediction = shared[key]
        verdict = None
        if card.usable_bytes is not None:
            verdict = judge(prediction, card.name, card.usable_bytes)
        found = pace(prediction.estimate, own, card.gpu)
        run = run_of(found, own, card.gpu, data)
        answers.append(Answer(card, own, prediction, verdict, found, run))
    return answers


def ceiling(model: Model, answer: Answer) -> Ceiling:
    """The longest sequence with which the job fits the card of an answer."""
    card = answer.card
    assert card.usable_bytes is not None
    return longest_fitting(model, answer.prediction, card.name, card.usable_bytes, card.gpu)


def make_adviser(answer: Answer) -> Adviser | None:
    """An adviser for one answer; variants are estimated, so a trace has none."""
    model = answer.prediction.model
    assert answer.card.usable_bytes is not None
    if not isinstance(model, Model):
        return None
    return Adviser(
        model,
        answer.job,
        answer.prediction,
        answer.card.name,
        answer.card.usable_bytes,
        answer.card.gpu,
    )


def advise(adviser: Adviser, answer: Answer) -> list[Advice]:
    """All advice for one answer."""
    assert answer.verdict is not None
    found = adviser.switches()
    if answer.verdict.verdict == "fits":
        return adviser.largest() + found
    return adviser.fixes() + found


# -- for people ----------------------------------------------------------------------------------


def headline(model: Model | TracedModel, answer: Answer) -> Text:
    """The answer in one line."""
    prediction, verdict, card = answer.prediction, answer.verdict, answer.card
    assert verdict is not None
    what = f"{METHOD_NAMES[answer.job.method]} of {model.name}"
    usable = format_bytes(verdict.usable_bytes)
    takes = format_bytes(prediction.device_peak_bytes)
    name = card.gpu.name if card.gpu else "a card with this memory"
    if verdict.verdict == "fits":
        spare = format_bytes(verdict.headroom_bytes)
        text = f"Yes: {what} fits {name}: {takes} of {usable}, {spare} to spare."
        return Text(text, style="bold green")
    least = format_bytes(least_bytes(prediction))
    if verdict.verdict == "tight":
        text = (
            f"Tight: {what} runs on {name}, but not at ease: it would take {takes} and can be held "
            f"to {least} of {usable}. Expect allocator retries and slower steps."
        )
    else:
        text = (
            f"No: {what} does not fit {name}: it needs at least {least}, a margin of "
            f"{LIMIT_MARGIN:.0%} included, and there are {usable}."
        )
    return Text(text, style=f"bold {output.VERDICT_STYLES[verdict.verdict]}")


def describe(job: Job) -> str:
    """The job in one line, below what is asked of it."""
    return (
        f"Batch {job.batch_size} x {job.seq_len} tokens, {job.optimizer_name}"
        + (", gradient checkpointing" if job.gradient_checkpointing else ", no checkpointing")
        + (f", r={job.lora_r}" if job.method != "full" else "")
        + describe_evaluation(job)
        + (f", {job.alloc_conf}" if job.alloc_conf else "")
    )


def describe_evaluation(job: Job) -> str:
    """The evaluation, where there is one."""
    if not job.evaluate:
        return ""
    kept = ""
    if job.eval_logits:
        every = job.eval_accumulation_steps
        kept = f", logits of {job.eval_samples:,} samples kept"
        kept += " on the card" if every is None else f", {every} batches of them on the card"
    return f"\nEvaluation in batches of {job.eval_batch_size}{kept}"


PHASE_WORDS = {
    Phase.FORWARD: "in the forward",
    Phase.LOSS: "in the loss",
    Phase.BACKWARD: "in the backward",
    Phase.STEP: "in the optimizer's step",
    Phase.EVALUATE: "in the evaluation",
}


def peak_words(prediction: Prediction) -> str:
    """When training's peak is, and whether loading needs more."""
    words = PHASE_WORDS[prediction.peak().phase]
    if prediction.peak_phase in (Phase.LOAD, Phase.PREPARE):
        loading = "loading" if prediction.peak_phase == Phase.LOAD else "preparing"
        words += (
            f"; {loading} the model takes more: {format_bytes(prediction.before_training_bytes)}"
        )
    return words


def print_answer(
    model: Model | TracedModel,
    answer: Answer,
    adviser: Adviser | None,
    data: DataSet | None = None,
) -> None:
    """The whole answer for one card."""
    out = output.console()
    prediction, verdict, job = answer.prediction, answer.verdict, answer.job
    assert verdict is not None
    out.print(headline(model, answer))
    out.print(describe(job))
    if verdict.verdict != "no":
        print_pace(out, answer.pace, answer.run, data)
    out.print()
    out.print(Text(f"Where the bytes go at the peak, {peak_words(prediction)}", style="bold"))
    parts = {kind.value: size for kind, size in prediction.breakdown().items()}
    idle = prediction.peak_reserved_bytes - prediction.peak_allocated_bytes
    if idle:
        parts["cached, reusable"] = idle
    parts["CUDA context, kernels"] = prediction.process_bytes
    managed = prediction.device_peak_bytes - sum(parts.values())
    if managed:
        parts["paged optimizer"] = managed
    output.print_parts(out, parts, verdict.usable_bytes, answer.card.name)
    out.print()
    if adviser:
        print_advice(out, adviser, answer)
    print_least_number(out, answer)
    if adviser and (switches := adviser.switches()):
        print_rows(out, "The price of each switch alone", switches)
    if adviser:
        note = "~ with this job's share of cached memory; `fit` with the options says it exactly.\n"
        out.print(Text(note, style="dim"))
    print_assumptions(out, model, answer)


def print_advice(out: Console, adviser: Adviser, answer: Answer) -> None:
    """What there is room for, or what would make it fit."""
    verdict = answer.verdict
    assert verdict is not None
    if verdict.verdict == "fits":
        rows, title = adviser.largest(), "Room for (each alone, the rest unchanged)"
    else:
        rows, title = adviser.fixes(), "What would make it fit"
        if rows:
            taken = answer.prediction.device_peak_bytes
            rows = [Advice("as it is", "", "fix", taken, verdict.verdict), *rows]
    if rows:
        print_rows(out, title, rows)
    else:
        out.print("No single change or combination of three makes it fit this card.\n")


def print_least_number(out: Console, answer: Answer) -> None:
    """How many such cards it would take at least, where one does not do."""
    verdict = answer.verdict
    if verdict is not None and verdict.verdict == "no":
        count = least_number_of_cards(answer.prediction, verdict.usable_bytes)
        if count is not None and count > 1:
            out.print(
                f"As it is, sharded: at least {count} such cards (a lower bound: all state split "
                "evenly, no communication buffers).\n"
            )


def print_rows(out: Console, title: str, rows: list[Advice]) -> None:
    """A table of advice."""
    table = output.plain_table(
        ("change", "left"), ("would take", "right"), ("verdict", "left"), ("", "left"), title=title
    )
    table.columns[0].no_wrap = out.width >= 72  # options copied from here stay whole
    for row in rows:
        table.add_row(
            row.change.replace(" --", "\n--"),
            ("~" if row.approximate else "") + format_bytes(row.device_peak_bytes),
            output.verdict_text(row.verdict),
            Text(row.why, style="dim"),
        )
    out.print(table)
    out.print()


def print_assumptions(out: Console, model: Model | TracedModel, answer: Answer) -> None:
    """What the answer rests on."""
    job, prediction, card = answer.job, answer.prediction, answer.card
    lines = [
        f"{model.name}: {format_count(model.num_parameters)} parameters; download "
        f"{format_bytes(prediction.download_bytes)}, saved weights "
        f"{format_bytes(prediction.adapter_bytes)}, host RAM about "
        f"{format_bytes(prediction.host_ram_bytes)}."
    ]
    lines.append(output.profile_line(prediction.profile))
    if card.gpu is not None and not card.gpu.supports_bf16:
        lines.append("This card has no bf16: planned in fp16 with a gradient scaler.")
    if job.method == "full" and job.dtype != "fp32":
        lines.append(
            f"Weights and Adam states in {job.dtype}, as from_pretrained and torch's AdamW do; "
            "--dtype fp32 plans the classic mixed-precision recipe."
        )
    lines += model.warnings
    if prediction.witness == "trace":
        lines.append(
            "Traced: transformers' own code on fake tensors. What a change would save or cost is "
            "not worked out."
        )
    lines.append(
        "Random full-length sequences, stock Trainer; nothing else on the card. A desktop takes "
        "some hundred MiB more."
    )
    for line in lines:
        out.print(Text(line, style="dim"))


def print_cards(model: Model | TracedModel, answers: list[Answer]) -> None:
    """One row per card."""
    out = output.console()
    job = answers[0].job
    out.print(f"{METHOD_NAMES[job.method]} of {model.name}", style="bold")
    out.print(describe(job))
    out.print()
    table = output.plain_table(
        ("card", "left"), ("usable", "right"), ("takes", "right"), ("verdict", "left"),
        ("to spare", "right"), ("tokens/s", "right"),
    )  # fmt: skip
    order = {"fits": 0, "tight": 1, "no": 2}
    for answer in sorted(
        answers,
        key=lambda a: (
            (order[a.verdict.verdict], a.card.usable_bytes or 0) if a.verdict else (3, 0)
        ),
    ):
        verdict = answer.verdict
        table.add_row(
            answer.card.name,
            format_bytes(answer.card.usable_bytes),
            format_bytes(answer.prediction.device_peak_bytes),
            output.verdict_text(verdict.verdict if verdict else "unknown"),
            format_bytes(verdict.headroom_bytes) if verdict else "",
            "" if verdict is None or verdict.verdict == "no" else tokens_text(answer.pace),
        )
    out.print(table)
    out.print()
    if any(a.pace is not None and a.pace.source == "extrapolated" for a in answers):
        out.print(Text(f"~: extrapolated from {REFERENCE_GPU}.", style="dim"))
    fp16 = [a.card.name for a in answers if a.card.gpu and not a.card.gpu.supports_bf16]
    if fp16:
        out.print(Text(f"No bf16, planned in fp16: {', '.join(fp16)}.", style="dim"))
    out.print(Text("One --gpu alone shows where its bytes go and what would help.", style="dim"))
