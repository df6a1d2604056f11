"""OLMo 2: norms after attention and MLP, norms over all queries and keys, fp32 rotary tables.

Source: transformers 5.17.0 ``models/olmo2/modeling_olmo2.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import llama
from vramplan.families.common import (
    Env,
    Family,
    attend,
    causal_mask,
    cos_sin,
    rotate,
    split_heads,
)
from vramplan.formats import FP32
from vramplan.layers import Layer, Norm
from vramplan.model import Architecture, Dims, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """Olmo2Config."""
    return replace(llama.read(c.with_defaults(vocab_size=50304)), mlp_bias=False)


def architecture(d: Dims) -> Architecture:
    """Olmo2ForCausalLM's modules."""
    arch = llama.architecture(d)
    linears = tuple(module for module in arch.block if not isinstance(module, NormSpec))
    norms = (
        NormSpec("self_attn.q_norm", d.num_heads * d.head_dim),
        NormSpec("self_attn.k_norm", d.num_kv_heads * d.head_dim),
        NormSpec("post_attention_layernorm", d.hidden_size),
        NormSpec("post_feedforward_layernorm", d.hidden_size),
    )
    return replace(arch, block=(*linears, *norms))


def prepare(t: Tape, embeds: Tensor, env: Env) -> None:
    """The mask, and rotary tables that stay in fp32."""
    causal_mask(t, embeds, env)
    env.cos, env.sin = cos_sin(t, env, FP32)


def rms_norm(t: Tape, norm: Norm, x: Tensor, env: Env) -> Tensor:
    """Olmo2RMSNorm.forward: cast after the weight, ``(self.weight * hidden_states).to(dtype)``."""
    outer, t.owner = t.owner, norm.owner
    h = ops.to(t, x, FP32)
    variance = ops.mean(t, ops.pow_scalar(t, h), env.tokens)
    h = ops.mul(t, h, ops.rsqrt(t, ops.add_scalar(t, variance)))
    out = ops.to(t, ops.mul(t, norm.weight, h), x.dtype)
    t.owner = outer
    return out


def rotate_both(t: Tape, q: Tensor, k: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: fp32 by the tables, cast back when both are done."""
    assert env.cos is not None and env.sin is not None
    q_embed = rotate(t, q, env.cos, env.sin)
    k_embed = rotate(t, k, env.cos, env.sin)
    return ops.to(t, q_embed, q.dtype), ops.to(t, k_embed, k.dtype)


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """Olmo2Attention.forward."""
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = rms_norm(t, m.norms["self_attn.q_norm"], m.linears["self_attn.q_proj"](t, x), env)
    k = rms_norm(t, m.norms["self_attn.k_norm"], m.linears["self_attn.k_proj"](t, x), env)
    v = m.linears["self_attn.v_proj"](t, x)
    q = split_heads(t, q, env)
    k = split_heads(t, k, env)
    v = split_heads(t, v, env, value=True)
    q, k = rotate_both(t, q, k, env)
    out, weights = attend(t, q, k, v, env)
    out = m.linears["self_attn.o_proj"](t, out)
    t.owner = outer
    return out, weights


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Olmo2DecoderLayer.forward."""
    residual = x
    h, _weights = attention(t, m, x, env)
    h = rms_norm(t, m.norms["post_attention_layernorm"], h, env)
    h = ops.add(t, residual, h)
    residual = h
    h = llama.mlp(t, m, h, env)
    h = rms_norm(t, m.norms["post_feedforward_layernorm"], h, env)
    return ops.add(t, residual, h)


FAMILY = Family(
    model_type="olmo2",
    read=read,
    architecture=architecture,
    block=block,
    norm=rms_norm,
    prepare=prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/olmo2/modeling_olmo2.py",
)
