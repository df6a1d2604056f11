"""Mixtures of experts: the block programs against the real code on fake tensors."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from vramplan.catalogue import model_from_config
from vramplan.errors import UsageError
from vramplan.estimate import estimate
from vramplan.job import Job
from vramplan.terms import compare
from vramplan.trace import trace

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**SHAPE, "num_local_experts": 4},
    "qwen2_moe": {
        **SHAPE, "num_experts": 8, "moe_intermediate_size": 64, "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 128,
    },
    "qwen3_moe": {
        **SHAPE, "num_experts": 8, "head_dim": 64, "moe_intermediate_size": 64,
        "norm_topk_prob": True, "decoder_sparse_step": 2,
    },
    "gpt_oss": {**SHAPE, "num_local_experts": 4, "head_dim": 64},
}  # fmt: skip
JOBS = {
    "full": Job(method="full"),
    "lora": Job(method="lora"),
    "lora-fp32": Job(method="lora", dtype="fp32"),
    "lora-no-autocast": Job(method="lora", mixed_precision="no"),
    "lora-attention": Job(method="lora", target_modules=("q_proj", "v_proj")),
    "qlora": Job(),
    "qlora-unprepared": Job(prepare_kbit=False),
}
# The layers' own peak decides here, not the logits: what the experts hold is a tenth of it.
TOLERANCE = 0.0005


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, True) for name in JOBS), *((name, False) for name in ("full", "lora", "qlora"))],
)
@pytest.mark.parametrize("family", CONFIGS)
def test_agrees_with_the_trace(family: str, name: str, checkpointing: bool) -> None:
    config = {"model_type": family, **CONFIGS[family]}
    job = JOBS[name].but(batch_size=2, seq_len=256, lora_r=4, gradient_checkpointing=checkpointing)
    traced = trace(config, job)
    estimated = estimate(model_from_config(config, family), job)
    assert traced.ready_bytes == estimated.ready_bytes
    assert traced.num_trainable == estimated.num_trainable
    off = traced.peak_allocated_bytes / estimated.peak_allocated_bytes - 1
    assert abs(off) < TOLERANCE, compare(traced.timeline, estimated.timeline)[:8]


def adapted(family: str, **options: Any) -> Any:
    """Peft's model on meta."""
    config = AutoConfig.for_model(family, **CONFIGS[family])
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        model = AutoModelForCausalLM.from_config(config)
        return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize(
    ("family", "options", "job"),
    [
        (
            "mixtral",
            {"target_modules": "all-linear", "lora_dropout": 0.1},
            Job(method="lora", lora_dropout=0.1),
        ),
        (
            "mixtral",
            {"target_modules": ["w1", "w2"]},
            Job(method="lora", target_modules=("w1", "w2")),
        ),
        (
            "qwen3_moe",
            {"target_modules": ["gate_proj"]},
            Job(method="lora", target_modules=("gate_proj",)),
        ),
    ],
    ids=["dropout", "half", "gate-alone"],
)
def test_what_peft_refuses_is_refused(family: str, options: dict[str, Any], job: Job) -> None:
    with pytest.raises(ValueError, match=r"dropout|Cannot convert"):
        adapted(family, **options)
    with pytest.raises(UsageError, match=r"lora-dropout|only together"):
        estimate(model_from_config({"model_type": family, **CONFIGS[family]}, family), job)


@pytest.mark.parametrize("family", CONFIGS)
def test_grouped_products_are_the_default(family: str) -> None:
    config = AutoConfig.for_model(family, **CONFIGS[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.config._experts_implementation == "grouped_mm"
