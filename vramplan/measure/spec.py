"""What to run: one RunSpec a run, sweeps expanded. Needs no torch."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vramplan.catalogue import find_model
from vramplan.errors import UsageError
from vramplan.gpus import find_gpu
from vramplan.job import EVALUATION, Job, expand
from vramplan.record import SCHEMA_VERSION, Record
from vramplan.units import MIB, parse_size

DEFAULT_STEPS = 6
DEFAULT_TIMEOUT_S = 1800.0
EVAL_BATCH_SIZE = 8  # TrainingArguments' default
MAX_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run of one job.

    Attributes:
        name: Name of its record.
        model: What the user called the model.
        config: Values of its config.json.
        job: The job.
        device: "cuda" or "cpu".
        num_steps: Optimizer steps; the first is reported apart.
        limit_bytes: Most the allocator may reserve; None without a limit.
        emulated_gpu: Slug of the card that the limit stands for.
        weights: Checkpoint folder to load; None for random weights.
        evaluate: Evaluate before the last step.
        eval_batch_size: Sequences per evaluation batch.
        eval_logits: Keep the logits in evaluation, as a compute_metrics function makes Trainer do.
        eval_accumulation_steps: Batches after which they leave the card; None for never.
        eval_samples: Sequences to evaluate; None for two batches.
        save: Save a checkpoint before the last step.
        history: Record the allocator's history.
        paging: Count paging events.
        timeout_s: Seconds after which the run is killed.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    job: Job
    device: str = "cuda"
    num_steps: int = DEFAULT_STEPS
    limit_bytes: int | None = None
    emulated_gpu: str | None = None
    weights: str | None = None
    evaluate: bool = False
    eval_batch_size: int = EVAL_BATCH_SIZE
    eval_logits: bool = False
    eval_accumulation_steps: int | None = None
    eval_samples: int | None = None
    save: bool = False
    history: bool = False
    paging: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if not 2 <= self.num_steps <= MAX_STEPS:
            raise UsageError(
                f"--steps must be from 2 to {MAX_STEPS} (the first is not the steady state), not "
                f"{self.num_steps}"
            )
        if self.eval_batch_size < 1:
            raise UsageError(f"--eval-batch-size must be at least 1, not {self.eval_batch_size}")
        if not 0 < self.timeout_s < math.inf:
            raise UsageError(f"--timeout must be above 0 seconds, not {self.timeout_s}")
        if self.eval_logits and not self.evaluate:
            raise UsageError("--eval-logits is about the evaluation: add --eval")
        self.job.evaluated(self)  # says what is wrong with the rest
        if any(c in self.name for c in "/\\\0") or self.name.startswith("."):
            raise UsageError(f"{self.name!r} cannot be the name of a run: no slash, no dot first")
        if self.limit_bytes is not None and self.limit_bytes < MIB:
            raise UsageError(f"a limit of {self.limit_bytes} bytes cannot be meant; give 12GiB")
        if self.paging and self.history:
            raise UsageError("--paging is a pass of its own: leave out --history")

    def document(self) -> dict[str, Any]:
        """Its JSON form, for the worker."""
        return asdict(self) | {"config": dict(self.config)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> RunSpec:
        """The spec that a worker was sent."""
        return cls(**{**document, "job": Job.from_dict(document["job"])})

    def conditions(self) -> dict[str, Any]:
        """The part that a record keeps as ``run``."""
        return {
            "device": self.device,
            "num_steps": self.num_steps,
            "limit_bytes": self.limit_bytes,
            "emulated_gpu": self.emulated_gpu,
            "weights": Path(self.weights).name if self.weights else "random",
            "evaluate": self.evaluate,
            "eval_batch_size": self.eval_batch_size if self.evaluate else None,
            "eval_logits": self.eval_logits,
            "eval_accumulation_steps": self.eval_accumulation_steps if self.evaluate else None,
            "eval_samples": self.eval_samples if self.evaluate else None,
            "save": self.save,
            "history": self.history,
            "paging": self.paging,
            "timeout_s": self.timeout_s,
        }

    def record_document(self, status: str) -> dict[str, Any]:
        """The record of this run, before anything is known of it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "model": self.model,
            "config": dict(self.config),
            "job": self.job_document(),
            "run": self.conditions(),
            "gpu": {},
            "status": status,
        }

    def job_document(self) -> dict[str, Any]:
        """The job with its optimizer named; what is evaluated is a condition of the run."""
        own = asdict(self.job) | {"optim": self.job.optimizer_name}
        return {name: value for name, value in own.items() if name not in EVALUATION}

    def is_run_of(self, record: Record) -> bool:
        """Whether a record is of this very run, whatever it was called."""
        own = self.conditions()
        theirs = {name: getattr(record.run, name) for name in own}
        own.pop("timeout_s"), theirs.pop("timeout_s")
        job = {k: list(v) if isinstance(v, tuple) else v for k, v in self.job_document().items()}
        recorded = {"alloc_conf": ""} | record.job  # records made before there was the option
        return own == theirs and job == recorded and dict(self.config) == record.config


