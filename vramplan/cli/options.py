"""The job options that commands share, in Hugging Face's words."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from vramplan.errors import UsageError
from vramplan.job import ALL_LINEAR, Job
from vramplan.model import Model

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A shipped model (see `vramplan models`), a folder, a config.json, or a hub id.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Every term with its formula and its source.")
]
Method = Annotated[str, typer.Option(help="full, lora or qlora.")]
BatchSize = Annotated[int, typer.Option(help="Sequences per device and micro-batch.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sequence.")]
Accumulation = Annotated[int, typer.Option(help="Micro-batches per optimizer step.")]
Checkpointing = Annotated[bool, typer.Option(help="Recompute the layers in backward.")]
Optim = Annotated[
    str | None,
    typer.Option(
        help="transformers' optimizer name [default: paged_adamw_8bit for qlora, "
        "else adamw_torch_fused].",
        show_default=False,
    ),
]
LoraR = Annotated[int, typer.Option(help="Rank of the adapters.")]
LoraDropout = Annotated[float, typer.Option(help="Dropout before the adapters.")]
TargetModules = Annotated[str, typer.Option(help="all-linear, or layer names separated by commas.")]
ModulesToSave = Annotated[
    str, typer.Option(help="Modules trained whole beside the adapters, separated by commas.")
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="eager, sdpa or flash_attention_2 [default: what transformers picks].",
        show_default=False,
    ),
]
DtypeName = Annotated[str, typer.Option(help="Loaded weights: bf16, fp16 or fp32.")]
MixedPrecision = Annotated[str, typer.Option(help="Autocast: bf16, fp16 or no.")]
QuantType = Annotated[str, typer.Option(help="nf4, fp4 or int8 (qlora).")]
DoubleQuant = Annotated[bool, typer.Option(help="Quantise the scales too (qlora).")]
PrepareKbit = Annotated[bool, typer.Option(help="prepare_model_for_kbit_training (qlora).")]
NumGpus = Annotated[int, typer.Option(help="GPUs of the run; only 1 is modelled so far.")]


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def make_job(target_modules: str, modules_to_save: str, **values: Any) -> Job:
    """The Job that the options describe.

    Raises:
        UsageError: If a value is out of range or unknown.
    """
    targets = ALL_LINEAR if target_modules == ALL_LINEAR else names(target_modules)
    return Job(target_modules=targets, modules_to_save=names(modules_to_save), **values)


def check_length(model: Model, job: Job) -> None:
    """Warn when a sequence outgrows the model's positions; refuse where its table ends.

    Raises:
        UsageError: For families whose position table is fixed.
    """
    top = model.dims.max_positions
    if job.seq_len <= top:
        return
    if model.family == "gptj":
        raise UsageError(
            f"--seq-len {job.seq_len}: {model.name} has a table of {top} positions and cannot go "
            "beyond it"
        )
    print(
        f"warning: --seq-len {job.seq_len} is beyond the {top} positions {model.name} was made "
        "for; it runs, but may not learn",
        file=sys.stderr,
    )
