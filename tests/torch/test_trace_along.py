"""Trace and estimate along the whole step: how high memory stands while each part is at work.

A peak shows one moment, mostly that of the loss. Here the highest level while attention and MLP of
every layer run, forward and backward, must agree as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest

from vramplan.catalogue import model_from_config
from vramplan.estimate import estimate
from vramplan.job import Job
from vramplan.timeline import Event, Phase, Timeline
from vramplan.trace import trace

LAYERS = 3
SHAPE = {
    "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4,
    "num_hidden_layers": LAYERS, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "phi": {"model_type": "phi", "resid_pdrop": 0.1},
    "phi-normed": {
        "model_type": "phi", "qk_layernorm": True, "partial_rotary_factor": 1.0,
        "num_key_value_heads": 2,
    },
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2},
    "phi3-partial": {
        "model_type": "phi3", "partial_rotary_factor": 0.75, "resid_pdrop": 0.1,
        "sliding_window": 64, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 12, "short_factor": [1.0] * 12},
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 64},
    "stablelm": {"model_type": "stablelm", "num_key_value_heads": 2, "use_qkv_bias": True},
    "stablelm-normed": {
        "model_type": "stablelm", "num_key_value_heads": 2, "qk_layernorm": True,
        "use_parallel_residual": True, "hidden_dropout": 0.1, "tie_word_embeddings": True,
    },
    "starcoder2": {"model_type": "starcoder2", "num_key_value_heads": 1},
    "starcoder2-dropout": {
        "model_type": "starcoder2", "num_key_value_heads": 2, "sliding_window": 64,
        "attention_dropout": 0.125, "embedding_dropout": 0.1, "residual_dropout": 0.1,
    },
}  # fmt: skip
JOBS = {  # every method with and without checkpointing, both attentions, two vocabularies
    "full-eager": (512, Job("full", attn_implementation="eager")),
    "full-kept": (16384, Job("full", gradient_checkpointing=False)),
    "lora": (512, Job("lora")),
    "lora-eager-kept": (
        512,
        Job("lora", gradient_checkpointing=False, attn_implementation="eager"),
    ),
    "qlora-eager": (16384, Job("qlora", attn_implementation="eager")),
    "qlora-kept": (512, Job("qlora", gradient_checkpointing=False)),
}  # fmt: skip
# single numbers, each a block of 512 bytes, and the biases that LayerNorm's node keeps since
# torch 2.13; a hidden state has 48 KiB here
TOLERANCE = 8 * 1024

Part = tuple[str, int, str]


def levels(events: Iterable[tuple[Event, int]]) -> dict[Part, int]:
    """Highest level while each part of each layer is at work: (phase, layer, part) -> bytes.

    Args:
        events: Events, and how often their section ran before.
    """
    live = 0
    highest: dict[Part, int] = {}
    for event, repetition in events:
        live += event.nbytes * event.copies
        found = re.search(r"layers\.(\d+|\*)\.(self_attn|mlp)", event.owner)
        if found and event.phase in (Phase.FORWARD, Phase.BACKWARD):
            number, part = found.groups()
            if number == "*":
                backward = event.phase is Phase.BACKWARD
                layer = LAYERS - 1 - repetition if backward else 1 + repetition
            else:
                layer = int(number)
            key = event.phase.value, layer, part
            highest[key] = max(highest.get(key, 0), live)
    return highest


def folded(timeline: Timeline) -> Iterable[tuple[Event, int]]:
    """Every event with the number of its repetition."""
    for section in timeline.sections:
        for repetition in range(section.repeats):
            for event in section.events:
                yield event, repetition


def second_step(timeline: Timeline) -> Iterable[tuple[Event, int]]:
    """Every event of a trace, those of the first step as if they belonged to the load."""
    events = list(timeline.events())
    first = next(
        index
        for index, (event, following) in enumerate(pairwise(events))
        if event.phase is Phase.STEP and following.phase is Phase.FORWARD
    )
    for index, event in enumerate(events):
        yield event if index > first else event._replace(phase=Phase.LOAD), 0


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("variant", CONFIGS)
def test_levels_agree(variant: str, name: str) -> None:
    vocab_size, job = JOBS[name]
    job = job.but(batch_size=2, seq_len=96)
    config = {**SHAPE, "vocab_size": vocab_size, **CONFIGS[variant]}
    traced = trace(config, job, fold=False)
    estimated = estimate(model_from_config(config, variant), job)
    assert abs(estimated.peak_allocated_bytes - traced.peak_allocated_bytes) < TOLERANCE
    expected = levels(second_step(traced.timeline))
    actual = levels(folded(estimated.timeline))
    assert set(actual) == set(expected) and len(actual) == 4 * LAYERS
    off = {part: actual[part] - expected[part] for part in actual}
    assert all(abs(value) < TOLERANCE for value in off.values()), off
