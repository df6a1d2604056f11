"""The job options that commands share, in Hugging Face's words."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vramplan.errors import EnvironmentProblem, RecordError, UsageError
from vramplan.job import ALL_LINEAR, Job
from vramplan.model import Model, TracedModel
from vramplan.report import missing

MODEL_HELP = "A shipped model (see `vramplan models`), a folder, a config.json, or a hub id."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Every term with its formula and its source.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.svg", help="Draw it too.", show_default=False),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
WITNESSES = ("estimate", "trace")
WitnessOption = Annotated[
    str,
    typer.Option(help="Who answers: estimate, or trace (transformers' own code; any family)."),
]
DEFAULT_JOB = Job()
_JOB_OPTIONS: dict[str, tuple[Any, str | None, Any]] = {
    # field of Job: (type, help, default)
    "method": (str, "full, lora or qlora.", DEFAULT_JOB.method),
    "batch_size": (int, "Sequences per device and micro-batch.", DEFAULT_JOB.batch_size),
    "seq_len": (int, "Tokens per sequence.", DEFAULT_JOB.seq_len),
    "gradient_accumulation_steps": (int, "Micro-batches per optimizer step.", 1),
    "gradient_checkpointing": (bool, "Recompute the layers in backward.", True),
    "optim": (
        str,
        "transformers' optimizer name [default: paged_adamw_8bit for qlora, else "
        "adamw_torch_fused].",
        None,
    ),
    "lora_r": (int, "Rank of the adapters.", DEFAULT_JOB.lora_r),
    "lora_dropout": (float, "Dropout before the adapters.", DEFAULT_JOB.lora_dropout),
    "target_modules": (str, "all-linear, or layer names separated by commas.", ALL_LINEAR),
    "modules_to_save": (
        str,
        "Modules trained whole beside the adapters, separated by commas.",
        "",
    ),
    "attn_implementation": (
        str,
        "eager, sdpa or flash_attention_2 [default: what transformers picks].",
        None,
    ),
    "dtype": (str, "Loaded weights: bf16, fp16 or fp32.", DEFAULT_JOB.dtype),
    "mixed_precision": (str, "Autocast: bf16, fp16 or no.", DEFAULT_JOB.mixed_precision),
    "quant_type": (str, "nf4, fp4 or int8 (qlora).", DEFAULT_JOB.quant_type),
    "double_quant": (bool, "Quantise the scales too (qlora).", DEFAULT_JOB.double_quant),
    "prepare_kbit": (bool, "prepare_model_for_kbit_training (qlora).", DEFAULT_JOB.prepare_kbit),
    "alloc_conf": (
        str,
        "PYTORCH_ALLOC_CONF of the process, such as expandable_segments:True.",
        DEFAULT_JOB.alloc_conf,
    ),
    "num_gpus": (int, "GPUs of the run; only 1 is modelled so far.", DEFAULT_JOB.num_gpus),
}
_EVALUATION_OPTIONS: dict[str, tuple[Any, str | None, Any]] = {
    "evaluate": (bool, "Evaluate between training steps.", False),
    "eval_batch_size": (int, "Sequences per evaluation batch.", DEFAULT_JOB.eval_batch_size),
    "eval_logits": (bool, "Keep all logits in it, as compute_metrics does.", False),
    "eval_accumulation_steps": (
        int,
        "Batches after which the logits leave the card [default: never].",
        None,
    ),
    "eval_samples": (int, "Sequences to evaluate; needed with --eval-logits.", None),
}
_FLAGS = {"evaluate": "--eval", "eval_logits": "--eval-logits"}  # without a --no
FIXED_TABLES = ("gpt2", "gptj", "opt")  # positions are rows of a table of that length
_NAME_LISTS = ("target_modules", "modules_to_save")
_WHOLE = ("alloc_conf",)  # commas are part of it
_ADAPTERS = ("lora_r", "lora_dropout", "target_modules")
_QUANTISATION = ("quant_type", "double_quant", "prepare_kbit")


def with_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every job option; it receives them as one ``job``.

    Args:
        command: A function with a parameter ``job: Job``.
    """
    return _with_options(command, "job", lambda values: make_job(values), sweep=False)


def with_sweep(command: Callable[..., None]) -> Callable[..., None]:
    """The same with comma lists: the command receives ``sweep``, fields of Job to lists of values.

    Args:
        command: A function with a parameter ``sweep: dict[str, list]``.
    """
    return _with_options(command, "sweep", parse_sweep, sweep=True)


def _with_options(
    command: Callable[..., None],
    name: str,
    collect: Callable[[dict[str, Any]], Any],
    *,
    sweep: bool,
) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += _job_parameters(sweep) if parameter.name == name else [parameter]

    def wrapper(**values: Any) -> None:
        own = {field: values.pop(field) for field in _options(sweep)}
        command(**values, **{name: collect(own)})

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    kind = inspect.Parameter.KEYWORD_ONLY
    ordered = [parameter.replace(kind=kind) for parameter in parameters]
    wrapper.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return wrapper


