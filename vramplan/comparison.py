"""Many jobs on many cards, and measured runs beside their predictions: numbers, no I/O.

An ``Entry`` is one job on one card, predicted. A ``Run`` is one record beside what is predicted of
it. A ``Comparison`` is both, and gives them as one list of flat rows, which the table, the page,
the CSV, the JSON and the DataFrame all show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vramplan.gpus import Gpu
from vramplan.job import Job
from vramplan.model import Model

if TYPE_CHECKING:
    import pandas

    from vramplan.accuracy import Figure
    from vramplan.record import Record


Key = tuple[str, int, Job]  # a model's name and size, and a job


@dataclass(frozen=True, slots=True)
class Entry:
    """One job on one card, predicted.

    Attributes:
        model: The model.
        asked: The job as it was asked for.
        job: The job as this card runs it (fp16 without bf16 units).
        gpu: The card.
        usable_bytes: What a process can have of it; None where its memory is not known.
        verdict: ``fits``, ``tight``, ``no`` or ``unknown``.
        headroom_bytes: As in ``prediction.Verdict``; None where the verdict is unknown.
        bytes_by_name: ``ready``, ``peak_allocated``, ``peak_reserved``, ``min_limit``,
            ``device_peak``, ``paged``, ``host_ram`` and ``disk``.
        parts: Bytes by kind, cache, context and paged state included; they sum to the device peak.
        peak_phase: The phase that needs most.
        largest_batch_size: Largest batch that fits, the rest unchanged; None if not even one does.
        largest_seq_len: Longest sequence that fits, the rest unchanged, in tokens; None as above.
        calibration: Whose measured constants it rests on.
        borrowed: Whether these are another card's.
        step_time_s: Time of one optimizer step; None where it is not predicted or does not run.
        tokens_per_s: Tokens trained per second; None as above.
        extrapolated: Whether these rest on another card's measured rates.
        price_per_hour: What an hour of the card costs, as the user said.
    """

    model: Model
    asked: Job
    job: Job
    gpu: Gpu
    usable_bytes: int | None
    verdict: str
    headroom_bytes: int | None
    bytes_by_name: Mapping[str, int]
    parts: Mapping[str, int]
    peak_phase: str
    largest_batch_size: int | None
    largest_seq_len: int | None
    calibration: str
    borrowed: bool
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    extrapolated: bool = False
    price_per_hour: float | None = None

    @property
    def key(self) -> Key:
        """The model and the job as it was asked for, whatever a card made of it."""
        return self.model.name, self.model.num_parameters, self.asked

    @property
    def device_peak_bytes(self) -> int:
        """What the process would hold on a roomy card."""
        return self.bytes_by_name["device_peak"]


@dataclass(frozen=True, slots=True)
class Run:
    """One record beside its prediction.

    Attributes:
        record: The run.
        figures: What is both measured and predicted; empty where nothing is predicted.
        why_not: Why nothing is predicted.
    """

    record: Record
    figures: tuple[Figure, ...]
    why_not: str = ""

    @property
    def card(self) -> str:
        """The card it ran on, and the one this stood for."""
        gpu = self.record.gpu
        name = gpu.slug or gpu.name or "no GPU"
        emulated = self.record.run.emulated_gpu
        return f"{name} as {emulated}" if emulated else name

    @property
    def ending(self) -> str:
        """How it ended, in a few words."""
        record = self.record
        if record.status == "oom" and record.oom is not None:
            return f"out of memory in {record.oom.phase}"
        if record.status == "done" or not record.error:
            return record.status
        return f"{record.status}: {record.error.strip().splitlines()[-1]}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Jobs on cards, and measured runs.

    Attributes:
        entries: Every job on every card, jobs in the order given, then cards.
        runs: Every record, in the order given.
    """

    entries: tuple[Entry, ...] = ()
    runs: tuple[Run, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per prediction and per measurement; every row has the keys ``COLUMNS``.

        Returns:
            Rows; sizes in bytes, times in seconds, None for what is not known.
        """
        found = [_entry_row(entry) for entry in self.entries]
        return found + [row for run in self.runs for row in _run_rows(run)]

    def to_frame(self) -> pandas.DataFrame:
        """The rows as a DataFrame; sizes in bytes, times in seconds, missing values as pandas' NA.

        Raises:
            EnvironmentProblem: If pandas is not installed.
        """
        try:
            import pandas  # noqa: PLC0415 - an optional extra
        except ImportError:
            from vramplan.report import missing  # noqa: PLC0415

            raise missing("to_frame", "pandas") from None
        return pandas.DataFrame(self.rows(), columns=list(COLUMNS)).convert_dtypes()


COLUMNS = (
    "witness", "run", "status", "model", "num_parameters", "method", "batch_size", "seq_len",
    "optim", "dtype", "mixed_precision", "gpu", "emulated_gpu", "limit_bytes", "usable_bytes",
    "verdict", "headroom_bytes", "ready_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "min_limit_bytes", "device_peak_bytes", "paged_bytes", "host_ram_bytes", "disk_bytes",
    "peak_phase", "largest_batch_size", "largest_seq_len", "step_time_s", "tokens_per_s",
    "price_per_hour", "cost_per_million_tokens", "calibration", "driver", "torch", "transformers",
    "commit", "created", "note",
)  # fmt: skip


def cost_per_million_tokens(
    price_per_hour: float | None, tokens_per_s: float | None
) -> float | None:
    """Price of training on a million tokens, in the currency of the price."""
    if price_per_hour is None or not tokens_per_s:
        return None
    return price_per_hour / 3600 / tokens_per_s * 1e6


def _job_row(job: Job) -> dict[str, Any]:
    return {
        "method": job.method,
        "batch_size": job.batch_size,
        "seq_len": job.seq_len,
        "optim": job.optimizer_name,
        "dtype": job.dtype,
        "mixed_precision": job.mixed_precision,
    }


def _entry_row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= _job_row(entry.job) | {
        "witness": "estimate",
        "model": entry.model.name,
        "num_parameters": entry.model.num_parameters,
        "gpu": entry.gpu.slug,
        "usable_bytes": entry.usable_bytes,
        "verdict": entry.verdict,
        "headroom_bytes": entry.headroom_bytes,
        "peak_phase": entry.peak_phase,
        "largest_batch_size": entry.largest_batch_size,
        "largest_seq_len": entry.largest_seq_len,
        "step_time_s": entry.step_time_s,
        "tokens_per_s": entry.tokens_per_s,
        "price_per_hour": entry.price_per_hour,
        "cost_per_million_tokens": cost_per_million_tokens(
            entry.price_per_hour, entry.tokens_per_s
        ),
        "calibration": entry.calibration,
    }
    return row | {f"{name}_bytes": size for name, size in entry.bytes_by_name.items()}


def _run_rows(run: Run) -> list[dict[str, Any]]:
    """What was measured, then what is predicted of the same run."""
    record = run.record
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {key: record.job.get(key) for key in _job_row(Job())} | {
        "run": record.name,
        "model": record.model,
        "gpu": record.gpu.slug or record.gpu.name,
        "emulated_gpu": record.run.emulated_gpu,
        "limit_bytes": record.run.limit_bytes,
    }
    search = record.limit_search
    measured = {
        "witness": "measure",
        "status": record.status,
        "ready_bytes": record.ready_bytes,
        "peak_allocated_bytes": record.peak_allocated_bytes,
        "peak_reserved_bytes": record.peak_reserved_bytes,
        "min_limit_bytes": search.smallest_running_bytes if search else None,
        "device_peak_bytes": record.device_peak_bytes,
        "paged_bytes": record.paged_bytes,
        "host_ram_bytes": record.host_rss_peak_bytes,
        "step_time_s": record.step_time_s.median if record.step_time_s else None,
        "tokens_per_s": record.tokens_per_s.median if record.tokens_per_s else None,
        "driver": record.gpu.driver,
        "torch": record.versions.get("torch"),
        "transformers": record.versions.get("transformers"),
        "commit": record.commit,
        "created": record.created,
        "note": "" if record.status == "done" else run.ending,
    }
    if not run.figures:
        return [row | measured | {"note": measured["note"] or run.why_not}]
    names: dict[str, int] = {
        f"{figure.name.replace(' ', '_').replace('smallest', 'min')}_bytes": figure.predicted
        for figure in run.figures
    }
    predicted = {key: size for key, size in names.items() if key in row}
    return [row | measured, row | {"witness": "estimate"} | predicted]


def differences(entries: Iterable[Entry]) -> dict[Key, str]:
    """What tells each job from the others of its model and method, as options; often nothing."""
    keys = dict.fromkeys(entry.key for entry in entries)
    found = {}
    for key in keys:
        *model, job = key
        others = [o for *m, o in keys if m == model and o.method == job.method]
        names = [f.name for f in fields(Job) if len({getattr(o, f.name) for o in others}) > 1]
        found[key] = " ".join(f"--{n.replace('_', '-')} {getattr(job, n)}" for n in names)
    return found
