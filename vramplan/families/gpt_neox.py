"""GPT-NeoX and Pythia: one fused query_key_value, rotary positions on part of each head.

Source: transformers 5.17.0 ``models/gpt_neox/modeling_gpt_neox.py``.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families.common import (
    Env,
    Family,
    activate,
    attend,
    layer_norm,
    rotary_prepare,
    rotate,
)
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """GPTNeoXConfig."""
    hidden = c.size("hidden_size", default=6144)
    heads = c.size("num_attention_heads", default=64)
    head_dim = c.heads(hidden, heads)
    return Dims(
        vocab_size=c.size("vocab_size", default=50432),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers", default=44, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=c.size("intermediate_size", default=24576),
        max_positions=c.size("max_position_embeddings", default=2048),
        hidden_act=c.text("hidden_act", default="gelu"),
        tied=c.flag("tie_word_embeddings", default=False),
        rotary_dim=c.rotary_dim(head_dim, c.rope("rotary_pct", 0.25)),
        attention_bias=c.flag("attention_bias", default=True),
        attention_dropout=c.dropout("attention_dropout"),
        residual_dropout=c.dropout("hidden_dropout"),
        embedding_dropout=c.dropout("hidden_dropout"),
        parallel_residual=c.flag("use_parallel_residual", default=True),
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """GPTNeoXForCausalLM's modules."""
    h = d.hidden_size
    rotary_buffer = -(-d.rotary_dim // 2) * 4
    return Architecture(
        embedding=EmbeddingSpec("gpt_neox.embed_in", d.vocab_size, h),
        block=(
            NormSpec("input_layernorm", h, bias=True),
            NormSpec("post_attention_layernorm", h, bias=True),
            LinearSpec("attention.query_key_value", h, 3 * h, d.attention_bias),
            LinearSpec("attention.dense", h, h, d.attention_bias),
            LinearSpec("mlp.dense_h_to_4h", h, d.intermediate_size, bias=True),
            LinearSpec("mlp.dense_4h_to_h", d.intermediate_size, h, bias=True),
        ),
        final_norm=NormSpec("gpt_neox.final_layer_norm", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size),
        layer_prefix="gpt_neox.layers",
        model_buffers=(rotary_buffer, rotary_buffer),
    )


def partial_rotate(t: Tape, q: Tensor, k: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: rotates the first rotary_dim of each head, copies the rest."""
    assert env.cos is not None and env.sin is not None
    rotated = q.numel // env.dims.head_dim * env.dims.rotary_dim
    q_rot, q_pass = ops.slice_(t, q, rotated), ops.slice_(t, q, q.numel - rotated)
    k_rot, k_pass = ops.slice_(t, k, rotated), ops.slice_(t, k, k.numel - rotated)
    q_out = rotate(t, q_rot, env.cos, env.sin)
    k_out = rotate(t, k_rot, env.cos, env.sin)
    q_out = ops.cat(t, (q_out, q_pass))
    k_out = ops.cat(t, (k_out, k_pass))
    return q_out, k_out


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """GPTNeoXAttention.forward."""
    outer, t.owner = t.owner, f"{m.name}.attention"
    qkv = ops.transpose(t, m.linears["attention.query_key_value"](t, x))  # [.., heads, length, ..]
    q, k, v = ops.split(t, qkv, (qkv.numel // 3,) * 3)
    q, k = partial_rotate(t, q, k, env)
    out, weights = attend(t, q, k, v, env, contiguous=False)
    out = m.linears["attention.dense"](t, out)
    t.owner = outer
    return out, weights


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GPTNeoXMLP.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    h = m.linears["mlp.dense_h_to_4h"](t, x)
    h = activate(t, h, env, "act")
    h = m.linears["mlp.dense_4h_to_h"](t, h)
    t.owner = outer
    return h


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GPTNeoXLayer.forward."""
    p = env.dims.residual_dropout
    attn, _weights = attention(t, m, layer_norm(t, m.norms["input_layernorm"], x, env), env)
    attn = ops.dropout(t, attn, p)
    if env.dims.parallel_residual:
        out = mlp(t, m, layer_norm(t, m.norms["post_attention_layernorm"], x, env), env)
        out = ops.dropout(t, out, p)
        return ops.add(t, ops.add(t, out, attn), x)
    attn = ops.add(t, attn, x)
    out = mlp(t, m, layer_norm(t, m.norms["post_attention_layernorm"], attn, env), env)
    out = ops.dropout(t, out, p)
    return ops.add(t, out, attn)


FAMILY = Family(
    model_type="gpt_neox",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=rotary_prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/gpt_neox/modeling_gpt_neox.py",
)
