"""The model of a job as transformers, bitsandbytes and peft hold it: on meta, then fake.

Source: transformers 5.17.0 ``modeling_utils.py``, ``quantizers/quantizer_bnb_4bit.py``; peft
0.21.0; bitsandbytes 0.50.2 ``nn/modules.py``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from vramplan.config import MAX_LAYERS, ConfigReader, dtype_option
from vramplan.errors import ConfigError, UsageError
from vramplan.job import Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# keys that name code, files or kernels to fetch, or that the job decides
IGNORED = frozenset(
    ("torch_dtype", "dtype", "auto_map", "quantization_config", "attn_implementation",
     "_attn_implementation", "_name_or_path", "experts_implementation")
)  # fmt: skip
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
SIZES = (
    "hidden_size", "n_embd", "d_model", "vocab_size", "intermediate_size", "n_inner", "ffn_dim",
    "num_attention_heads", "n_head", "num_key_value_heads", "max_position_embeddings",
    "n_positions", "head_dim", "num_local_experts", "num_experts",
)  # fmt: skip
META = torch.device("meta")
LONGEST_REASON = 300
QUANTISED = ("Params4bit", "Int8Params")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries' warnings and progress lines are not the user's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def build(
    config: Mapping[str, Any],
    job: Job,
    where: str = "config",
    change: Callable[[Any], None] = lambda _config: None,
) -> Any:
    """The prepared model of a job, on meta.

    Args:
        config: Values of a config.json; its code, if it names any, is never run.
        job: Method, dtype, quantisation, adapters and attention.
        where: How to name the config in errors.
        change: Called with the config before the model is made of it.

    Raises:
        ConfigError: If transformers cannot make a model of the config.
        UsageError: If peft cannot adapt it as asked.
    """
    with quiet():
        model = base_model(config, job, where, change)
        if job.method == "qlora":
            quantise(model, job)
        return model if job.method == "full" else _with_adapters(model, job, where)


def base_model(
    config: Mapping[str, Any],
    job: Job,
    where: str,
    change: Callable[[Any], None] = lambda _config: None,
) -> Any:
    """The model before quantisation and adapters, on meta.

    Raises:
        ConfigError: If transformers cannot make a model of the config.
    """
    check_config(config, where)
    values = {key: value for key, value in config.items() if key not in IGNORED}
    options: dict[str, Any] = {}
    if job.attn_implementation:
        options["attn_implementation"] = job.attn_implementation
    try:
        hf_config = AutoConfig.for_model(**values)
        change(hf_config)
        options[dtype_option(hf_config)] = DTYPES[job.dtype]
        with META:
            model = AutoModelForCausalLM.from_config(hf_config, **options)
        model.tie_weights()  # what from_pretrained does; on meta some versions leave it out
        return model
    except Exception as error:  # any library's, for a config that nobody vouches for
        raise ConfigError(
            f"{where}: transformers cannot make a model of it: {in_one_line(error)}"
        ) from error


def in_one_line(error: Exception) -> str:
    """What a library says of an error, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that no model has before anything is built of them.

    Raises:
        ConfigError: If a size is not one, or model_type is missing.
    """
    reader = ConfigReader(config, where)
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{where}: model_type is missing; is this a transformers config.json?")
    for name in LAYER_COUNTS:
        if config.get(name) is not None:
            reader.size(name, top=MAX_LAYERS)
    for name in SIZES:
        if config.get(name) is not None:
            reader.size(name)


def _with_adapters(model: Any, job: Job, where: str) -> Any:
    if job.method == "qlora" and job.prepare_kbit:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=job.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    targets = job.target_modules
    settings = LoraConfig(
        r=job.lora_r,
        lora_alpha=2 * job.lora_r,
        lora_dropout=job.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(job.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    try:
        with META:
            return get_peft_model(model, settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{where}: peft cannot adapt it: {in_one_line(error)}") from error


def quantise(model: Any, job: Job) -> None:
    """What from_pretrained does with a BitsAndBytesConfig, on meta."""
    if job.quant_type == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=job.quant_type,
            bnb_4bit_use_double_quant=job.double_quant,
            bnb_4bit_compute_dtype=DTYPES[job.compute_dtype.name],
        )
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    # from_pretrained replaces modules while the default dtype is the model's
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[job.dtype])
    try:
        quantizer._process_model_before_weight_loading(model, device_map=None)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ in QUANTISED:
            weight.data = torch.empty(
                module.out_features, module.in_features, dtype=DTYPES[job.dtype], device="meta"
            )
            module.weight = weight._quantize(META)
    model.is_loaded_in_4bit = job.quant_type != "int8"
    model.is_loaded_in_8bit = job.quant_type == "int8"
    model.is_quantized = True
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method


def quant_tensors(parameter: Any) -> list[Any]:
    """The scales of a weight that bitsandbytes quantised."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        parts = [getattr(parameter, "SCB", None)]
    else:
        nested = (state.state2.absmax, state.state2.code) if state.nested else ()
        parts = [state.absmax, state.code, state.offset if state.nested else None, *nested]
    return [part for part in parts if torch.is_tensor(part)]
