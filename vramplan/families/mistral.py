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
    dims = llama.read(c)
    window = c.size("sliding_window") if c.values.get("sliding_window") else None
    kv_heads = dims.num_kv_heads if "num_key_value_heads" in c.values else 8
    return replace(
        dims,
        num_kv_heads=kv_heads,
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
