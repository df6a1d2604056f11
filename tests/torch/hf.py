"""Builds a model as transformers, bitsandbytes and peft would hold it, on the meta device."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from vramplan.job import Job
from vramplan.units import round_block

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build(config: dict[str, Any], job: Job) -> torch.nn.Module:
    """The prepared model of a job, on meta."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    values = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
    hf_config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=DTYPES[job.dtype])
        # from_config builds buffers on meta too
    if job.method == "qlora":
        quantise(model, job)
        if job.prepare_kbit:
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=job.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
    if job.method != "full":
        targets = job.target_modules
        with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
            model = get_peft_model(
                model,
                LoraConfig(
                    r=job.lora_r,
                    lora_dropout=job.lora_dropout,
                    target_modules=targets if isinstance(targets, str) else list(targets),
                    modules_to_save=list(job.modules_to_save) or None,
                    task_type="CAUSAL_LM",
                ),
            )
    return model


def quantise(model: torch.nn.Module, job: Job) -> None:
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
    torch.set_default_dtype(DTYPES[job.dtype])
    try:
        quantizer._process_model_before_weight_loading(model, device_map=None)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            weight.data = torch.empty(
                module.out_features, module.in_features, dtype=DTYPES[job.dtype], device="meta"
            )
            module.weight = weight._quantize(torch.device("meta"))
    model.is_loaded_in_4bit = job.quant_type != "int8"
    model.is_loaded_in_8bit = job.quant_type == "int8"
    model.is_quantized = True
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of every distinct tensor the model holds, each rounded as the allocator does."""
    seen: dict[int, int] = {}

    def hold(tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            seen[id(tensor)] = round_block(tensor.numel() * tensor.element_size())

    for param in model.parameters():
        hold(param)
        state = getattr(param, "quant_state", None)
        if state is not None:
            hold(state.absmax)
            hold(state.code)
            if state.nested:
                hold(state.offset)
                hold(state.state2.absmax)
                hold(state.state2.code)
        hold(getattr(param, "SCB", None))
    for buffer in model.buffers():
        hold(buffer)
    return sum(seen.values())
