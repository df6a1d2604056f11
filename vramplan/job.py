"""The Job: everything that decides what one training run allocates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vramplan.alloc_conf import AllocatorSettings, parse_alloc_conf
from vramplan.errors import UnknownNameError, UsageError
from vramplan.formats import BF16, DTYPES, FP16, FP32, QUANT_FORMATS, Dtype, find_dtype
from vramplan.optimizers import Optimizer, find_optimizer

if TYPE_CHECKING:
    from vramplan.record import Record

METHODS = ("full", "lora", "qlora")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
MIXED_PRECISIONS = ("bf16", "fp16", "no")
SHARDINGS = ("none",)
ALL_LINEAR = "all-linear"
NAME_LISTS = ("target_modules", "modules_to_save")  # their lists are one value, not a sweep

MAX_BATCH = 1_000_000
MAX_SEQ_LEN = 100_000_000
MAX_RANK = 1_000_000
MAX_STEPS = 1_000_000
MAX_SAMPLES = 1_000_000_000
EVALUATION = (
    "evaluate",
    "eval_batch_size",
    "eval_logits",
    "eval_accumulation_steps",
    "eval_samples",
)  # fields of Job about the evaluation alone


@dataclass(frozen=True, slots=True)
class Job:
    """One fine-tuning job on one model, in Hugging Face's words.

    Attributes:
        method: ``full``, ``lora`` or ``qlora``.
        batch_size: Sequences per device and micro-batch (per_device_train_batch_size).
        seq_len: Tokens per sequence; every sequence is that long.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        gradient_checkpointing: Whether decoder layers are recomputed (non-reentrant).
        optim: transformers ``OptimizerNames`` value; None picks the method's default.
        lora_r: Rank of the adapters.
        lora_dropout: Dropout before the adapters.
        target_modules: ``all-linear`` or last path components of the layers to adapt.
        modules_to_save: Modules trained and kept whole beside the adapters.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``; None lets transformers
            choose (sdpa where the model has it).
        dtype: dtype of the loaded weights, as in ``from_pretrained``; torch's names are kept short.
        mixed_precision: accelerate's autocast setting.
        quant_type: Format of quantised weights (qlora only).
        double_quant: Whether the scales are quantised too.
        prepare_kbit: Whether ``prepare_model_for_kbit_training`` is called.
        alloc_conf: PYTORCH_ALLOC_CONF of the process; empty for PyTorch's defaults.
        num_gpus: GPUs of the run.
        sharding: How state is spread over them.
        evaluate: Whether Trainer evaluates while it trains (eval_strategy).
        eval_batch_size: Sequences per evaluation batch (per_device_eval_batch_size).
        eval_logits: Whether evaluation keeps the logits, as a compute_metrics function makes it
            unless prediction_loss_only is set.
        eval_accumulation_steps: Batches after which they leave the card; None keeps all on it.
        eval_samples: Sequences of the evaluation data set, each of ``seq_len`` tokens; None for
            two batches, which is what the harness evaluates.
    """

    method: str = "qlora"
    batch_size: int = 1
    seq_len: int = 1024
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    optim: str | None = None
    lora_r: int = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()
    attn_implementation: str | None = None
    dtype: str = "bf16"
    mixed_precision: str = "bf16"
    quant_type: str = "nf4"
    double_quant: bool = True
    prepare_kbit: bool = True
    alloc_conf: str = ""
    num_gpus: int = 1
    sharding: str = "none"
    evaluate: bool = False
    eval_batch_size: int = 8
    eval_logits: bool = False
    eval_accumulation_steps: int | None = None
    eval_samples: int | None = None

    def __post_init__(self) -> None:
        _choice("--method", self.method, METHODS)
        _choice("--mixed-precision", self.mixed_precision, MIXED_PRECISIONS)
        object.__setattr__(self, "dtype", _short_name(self.dtype))
        _choice("--dtype", self.dtype, DTYPES)
        _choice("--quant-type", self.quant_type, QUANT_FORMATS)
        _choice("--sharding", self.sharding, SHARDINGS)
        if self.attn_implementation is not None:
            _choice("--attn-implementation", self.attn_implementation, ATTENTIONS)
        _between("--batch-size", self.batch_size, 1, MAX_BATCH)
        _between("--seq-len", self.seq_len, 1, MAX_SEQ_LEN)
        _between("--lora-r", self.lora_r, 1, MAX_RANK)
        _between("--gradient-accumulation-steps", self.gradient_accumulation_steps, 1, MAX_STEPS)
        if not 0.0 <= self.lora_dropout < 1.0:  # also refuses NaN
            raise UsageError(f"--lora-dropout must be in [0, 1), not {self.lora_dropout}")
        if self.num_gpus != 1:
            raise UsageError("only one GPU is modelled so far; --num-gpus must be 1")
        self._check_evaluation()
        if not self.target_modules:
            raise UsageError("--target-modules is empty; name layers, or say all-linear")
        if self.method == "full" and self.modules_to_save:
            raise UsageError("--modules-to-save belongs to lora and qlora; full trains everything")
        find_optimizer(self.optimizer_name)
        parse_alloc_conf(self.alloc_conf)

    def _check_evaluation(self) -> None:
        _between("--eval-batch-size", self.eval_batch_size, 1, MAX_BATCH)
        for option, value in (
            ("--eval-accumulation-steps", self.eval_accumulation_steps),
            ("--eval-samples", self.eval_samples),
        ):
            if value is not None:
                _between(option, value, 1, MAX_SAMPLES)
        about = (self.eval_logits, self.eval_accumulation_steps, self.eval_samples)
        if not self.evaluate and about != (False, None, None):
            raise UsageError(
                "--eval-logits, --eval-accumulation-steps and --eval-samples are about the "
                "evaluation: add --eval"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """A job from its JSON form; lists become tuples, unknown keys are left out.

        Raises:
            UsageError: If a value is out of range or unknown.
        """
        known = {field.name for field in fields(cls)}
        own: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
        return cls(**own)

    @property
    def optimizer_name(self) -> str:
        """The optimizer asked for, or the usual one for the method."""
        if self.optim is not None:
            return self.optim
        return "paged_adamw_8bit" if self.method == "qlora" else "adamw_torch_fused"

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's row in the table."""
        return find_optimizer(self.optimizer_name)

    @property
    def allocator_settings(self) -> AllocatorSettings:
        """What ``alloc_conf`` says."""
        return parse_alloc_conf(self.alloc_conf)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def quantised(self) -> bool:
        """Whether linear layers are stored quantised."""
        return self.method == "qlora"

    @property
    def uses_bitsandbytes(self) -> bool:
        """Whether bitsandbytes' kernels are loaded."""
        return self.quantised or self.optimizer.library == "bitsandbytes"

    @property
    def weight_dtype(self) -> Dtype:
        """Dtype of the loaded (unquantised) weights."""
        return find_dtype(self.dtype)

    @property
    def autocast_dtype(self) -> Dtype | None:
        """Dtype of the autocast context, None without mixed precision."""
        return {"bf16": BF16, "fp16": FP16}.get(self.mixed_precision)

    @property
    def compute_dtype(self) -> Dtype:
        """``bnb_4bit_compute_dtype``: the autocast dtype, or that of the weights without it."""
        return self.autocast_dtype or self.weight_dtype

    @property
    def adapter_dtype(self) -> Dtype:
        """Dtype of the adapters: peft makes half-precision ones fp32 (autocast_adapter_dtype)."""
        return FP32

    def evaluated(self, run: object) -> Job:
        """This job with the evaluation of a measured run.

        Args:
            run: Its specification or what a record keeps of it; has every name of ``EVALUATION``.
        """
        if not getattr(run, "evaluate", False):
            return self
        return self.but(**{name: getattr(run, name) for name in EVALUATION})

    def but(self, **changes: Any) -> Job:
        """The same job with some fields changed."""
        return replace(self, **changes)


def recorded_job(record: Record) -> Job:
    """The job of a record, under the allocator settings that were in force in its run.

    Args:
        record: The record; those made before there was ``alloc_conf`` have none in their job.

    Raises:
        UsageError: If a setting or a field is one that this version cannot plan with.
    """
    job = Job.from_dict(record.job)
    return job.but(alloc_conf=record.allocator_settings) if record.allocator_settings else job


def _short_name(dtype: str) -> str:
    """Our name for what may be torch's ("bfloat16")."""
    return next((own.name for own in DTYPES.values() if own.torch_name == dtype), dtype)


def _choice(option: str, value: str, known: Any) -> None:
    if value not in known:
        raise UnknownNameError(f"value for {option}", str(value), list(known))


def _between(option: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{option} must be a whole number from {low} to {high:,}, not {value!r}")


def expand(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the listed values, in the order given."""
    axes = {
        name: value if isinstance(value, list) and name not in NAME_LISTS else [value]
        for name, value in values.items()
    }
    empty = [name for name, axis in axes.items() if not axis]
    if empty:
        raise UsageError(f"{empty[0]} is an empty list; nothing would be run")
    return [
        dict(zip(axes, combination, strict=True))
        for combination in itertools.product(*axes.values())
    ]
