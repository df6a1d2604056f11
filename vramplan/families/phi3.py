"""Phi-3, Phi-3.5 and Phi-4: Llama's block with one qkv_proj and one gate_up_proj.

Source: transformers 5.17.0 ``models/phi3/modeling_phi3.py``.

Known limitations:
    LongRoPE replaces a buffer of a few hundred bytes at the first forward; both are counted.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import llama
from vramplan.families.common import (
    Env,
    Family,
    activate,
    attend,
    dropout,
    rms_norm,
    rotary_parts,
    rotary_prepare,
    rotate,
    split_heads,
)
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """Phi3Config; its ``embd_pdrop`` is read by nothing in the model."""
    dims = llama.read(
        c.with_defaults(
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            max_position_embeddings=4096,
        )
    )
    window = c.size("sliding_window") if c.values.get("sliding_window") else None
    return replace(
        dims,
        attention_bias=False,
        mlp_bias=False,
        rotary_dim=c.rotary_dim(dims.head_dim, 1.0),
        residual_dropout=c.dropout("resid_pdrop"),
        sliding_window=window,
        num_sliding_layers=dims.num_layers if window else 0,
    )


def architecture(d: Dims) -> Architecture:
    """Phi3ForCausalLM's modules."""
    h = d.hidden_size
    q_width, kv_width = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    rotary_buffer = (d.rotary_dim // 2) * 4
    return Architecture(
        embedding=EmbeddingSpec("model.embed_tokens", d.vocab_size, h),
        block=(
            LinearSpec("self_attn.o_proj", q_width, h),
            LinearSpec("self_attn.qkv_proj", h, q_width + 2 * kv_width),
            LinearSpec("mlp.gate_up_proj", h, 2 * d.intermediate_size),
            LinearSpec("mlp.down_proj", d.intermediate_size, h),
            NormSpec("input_layernorm", h),
            NormSpec("post_attention_layernorm", h),
        ),
        final_norm=NormSpec("model.norm", h),
        head=LinearSpec("lm_head", h, d.vocab_size),
        layer_prefix="model.layers",
        model_buffers=(rotary_buffer, rotary_buffer),  # inv_freq, original_inv_freq
    )


def rotate_parts(t: Tape, q: Tensor, k: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: takes each head apart and joins it again, even if all of it rotates."""
    assert env.cos is not None and env.sin is not None
    q_rot, q_pass = rotary_parts(t, q, env)
    k_rot, k_pass = rotary_parts(t, k, env)
    q_embed = ops.cat(t, (rotate(t, q_rot, env.cos, env.sin), q_pass))
    k_embed = ops.cat(t, (rotate(t, k_rot, env.cos, env.sin), k_pass))
    return q_embed, k_embed


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """Phi3Attention.forward; the product of qkv_proj stays whole to its end."""
    d = env.dims
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    qkv = m.linears["self_attn.qkv_proj"](t, x)
    query_pos, kv_width = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    q = ops.slice_(t, qkv, env.tokens * query_pos)
    k = ops.slice_(t, qkv, env.tokens * kv_width)
    v = ops.slice_(t, qkv, env.tokens * kv_width)
    q = split_heads(t, q, env)
    k = split_heads(t, k, env)
    v = split_heads(t, v, env, value=True)
    q, k = rotate_parts(t, q, k, env)
    out, weights = attend(t, q, k, v, env, contiguous=False)
    out = m.linears["self_attn.o_proj"](t, out)
    t.owner = outer
    return out, weights


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Phi3MLP.forward; ``gate`` keeps both halves of gate_up_proj's product to its end."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    up = m.linears["mlp.gate_up_proj"](t, x)
    gate, up = ops.split(t, up, (up.numel // 2,) * 2)
    up = ops.mul(t, up, activate(t, gate, env, "activation_fn"))
    out = m.linears["mlp.down_proj"](t, up)
    t.owner = outer
    return out


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Phi3DecoderLayer.forward."""
    p = env.dims.residual_dropout
    residual = x
    h = rms_norm(t, m.norms["input_layernorm"], x, env)
    h, _weights = attention(t, m, h, env)
    h = ops.add(t, residual, dropout(t, h, p, "resid_attn_dropout"))
    residual = h
    h = rms_norm(t, m.norms["post_attention_layernorm"], h, env)
    h = mlp(t, m, h, env)
    h = ops.add(t, residual, dropout(t, h, p, "resid_mlp_dropout"))
    return h  # noqa: RET504 - the MLP's output goes before the residual


FAMILY = Family(
    model_type="phi3",
    read=read,
    architecture=architecture,
    block=block,
    norm=rms_norm,
    prepare=rotary_prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/phi3/modeling_phi3.py",
)