def _options(sweep: bool) -> dict[str, tuple[Any, str | None, Any]]:
    """The job options; a sweep measures and has its own words for what it does beside training."""
    return _JOB_OPTIONS if sweep else _JOB_OPTIONS | _EVALUATION_OPTIONS


def _job_parameters(sweep: bool) -> list[inspect.Parameter]:
    """Typer's parameters for the job options."""
    found = []
    for name, (kind, text, default) in _options(sweep).items():
        value, typed = default, kind
        if sweep and kind is not bool:
            typed = str
            value = None if default is None else str(default)
        names = (_FLAGS[name],) if name in _FLAGS else ()
        option = typer.Option(*names, help=text, show_default=value not in (None, ""))
        found.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=value,
                annotation=Annotated[typed if value is not None else typed | None, option],
            )
        )
    return found


def names(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def make_job(values: dict[str, Any]) -> Job:
    """The Job that the options describe.

    Raises:
        UsageError: If a value is out of range or unknown.
    """
    targets = values["target_modules"]
    if values["eval_logits"] and values["eval_samples"] is None:
        raise UsageError(
            "--eval-logits keeps the logits of every sample on the card: say how many with "
            "--eval-samples"
        )
    job = Job(
        **{
            **values,
            "target_modules": ALL_LINEAR if targets == ALL_LINEAR else names(targets),
            "modules_to_save": names(values["modules_to_save"]),
        }
    )
    warn_of_idle_options(job)
    return job


def warn_of_idle_options(job: Job) -> None:
    """Say which options were given that the method has no use for."""
    adapters = _ADAPTERS if job.method == "full" else ()
    quantisation = _QUANTISATION if job.method != "qlora" else ()
    given = [
        name
        for name in (*adapters, *quantisation)
        if getattr(job, name) != getattr(DEFAULT_JOB, name)
    ]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        print(f"warning: --method {job.method} has no use for {options}", file=sys.stderr)


def parse_sweep(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of Job with the values to sweep over: a list where several were given.

    Raises:
        UsageError: If a value is not a number where one is needed.
    """
    swept: dict[str, Any] = {}
    for name, value in values.items():
        kind = _JOB_OPTIONS[name][0]
        if name in _NAME_LISTS:
            swept[name] = ALL_LINEAR if value == ALL_LINEAR else names(value)
        elif value is None or kind is bool or name in _WHOLE:
            swept[name] = value
        else:
            items = [_number(name, part, kind) for part in names(value)]
            swept[name] = items[0] if len(items) == 1 else items
    return swept


def _defaults() -> dict[str, Any]:
    values = {parameter.name: parameter.default for parameter in _job_parameters(sweep=True)}
    return parse_sweep(values)


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise UsageError(f"{option} must be numbers separated by commas, not {text!r}") from None


def check_length(model: Model | TracedModel, job: Job) -> None:
    """Warn when a sequence outgrows the model's positions; refuse where its table ends.

    Raises:
        UsageError: For families whose position table is fixed.
    """
    top = model.dimensions["max_position_embeddings"]
    if top is None or job.seq_len <= top:
        return
    if model.family in FIXED_TABLES:
        raise UsageError(
            f"--seq-len {job.seq_len}: {model.name} has a table of {top} positions and cannot go "
            "beyond it"
        )
    print(
        f"warning: --seq-len {job.seq_len} is beyond the {top} positions {model.name} was made "
        "for; it runs, but may not learn",
        file=sys.stderr,
    )


def check_plot(path: Path, *, force: bool) -> None:
    """Find out before anything is worked out whether a chart can be written there.

    Raises:
        UsageError: If the name is not that of an SVG.
        RecordError: If the file exists.
        EnvironmentProblem: If what draws is not installed.
    """
    check_outputs([path], (".svg",), force=force)
    needs("--plot", "matplotlib")


def check_outputs(paths: list[Path], forms: tuple[str, ...], *, force: bool) -> None:
    """Find out before anything is worked out what could not be written.

    Raises:
        UsageError: If a name ends in none of the forms.
        RecordError: If a file exists.
        EnvironmentProblem: If it is a folder.
    """
    for path in paths:
        if path.suffix not in forms:
            raise UsageError(f"{path}: the name must end in {', '.join(forms)}")
        if path.is_dir():
            raise EnvironmentProblem(f"cannot write {path}: it is a folder")
        if path.exists() and not force:
            raise RecordError(f"{path} exists; replace it with --force")


def needs(what: str, *packages: str) -> None:
    """Say what is not installed before it is needed.

    Raises:
        EnvironmentProblem: If a package is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing(what, package)


DEFAULT_SWEEP = _defaults()
