"""Estimate against trace on random jobs, and answers from the trace alone.

The sample is the same on every run; another ``SEED`` draws another (``CONTRIBUTING.md``).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import samples
from typer.testing import CliRunner

import vramplan.cli
from vramplan.catalogue import find_model, model_from_config
from vramplan.cli.witness import tracer
from vramplan.errors import UsageError
from vramplan.estimate import estimate
from vramplan.families import NAMES
from vramplan.job import Job
from vramplan.prediction import predict
from vramplan.terms import compare
from vramplan.trace import trace
from vramplan.trace.run import trace as run_trace

SEED = 11
# of what moves, cuBLAS's 64 MiB left out; a few scalars and small vectors beside toy models
TOLERANCE, SCALARS_BYTES = 0.005, 24 * 1024


@pytest.mark.parametrize("family", NAMES)
def test_random_jobs_agree(family: str) -> None:
    model, job = samples.sample(random.Random(f"{family} {SEED}").choice, family)
    traced, estimated = trace(dict(model.config), job), estimate(model, job)
    assert traced.ready_bytes == estimated.ready_bytes
    assert traced.paged_bytes == estimated.paged_bytes
    assert traced.num_trainable == estimated.num_trainable
    off = abs(traced.peak_allocated_bytes - estimated.peak_allocated_bytes)
    moving = estimated.peak_allocated_bytes - 64 * 2**20
    terms = compare(traced.timeline, estimated.timeline)[:8]
    assert off <= max(TOLERANCE * moving, SCALARS_BYTES), (model.config, job, terms)


# What random jobs once found, each a mechanism of its own: (config changes, job)
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 688,
    "num_hidden_layers": 5, "vocab_size": 1000, "pad_token_id": 0,
}  # fmt: skip
FOUND: dict[str, tuple[dict[str, Any], Job]] = {
    "int8-inputs-live-with-the-graph": ({}, Job(quant_type="int8", seq_len=128)),
    "tables-of-a-first-layer-without-gradients": (
        {},
        Job(method="lora", target_modules=("down_proj",), gradient_checkpointing=False,
            seq_len=128, attn_implementation="eager"),
    ),
    "saved-embedding-unties-the-head": (
        {"tie_word_embeddings": True, "vocab_size": 20000},
        Job(method="lora", modules_to_save=("embed_tokens",), seq_len=8, dtype="fp16"),
    ),
    "adagrad-two-temporaries": ({}, Job(method="full", optim="adagrad", seq_len=8)),
    "adafactor-last-update": (
        {"vocab_size": 5000}, Job(method="full", optim="adafactor", seq_len=8)
    ),
    "ademamix-paged": ({}, Job(method="full", optim="paged_ademamix_8bit", seq_len=8)),
    "all-micro-batches-at-once": (
        {}, Job(method="lora", gradient_accumulation_steps=40, batch_size=4, seq_len=256)
    ),
    "eager-queries-of-short-sequences": (
        {}, Job(method="full", attn_implementation="eager", batch_size=3, seq_len=40,
                gradient_checkpointing=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_mechanisms_that_random_jobs_found(name: str) -> None:
    changes, job = FOUND[name]
    config = {**LLAMA, **changes}
    traced, estimated = trace(config, job), estimate(model_from_config(config, name), job)
    assert traced.paged_bytes == estimated.paged_bytes
    off = abs(traced.peak_allocated_bytes - estimated.peak_allocated_bytes)
    assert off <= SCALARS_BYTES, compare(traced.timeline, estimated.timeline)[:8]


@pytest.mark.parametrize(
    ("slug", "method", "bound"),
    [
        ("llama-3.1-8b", "qlora", 0.005),
        ("gpt-j-6b", "lora", 0.005),
        ("qwen3-30b-a3b", "qlora", 0.1),  # the estimate stacks experts while they are loaded
    ],
)
def test_both_witnesses_fill_the_cache_alike(slug: str, method: str, bound: float) -> None:
    """Loading, preparation and the order of two steps too: reserved and the smallest limit.

    The trace has two steps, the estimate replays a third.
    """
    job = Job(method=method)
    estimated, traced = predict(find_model(slug), job), tracer(slug)(job, None)
    assert traced.model.num_parameters == estimated.model.num_parameters
    for name in ("ready_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "min_limit_bytes",
                 "load_peak_bytes", "device_peak_bytes", "disk_bytes"):  # fmt: skip
        assert getattr(traced, name) == pytest.approx(getattr(estimated, name), rel=bound), name


OTHERS: dict[str, dict[str, Any]] = {
    "cohere": {}, "glm4": {"head_dim": 32}, "granite": {}, "nemotron": {}, "olmo": {},
    "persimmon": {}, "ernie4_5": {}, "smollm3": {}, "hunyuan_v1_dense": {"head_dim": 32},
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_fit_answers_for_families_without_a_program(family: str, tmp_path: Path) -> None:
    assert family not in NAMES
    config = {
        "model_type": family, "hidden_size": 256, "num_attention_heads": 8, "vocab_size": 8000,
        "intermediate_size": 512, "num_hidden_layers": 6, "num_key_value_heads": 2,
        "pad_token_id": 0, **OTHERS[family],
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    vramplan.cli._register(["fit"])
    done = CliRunner().invoke(
        vramplan.cli.app,
        ["fit", str(path), "--memory", "12GiB", "--seq-len", "128", "--witness", "trace", "--json"],
    )
    assert done.exit_code == 0, done.exception
    document = json.loads(done.stdout)
    told = document["prediction"]
    assert told["witness"] == "trace" and document["advice"] == []
    assert document["model"]["family"] == family and document["model"]["num_parameters"] > 10**6
    assert document["verdicts"][0]["verdict"] == "fits"
    assert sum(told["breakdown"].values()) == told["peak_allocated_bytes"]
    assert told["ready_bytes"] < told["peak_allocated_bytes"] <= told["peak_reserved_bytes"]
    assert told["min_limit_bytes"] <= told["peak_reserved_bytes"] < told["device_peak_bytes"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ["llama"]},
        {"hidden_size": 100, "num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"vocab_size": "many"},
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": 5}},
        {"model_type": "mixtral", "num_local_experts": 0},
        {"num_hidden_layers": 2.5},
    ],
)
def test_hostile_configs_are_one_line_of_a_trace(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        run_trace({**LLAMA, **changes}, Job(method="lora", seq_len=8))
    assert "\n" not in str(caught.value)


def test_what_peft_cannot_adapt_is_one_line() -> None:
    with pytest.raises(UsageError, match="peft cannot adapt it") as caught:
        run_trace(LLAMA, Job(method="lora", seq_len=8, target_modules=("wq",)))
    assert "\n" not in str(caught.value)
