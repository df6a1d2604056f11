"""Qwen3 (dense): Llama's block with an RMSNorm on every head of queries and keys.

Source: transformers 5.17.0 ``models/qwen3/modeling_qwen3.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import llama, qwen2
from vramplan.families.common import Env, attend, pre_norm_block, rms_norm, rotate_both, split_heads
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """Qwen3Config: a head's width does not follow from the others."""
    dims = qwen2.read(c.with_defaults(head_dim=128))
    return replace(dims, attention_bias=c.flag("attention_bias", default=False))


def architecture(d: Dims) -> Architecture:
    """Qwen3ForCausalLM's modules."""
    base = llama.architecture(d)
    norms = NormSpec("self_attn.q_norm", d.head_dim), NormSpec("self_attn.k_norm", d.head_dim)
    return replace(base, block=(*base.block[:4], *norms, *base.block[4:]))


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """Qwen3Attention.forward."""
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = _normed(t, m, "q", x, env)
    k = _normed(t, m, "k", x, env)
    v = split_heads(t, m.linears["self_attn.v_proj"](t, x), env, value=True)
    q, k = rotate_both(t, q, k, env)
    out, weights = attend(t, q, k, v, env)
    out = m.linears["self_attn.o_proj"](t, out)
    t.owner = outer
    return out, weights


def _normed(t: Tape, m: Layer, name: str, x: Tensor, env: Env) -> Tensor:
    """``q_norm(q_proj(x).view(hidden_shape)).transpose(1, 2)``."""
    states = split_heads(t, m.linears[f"self_attn.{name}_proj"](t, x), env)
    return ops.view(t, rms_norm(t, m.norms[f"self_attn.{name}_norm"], states, env))


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Qwen3DecoderLayer.forward."""
    return pre_norm_block(t, m, x, env, norm=rms_norm, attention=attention, mlp=llama.mlp)


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen3",
    read=read,
    architecture=architecture,
    block=block,
    source="transformers 5.17.0 models/qwen3/modeling_qwen3.py",
)
