"""The model of a run: random weights built on the device, or a checkpoint, then peft's part."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from vramplan.config import dtype_option
from vramplan.job import Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_model(config: dict[str, Any], job: Job, device: torch.device) -> Any:
    """A model as ``from_pretrained`` would hand it over, with random weights.

    Args:
        config: Values of a config.json.
        job: Method, dtype, quantisation and attention.
        device: Where its weights go.
    """
    values = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
    hf_config = AutoConfig.for_model(**values)
    options: dict[str, Any] = {dtype_option(hf_config): DTYPES[job.dtype]}
    if job.attn_implementation:
        options["attn_implementation"] = job.attn_implementation
    if not job.quantised:
        with device:
            return AutoModelForCausalLM.from_config(hf_config, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, **options)
    settings = quantization_config(job)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    for module in model.modules():
        _materialise(module, DTYPES[job.dtype], device)
    model.tie_weights()
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = settings.quant_method
    model.is_loaded_in_4bit = job.quant_type != "int8"
    model.is_loaded_in_8bit = job.quant_type == "int8"
    model.config.quantization_config = settings
    if device.type == "cuda":
        model.hf_device_map = {"": device.index or 0}
    return model


def load_checkpoint(folder: str, job: Job, device: torch.device) -> Any:
    """A checkpoint as ``from_pretrained`` loads it: safetensors only, no code of its own.

    Args:
        folder: The checkpoint's folder.
        job: Method, dtype, quantisation and attention.
        device: Where its weights go.
    """
    hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    options: dict[str, Any] = {dtype_option(hf_config): DTYPES[job.dtype]}
    if job.attn_implementation:
        options["attn_implementation"] = job.attn_implementation
    if job.quantised:
        options["quantization_config"] = quantization_config(job)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        **options,
    )


def quantization_config(job: Job) -> BitsAndBytesConfig:
    """The job's BitsAndBytesConfig."""
    if job.quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.quant_type,
        bnb_4bit_use_double_quant=job.double_quant,
        bnb_4bit_compute_dtype=DTYPES[job.compute_dtype.name],
    )


def _materialise(module: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Give one module's own parameters and buffers random contents, quantising as it goes."""
    import bitsandbytes as bnb  # noqa: PLC0415 - only quantised runs need it

    for name, param in list(module.named_parameters(recurse=False)):
        kind = type(param).__name__
        if kind in ("Params4bit", "Int8Params"):
            shape = (module.out_features, module.in_features)
            weight = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02)
            options = {k: v for k, v in param.__dict__.items() if k not in ("SCB", "CB")}
            if kind == "Params4bit":
                options["module"] = module
                new = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(device)
            else:
                new = bnb.nn.Int8Params(weight, requires_grad=False, **options)._quantize(device)
            del weight
        else:
            value = torch.empty(param.shape, dtype=dtype, device=device)
            if param.dim() > 1:
                value.normal_(0.0, 0.02)
            else:
                value.fill_(1.0 if name == "weight" else 0.0)
            new = torch.nn.Parameter(value, requires_grad=param.requires_grad)
        setattr(module, name, new)
    for name, buffer in list(module.named_buffers(recurse=False)):
        value = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
        module.register_buffer(name, value, persistent=False)


def prepare(model: Any, job: Job) -> Any:
    """Peft's part: k-bit preparation and the adapters."""
    if job.method == "full":
        return model
    from peft import (  # noqa: PLC0415 - full fine-tuning does not need it
        LoraConfig,
        get_peft_model,
        prepare_model_for_kbit_training,
    )

    if job.quantised and job.prepare_kbit:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=job.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    targets = job.target_modules
    return get_peft_model(
        model,
        LoraConfig(
            r=job.lora_r,
            lora_alpha=2 * job.lora_r,
            lora_dropout=job.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=list(job.modules_to_save) or None,
            task_type="CAUSAL_LM",
        ),
    )


class RandomTokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):  # type: ignore[misc]
    """Sequences of random tokens, all of the same length, labels equal to inputs."""

    def __init__(self, count: int, length: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocab_size, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()}
