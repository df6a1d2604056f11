"""A Comparison as a Page: verdicts, bytes, room, speed, one step, and measured beside predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vramplan.close_up import CloseUp, chosen, look_closely
from vramplan.comparison import Comparison, Entry, Key, cost_per_million_tokens, differences
from vramplan.prediction import LIMIT_MARGIN
from vramplan.profile import REFERENCE_GPU
from vramplan.report.charts import (
    GROUPS,
    Bar,
    Line,
    bytes_chart,
    grouped,
    timeline_chart,
)
from vramplan.report.drawing import Chart
from vramplan.report.measured import SYMBOLS, gib, measured, residuals
from vramplan.report.page import Page, Table, Toned
from vramplan.report.series import stretches
from vramplan.units import GIB, format_bytes

METHOD_NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
NOT_PREDICTED = "not predicted"
Cell = Callable[[Entry], str]


def comparison_page(comparison: Comparison, origin: Mapping[str, Any], *, draw: bool) -> Page:
    """The whole page.

    Args:
        comparison: What to show.
        origin: Command, date, commit and versions.
        draw: Whether with charts (HTML), or with tables alone.

    Raises:
        EnvironmentProblem: If charts are asked for and matplotlib is not installed.
    """
    entries, runs = comparison.entries, comparison.runs
    sections: list[Table] = []
    if entries:
        entry = chosen(comparison)
        close = look_closely(entry) if entry is not None else None
        sections += [
            verdicts(entries),
            parts(entries, draw=draw),
            *room(entries),
            speed(entries),
            *([heat_map(close), step(close, draw=draw)] if close is not None else []),
        ]
    if runs:
        sections += [residuals(runs, draw=draw), measured(runs)]
    return Page(
        title(comparison),
        summary(comparison),
        tuple(sections),
        tuple(assumptions(comparison)),
        tuple((what, str(value)) for what, value in origin.items() if value is not None),
    )


def title(comparison: Comparison) -> str:
    """What is compared, in a few words."""
    if not comparison.entries:
        return f"{_count(comparison.runs, 'measured run')} beside what was predicted"
    models = dict.fromkeys(entry.model.name for entry in comparison.entries)
    cards = dict.fromkeys(entry.gpu.slug for entry in comparison.entries)
    what = next(iter(models)) if len(models) == 1 else _count(models, "model")
    where = next(iter(cards)) if len(cards) == 1 else _count(cards, "card")
    return f"Fine-tuning {what} on {where}"


def _count(things: Iterable[object], what: str) -> str:
    count = len(list(things))
    return f"{count} {what}{'' if count == 1 else 's'}"


def summary(comparison: Comparison) -> str:
    """What a reader in a hurry needs."""
    lines = []
    if comparison.entries:
        found = [entry.verdict for entry in comparison.entries]
        job = comparison.entries[0].job
        sizes = {(e.job.batch_size, e.job.seq_len) for e in comparison.entries}
        each = (
            f"batch {job.batch_size} of {job.seq_len:,} tokens" if len(sizes) == 1 else "each job"
        )
        lines.append(
            f"{len(found)} predictions, {each}: "
            f"{found.count('fits')} fit, {found.count('tight')} are tight, {found.count('no')} do "
            "not fit."
        )
    if comparison.runs:
        ended: list[str] = [run.record.status for run in comparison.runs]
        words = {"done": "done", "oom": "out of memory"}
        counts = {status: ended.count(status) for status in dict.fromkeys((*words, *ended))}
        ends = ", ".join(f"{n} {words.get(status, status)}" for status, n in counts.items() if n)
        lines.append(f"{_count(ended, 'measured run')}: {ends}.")
    return " ".join(lines)


# -- jobs on cards -------------------------------------------------------------------------------


def job_names(entries: Sequence[Entry]) -> dict[Key, str]:
    """How to name each job: model, method, and what tells it from the others."""
    more = differences(entries)
    return {
        e.key: f"{e.model.name} {METHOD_NAMES[e.asked.method]} {more[e.key]}".rstrip()
        for e in entries
    }


def matrix(entries: Sequence[Entry], name: str, text: str, cell: Cell) -> Table:
    """Jobs down and cards across, or the other way round where there are more cards than jobs."""
    jobs = job_names(entries)
    cards = list(dict.fromkeys(entry.gpu.slug for entry in entries))
    cells = {(entry.key, entry.gpu.slug): cell(entry) for entry in entries}
    if len(cards) > len(jobs):
        rows = [(card, *(cells.get((job, card), "") for job in jobs)) for card in cards]
        return Table(name, ("card", *jobs.values()), tuple(rows), text)
    rows = [(label, *(cells.get((job, card), "") for card in cards)) for job, label in jobs.items()]
    return Table(name, ("job", *cards), tuple(rows), text)


def verdicts(entries: Sequence[Entry]) -> Table:
    """Fits, tight or no, with what is to spare."""

    def cell(entry: Entry) -> str:
        spare = entry.headroom_bytes
        text = f"{SYMBOLS[entry.verdict]} {entry.verdict}"
        return Toned(text if spare is None else f"{text}\n{signed(spare)}", entry.verdict)

    return matrix(
        entries,
        "Verdicts",
        "✓ fits: all that the job would reserve is there. ! tight: it runs, but only when the "
        "allocator is held to what the card has; expect slower steps. ✗ no: it does not run. "
        "The number is what is to spare (or missing), in GiB.",
        cell,
    )


def signed(nbytes: int) -> str:
    """GiB with a sign, one digit; a shortage that rounds to nothing keeps its sign."""
    return f"{nbytes / GIB:+,.1f}".replace("-", "\u2212")


def parts(entries: Sequence[Entry], *, draw: bool) -> Table:
    """Where the bytes of each job go, and how they compare with each card's memory."""
    names = job_names(entries)
    shown: dict[Key, Entry] = {}
    for entry in sorted(entries, key=lambda entry: not entry.gpu.supports_bf16):
        shown.setdefault(entry.key, entry)
    jobs = {key: shown[key] for key in names}
    groups = [g.name for g in GROUPS if any(grouped(e.parts)[g.name] for e in jobs.values())]
    rows = [
        (
            names[key],
            gib(entry.device_peak_bytes),
            *(gib(grouped(entry.parts)[group]) for group in groups),
        )
        for key, entry in jobs.items()
    ]
    return Table(
        "Where the bytes go",
        ("job", "takes, GiB", *(f"{group}, GiB" for group in groups)),
        tuple(rows),
        f"At the fullest moment, on a card with room, as {next(iter(jobs.values())).gpu.slug} runs "
        "it. Broken lines are what a process can have of each card, named by the size on its box; "
        "cards beyond the right edge are not drawn. An arrow: the bar goes on.",
        _bars(jobs, entries) if draw else (),
    )


