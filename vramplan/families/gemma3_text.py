"""Gemma 3, text only: Gemma 2's layer with norms on queries and keys and two rotary tables.

Source: transformers 5.17.0 ``models/gemma3/modeling_gemma3.py``. A config of type ``gemma3`` is
another model: AutoModelForCausalLM builds it with its vision tower
(Gemma3ForConditionalGeneration), which no program describes.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan.config import ConfigReader
from vramplan.families import gemma, gemma2
from vramplan.families.common import Env, attend, cos_sin, rotate_both, split_heads
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """Gemma3TextConfig; its attention never caps the scores, whatever the config says."""
    defaults = gemma2.DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072}
    pattern = c.size("sliding_window_pattern", default=6)
    dims = gemma2.read_windowed(c.with_defaults(**defaults), c, pattern, None, None)
    return replace(dims, attn_logit_softcapping=None)


def architecture(d: Dims) -> Architecture:
    """Gemma3ForCausalLM's modules."""
    arch = gemma2.architecture(d)
    more = (NormSpec("self_attn.q_norm", d.head_dim), NormSpec("self_attn.k_norm", d.head_dim))
    buffers = arch.model_buffers * len(set(d.kinds))  # inverse frequencies of each kind
    return replace(arch, block=(*arch.block, *more), model_buffers=buffers)


def prepare(t: Tape, embeds: Tensor, env: Env) -> None:
    """Both masks, and rotary tables for each kind of layer there is."""
    gemma2.masks(t, embeds, env)
    for kind in sorted(set(env.dims.kinds)):
        shared = env.shared[kind]
        shared.cos, shared.sin = cos_sin(t, env, embeds.dtype)


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """Gemma3Attention.forward."""
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = split_heads(t, m.linears["self_attn.q_proj"](t, x), env)
    k = split_heads(t, m.linears["self_attn.k_proj"](t, x), env)
    v = split_heads(t, m.linears["self_attn.v_proj"](t, x), env, value=True)
    q = gemma.rms_norm(t, m.norms["self_attn.q_norm"], q, env)
    k = gemma.rms_norm(t, m.norms["self_attn.k_norm"], k, env)
    q, k = rotate_both(t, q, k, env)
    out, weights = attend(t, q, k, v, env)
    out = m.linears["self_attn.o_proj"](t, out)
    t.owner = outer
    return out, weights


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Gemma3DecoderLayer.forward."""
    return gemma2.decoder_layer(t, m, x, env, attention)


FAMILY = replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    read=read,
    architecture=architecture,
    block=block,
    prepare=prepare,
    source="transformers 5.17.0 models/gemma3/modeling_gemma3.py",
)
