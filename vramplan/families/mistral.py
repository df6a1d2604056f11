"""Mistral: Llama's block, without biases and with an optional sliding window.

Source: transformers 5.17.0 ``models/mistral/modeling_mistral.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan.config import ConfigReader
from vramplan.families import llama
from vramplan.model import Dims


def read(c: ConfigReader) -> Dims:
    """MistralConfig: all layers use the window, if there is one."""
    dims = llama.read(
        c.with_defaults(
            num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072
        )
    )
    window = c.size("sliding_window") if c.values.get("sliding_window") else None
    return replace(
        dims,
        attention_bias=False,
        mlp_bias=False,
        sliding_window=window,
        num_sliding_layers=dims.num_layers if window else 0,
    )


FAMILY = replace(
    llama.FAMILY,
    model_type="mistral",
    read=read,
    source="transformers 5.17.0 models/mistral/modeling_mistral.py",
)