def run_name(model: str, job: Job, **extra: Any) -> str:
    """A short name that tells runs apart: model, method, shape and what differs from the defaults.

    Args:
        model: What the user called the model.
        job: The job.
        extra: Further words with values; those that are None or False are left out.
    """
    plain = Job(method=job.method, batch_size=job.batch_size, seq_len=job.seq_len)
    words = [Path(model).name or "model", job.method, f"{job.batch_size}x{job.seq_len}"]
    for field in fields(Job):
        value = getattr(job, field.name)
        if value != getattr(plain, field.name):
            words.append(_word(field.name, value))
    words += [_word(name, value) for name, value in extra.items() if value]
    text = "-".join(words).lower()
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-+.") else "-" for c in text)
    return "-".join(part for part in safe.split("-") if part).lstrip(".-+")[:120]


_SHORT = {
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "checkpointing",
    "lora_r": "r",
    "lora_dropout": "dropout",
    "mixed_precision": "autocast-",
    "dtype": "dtype-",
    "target_modules": "targets-",
    "modules_to_save": "saving-",
    "optim": "",
    "attn_implementation": "",
    "quant_type": "",
    "alloc_conf": "",
    "emulated_gpu": "as-",
}


def _word(name: str, value: Any) -> str:
    short = _SHORT.get(name, name)
    if isinstance(value, bool):
        return short if value else f"no-{short}"
    if name == "limit_bytes":
        return f"limit{value // MIB}"
    return short + ("+".join(value) if isinstance(value, tuple) else str(value))


def make_specs(model: str, values: Mapping[str, Any], shared: RunSpec) -> list[RunSpec]:
    """The runs of one model over the combinations of job fields.

    Args:
        model: What the user called the model.
        values: Fields of Job; a list is swept over.
        shared: Everything else, and the name if it has one.
    """
    found = find_model(model)
    if shared.weights is not None:
        own_config = find_model(shared.weights)
        if (own_config.family, own_config.num_parameters) != (found.family, found.num_parameters):
            raise UsageError(
                f"{shared.weights} holds another model ({own_config.family}, "
                f"{own_config.num_parameters:,} parameters) than {model}; name the checkpoint as "
                "MODEL too"
            )
        found = own_config
    specs = []
    for combination in expand(values):
        job = Job.from_dict(combination)
        spec = replace(shared, model=model, config=dict(found.config), job=job)
        name = shared.name or run_name(
            model,
            job,
            emulated_gpu=spec.emulated_gpu,
            limit_bytes=None if spec.emulated_gpu else spec.limit_bytes,
            evaluate=spec.evaluate,
            save=spec.save,
            paging=spec.paging,
            cpu=spec.device == "cpu",
        )
        specs.append(replace(spec, name=name))
    return specs