def _bars(jobs: Mapping[Key, Entry], entries: Sequence[Entry]) -> tuple[Chart, ...]:
    """One chart a model."""
    names = job_names(list(jobs.values()))
    cards = {e.gpu.slug: e for e in entries if e.usable_bytes is not None}
    lines = [Line(f"{e.gpu.box_gb} GB", e.usable_bytes or 0) for e in cards.values()]
    charts = []
    for number, model in enumerate(dict.fromkeys(entry.model.name for entry in entries)):
        bars = [
            Bar(names[key].removeprefix(f"{model} "), entry.parts)
            for key, entry in jobs.items()
            if entry.model.name == model
        ]
        charts.append(bytes_chart(f"bytes-{number}", model, bars, lines))
    return tuple(charts)


def room(entries: Sequence[Entry]) -> Iterable[Table]:
    """The largest batch and the longest sequence of each job on each card."""
    lengths = sorted({entry.job.seq_len for entry in entries})
    batches = sorted({entry.job.batch_size for entry in entries})
    yield matrix(
        entries,
        "Largest batch",
        f"Sequences of {_listed(lengths)} tokens that fit in one micro-batch.",
        lambda entry: _number(entry, entry.largest_batch_size),
    )
    yield matrix(
        entries,
        "Longest sequence",
        f"Tokens that fit at batch {_listed(batches)}, in steps of 64, up to what the model was "
        "made for.",
        lambda entry: _number(entry, entry.largest_seq_len),
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def _number(entry: Entry, value: int | None) -> str:
    return Toned("✗ none", "no") if value is None else Toned(f"{value:,}", "plain")


def speed(entries: Sequence[Entry]) -> Table:
    """Tokens per second and what a million of them cost."""
    name = "Speed and cost"
    if all(entry.tokens_per_s is None for entry in entries):
        return Table(
            name, (), (), "Step time is not predicted for these cards, so neither tokens per "
            "second nor cost are shown.",
        )  # fmt: skip

    def cell(entry: Entry) -> str:
        if entry.verdict == "no":
            return Toned("✗ no", "no")
        if entry.tokens_per_s is None:
            return Toned(NOT_PREDICTED, "unknown")
        cost = cost_per_million_tokens(entry.price_per_hour, entry.tokens_per_s)
        text = f"{'~' if entry.extrapolated else ''}{entry.tokens_per_s:,.0f}"
        return Toned(text if cost is None else f"{text}\nat {cost:,.2f}", "plain")

    priced = any(entry.price_per_hour is not None for entry in entries)
    text = "Tokens per second of training steps, the job unchanged; ~ is extrapolated from the "
    text += f"rates measured on {REFERENCE_GPU}"
    text += ", at the cost of a million tokens in the currency of --price." if priced else "."
    return matrix(entries, name, text, cell)


# -- one job looked at closely -------------------------------------------------------------------


def heat_map(close: CloseUp) -> Table:
    """Verdicts by batch and sequence for one job on one card."""
    entry = close.entry
    return Table(
        f"Batch and sequence on {entry.gpu.slug}",
        ("batch", *(f"{tile.seq_len:,} tokens" for tile in close.tiles[0])),
        tuple(
            (
                f"{line[0].batch_size}",
                *(
                    Toned(f"{SYMBOLS[t.verdict]} {t.device_peak_bytes / GIB:,.1f}", t.verdict)
                    for t in line
                ),
            )
            for line in close.tiles
        ),
        f"{METHOD_NAMES[entry.job.method]} of {entry.model.name}: verdict, and the GiB it would "
        f"take on a card with room; there are {format_bytes(entry.usable_bytes)}.",
    )


def step(close: CloseUp, *, draw: bool) -> Table:
    """The memory of one step, phase by phase."""
    entry = close.entry
    name = f"{METHOD_NAMES[entry.job.method]} of {entry.model.name} on {entry.gpu.slug}"
    assert entry.usable_bytes is not None
    usable = Line("all there is", entry.usable_bytes - entry.parts["context"])
    chart = timeline_chart("step", name, stretches(close.timeline), usable) if draw else None
    return Table(
        "One step",
        ("phase", "allocated at most, GiB"),
        tuple((phase, gib(size)) for phase, size in close.phases.items()),
        f"{name}, batch {entry.job.batch_size} of {entry.job.seq_len:,} tokens. Most memory is "
        f"needed in {entry.peak_phase}.",
        (chart,) if chart else (),
    )


# -- what it rests on ----------------------------------------------------------------------------


def assumptions(comparison: Comparison) -> Iterable[str]:
    """What the figures rest on."""
    entries = comparison.entries
    if not entries:
        return
    job = entries[0].job
    yield (
        "The stock transformers Trainer on random full-length sequences, one GPU that nothing else "
        "uses; a desktop takes some hundred MiB more."
    )
    kept = "Gradient checkpointing" if job.gradient_checkpointing else "No gradient checkpointing"
    ranks = sorted({entry.job.lora_r for entry in entries if entry.job.method != "full"})
    adapters = f"; adapters of rank {_listed(ranks)}" if ranks else ""
    optimizers = ", ".join(dict.fromkeys(entry.job.optimizer_name for entry in entries))
    yield f"{kept}{adapters}; optimizers {optimizers}."
    yield (
        "Tight and no are told apart by replaying PyTorch's allocator under the card's limit, with "
        f"{LIMIT_MARGIN:.0%} to spare."
    )
    old = list(dict.fromkeys(e.gpu.slug for e in entries if not e.gpu.supports_bf16))
    if old:
        yield (
            f"No bf16 on {', '.join(old)}: planned in fp16 with a gradient scaler, full "
            "fine-tuning with fp32 weights."
        )
    for name in dict.fromkeys(e.calibration for e in entries if not e.borrowed):
        yield f"CUDA context and kernels were measured on {name}."
    for name in dict.fromkeys(e.calibration for e in entries if e.borrowed):
        yield (
            f"CUDA context and kernels of cards that were not measured are assumed from {name}, "
            "which is rather too much than too little."
        )
    unknown = list(dict.fromkeys(e.gpu.slug for e in entries if e.usable_bytes is None))
    if unknown:
        yield f"The memory of {', '.join(unknown)} is in no source we trust: no verdict."
    warnings = dict.fromkeys((e.model.name, text) for e in entries for text in e.model.warnings)
    yield from (f"{model}: {text}" for model, text in warnings)
