"""Families whose runs were not recorded: every phase of a step, estimate against trace."""

from __future__ import annotations

from typing import Any

import pytest

from vramplan.catalogue import model_from_config
from vramplan.estimate import estimate
from vramplan.job import Job
from vramplan.terms import compare
from vramplan.timeline import Phase, Timeline
from vramplan.trace import trace

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 512}
OPT = {
    "model_type": "opt", "hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}
FALCON = {
    "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 512,
}  # fmt: skip
GROUPED = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2-upcast": {**GPT2, "reorder_and_upcast_attn": True, "attn_pdrop": 0.0},
    "gpt2-vocabulary": {**GPT2, "vocab_size": 50257},
    "opt": OPT,
    "opt-350m": {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "opt-dropout": {**OPT, "attention_dropout": 0.1, "enable_bias": False},
    "bloom": BLOOM,
    "bloom-dropout": {**BLOOM, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "bloom-post-norm": {**BLOOM, "apply_residual_connection_post_layernorm": True},
    "bloom-vocabulary": {**BLOOM, "vocab_size": 25000},
    "falcon": FALCON,
    "falcon-40b": GROUPED,
    "falcon-11b": {**GROUPED, "num_ln_in_parallel_attn": 1},
    "falcon-rw": {
        **FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False,
        "attention_dropout": 0.1, "hidden_dropout": 0.1,
    },
    "falcon-alibi": {**FALCON, "alibi": True},
}  # fmt: skip
# scalars and counters of a step, 512 bytes each, and positions, which the estimate leaves out
SCALARS_BYTES = 8 * 1024


def highest(timeline: Timeline) -> dict[Phase, int]:
    """The most that the last step holds in each phase."""
    live, before = 0, Phase.LOAD
    top: dict[Phase, int] = {}
    for section in timeline.sections:
        for event in section.events:
            assert section.repeats == 1
            if event.phase is Phase.FORWARD and before in (Phase.STEP, Phase.PREPARE):
                top = {}
            before = event.phase
            live += event.nbytes * event.copies
            # the head is a part of forward here and of the loss there
            phase = Phase.FORWARD if event.phase is Phase.LOSS else event.phase
            top[phase] = max(top.get(phase, 0), live)
    return top


JOBS = [
    ("full", True, "eager"),
    ("full", False, "sdpa"),
    ("lora", True, "sdpa"),
    ("lora", False, "eager"),
    ("qlora", True, "eager"),
    ("qlora", False, "sdpa"),
]


@pytest.mark.parametrize(("method", "checkpointing", "attention"), JOBS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_phase(name: str, method: str, checkpointing: bool, attention: str) -> None:
    if attention == "sdpa" and name.startswith("bloom"):
        attention = "eager"
    job = Job(
        method=method, batch_size=2, seq_len=120, gradient_checkpointing=checkpointing,
        attn_implementation=attention, lora_r=4, lora_dropout=0.1 if name == "opt" else 0.0,
    )  # fmt: skip
    traced = trace(CONFIGS[name], job)
    estimated = estimate(model_from_config(CONFIGS[name], name), job)
    assert traced.ready_bytes == estimated.ready_bytes
    assert traced.num_trainable == estimated.num_trainable
    assert traced.paged_bytes == estimated.paged_bytes
    measured, predicted = highest(traced.timeline), highest(estimated.timeline)
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        off = predicted[phase] - measured[phase]
        assert abs(off) <= SCALARS_BYTES, (
            phase,
            off,
            compare(traced.timeline, estimated.timeline)[:8],
        )