_RUN_KEYS: dict[str, tuple[type, str]] = {
    "name": (str, "a text"),
    "steps": (int, "a whole number"),
    "limit": (str, "a size such as '12GiB'"),
    "as_gpu": (str, "the name of a card"),
    "evaluate": (bool, "true or false"),
    "eval_batch_size": (int, "a whole number"),
    "eval_logits": (bool, "true or false"),
    "eval_accumulation_steps": (int, "a whole number"),
    "eval_samples": (int, "a whole number"),
    "save": (bool, "true or false"),
    "history": (bool, "true or false"),
    "paging": (bool, "true or false"),
    "find_limit": (bool, "true or false"),
    "repeat": (int, "a whole number"),
    "skip": (bool, "true or false"),
}


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One [[run]] table: the runs it stands for, and how to go about them.

    Attributes:
        specs: The runs.
        find_limit: Whether to look for their smallest limits.
        skip: Whether what the estimate calls hopeless is left out.
    """

    specs: tuple[RunSpec, ...]
    find_limit: bool
    skip: bool


def read_matrix(path: Path, shared: RunSpec) -> list[MatrixRow]:
    """The runs that a TOML file asks for.

    Each ``[[run]]`` table has ``model`` and any field of Job (a list is swept over), and optionally
    name, steps, limit ("12GiB"), as_gpu, evaluate, eval_batch_size, eval_logits,
    eval_accumulation_steps, eval_samples, save, history, paging, find_limit, repeat, and skip
    (false: also run what the estimate calls hopeless).

    Args:
        path: The file.
        shared: What the command line set for all of them.

    Raises:
        UsageError: If the file cannot be read or has something it should not.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("run", [])
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a matrix of runs: {error}") from None
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"{path} has no [[run]] tables")
    rows = [_row(table, shared, f"{path}, run {n}") for n, table in enumerate(tables, 1)]
    names = [spec.name for row in rows for spec in row.specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{path}: two runs are called {twice!r}; give one of them a name")
    return rows


def _row(table: Any, shared: RunSpec, where: str) -> MatrixRow:
    if not isinstance(table, dict):
        raise UsageError(f"{where}: is not a table")
    values = dict(table)
    own = {key: values.pop(key) for key in _RUN_KEYS if key in values}
    for key, value in own.items():
        kind, words = _RUN_KEYS[key]
        if type(value) is not kind:
            raise UsageError(f"{where}: {key} must be {words}, not {value!r}")
    model = values.pop("model", None)
    if not isinstance(model, str):
        raise UsageError(f"{where}: model is missing")
    unknown = sorted(values.keys() - {field.name for field in fields(Job)})
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}")
    if "limit" in own and "as_gpu" in own:
        raise UsageError(f"{where}: limit and as_gpu both set the limit; choose one")
    try:
        base = replace(
            shared,
            name=own.get("name", ""),
            num_steps=own.get("steps", shared.num_steps),
            limit_bytes=parse_size(own["limit"]) if "limit" in own else shared.limit_bytes,
            emulated_gpu=find_gpu(own["as_gpu"]).slug if "as_gpu" in own else shared.emulated_gpu,
            **{
                key: own.get(key, getattr(shared, key))
                for key in (*EVALUATION, "save", "history", "paging")
            },
        )  # fmt: skip
        specs = repeated(make_specs(model, values, base), own.get("repeat", 1))
    except (UsageError, TypeError) as error:
        raise UsageError(f"{where}: {error}") from None
    return MatrixRow(
        specs=tuple(specs),
        find_limit=own.get("find_limit", False),
        skip=own.get("skip", True),
    )


def repeated(specs: list[RunSpec], count: int) -> list[RunSpec]:
    """The same runs ``count`` times, numbered."""
    if count < 1:
        raise UsageError(f"--repeat must be at least 1, not {count}")
    if count == 1:
        return specs
    return [
        replace(spec, name=f"{spec.name}-repeat{n}") for spec in specs for n in range(1, count + 1)
    ]
