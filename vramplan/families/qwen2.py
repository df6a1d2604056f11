"""Qwen2: Llama's block with biases on q, k and v, and a window on the upper layers if switched on.

Source: transformers 5.17.0 ``models/qwen2/modeling_qwen2.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan.config import ConfigReader
from vramplan.families import llama
from vramplan.model import Architecture, Dims


def read(c: ConfigReader) -> Dims:
    """Qwen2Config."""
    dims = llama.read(
        c.with_defaults(vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)
    )
    used = c.flag("use_sliding_window", default=False)
    window = c.size("sliding_window", default=4096) if used else None
    if window:
        c.warnings.append(
            "The sliding window of the upper layers is planned as if every layer used it."
        )
    first = c.number("max_window_layers", default=28, low=0, high=10_000)
    return replace(
        dims,
        attention_bias=True,
        mlp_bias=False,
        sliding_window=window,
        num_sliding_layers=max(0, dims.num_layers - int(first)) if window else 0,
    )


def architecture(d: Dims) -> Architecture:
    """Qwen2ForCausalLM's modules."""
    return llama.architecture(d, qkv_bias=True)


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen2",
    read=read,
    architecture=architecture,
    source="transformers 5.17.0 models/qwen2/modeling_qwen2.py",
)
