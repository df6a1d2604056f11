"""BLOOM: ALiBi, a norm behind the embedding, eager attention alone.

Source: transformers 5.17.0 ``models/bloom/modeling_bloom.py``.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families.common import (
    Env,
    Family,
    causal_mask,
    dropout,
    dropout_add,
    layer_norm,
)
from vramplan.formats import FP32, INT64
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor
from vramplan.timeline import Kind

EMBEDDING_NORM = "transformer.word_embeddings_layernorm"


def read(c: ConfigReader) -> Dims:
    """BloomConfig."""
    hidden = c.size("n_embed", "hidden_size", default=64)
    heads = c.size("n_head", "num_attention_heads", default=8)
    ranks = c.size("pretraining_tp", default=1)
    if ranks > 1 and c.flag("slow_but_exact", default=False):
        raise c.fail("slow_but_exact", "is true; its sliced products are not planned")
    return Dims(
        vocab_size=c.size("vocab_size", default=250880),
        hidden_size=hidden,
        num_layers=c.size("n_layer", "num_hidden_layers", default=2, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=c.heads(hidden, heads),
        intermediate_size=4 * hidden,
        max_positions=c.size("seq_length", default=2048),
        hidden_act="bloom_gelu",
        tied=c.flag("tie_word_embeddings", default=True),
        attention_dropout=c.dropout("attention_dropout"),
        residual_dropout=c.dropout("hidden_dropout"),
        residual_after_norm=c.flag("apply_residual_connection_post_layernorm", default=False),
        alibi=True,
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """BloomForCausalLM's modules."""
    h = d.hidden_size
    return Architecture(
        embedding=EmbeddingSpec("transformer.word_embeddings", d.vocab_size, h),
        outside=(NormSpec(EMBEDDING_NORM, h, bias=True),),
        block=(
            NormSpec("input_layernorm", h, bias=True),
            LinearSpec("self_attention.query_key_value", h, 3 * h, bias=True),
            LinearSpec("self_attention.dense", h, h, bias=True),
            NormSpec("post_attention_layernorm", h, bias=True),
            LinearSpec("mlp.dense_h_to_4h", h, 4 * h, bias=True),
            LinearSpec("mlp.dense_4h_to_h", 4 * h, h, bias=True),
        ),
        final_norm=NormSpec("transformer.ln_f", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size),
        layer_prefix="transformer.h",
    )


def enter(
    t: Tape, outside: Layer, inputs_embeds: Tensor, env: Env
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """BloomModel.forward up to its layers: norm and position bias."""
    hidden = layer_norm(t, outside.norms[EMBEDDING_NORM], inputs_embeds, env)
    positions = t.new(env.tokens, INT64, Kind.BATCH)  # of attention_mask.cumsum
    alibi = t.new(env.dims.num_heads * env.tokens, FP32, Kind.BATCH)
    if hidden.dtype is not FP32:
        alibi = t.new(alibi.numel, hidden.dtype, Kind.BATCH)
    env.alibi = alibi
    del positions
    return hidden, (inputs_embeds,)


def attention(t: Tape, m: Layer, x: Tensor, residual: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """BloomAttention.forward."""
    d = env.dims
    assert env.alibi is not None
    outer, t.owner = t.owner, f"{m.name}.self_attention"
    fused = m.linears["self_attention.query_key_value"](t, x)
    q, k, v = reshape(t, fused)
    if env.batch > 1:  # [batch x heads, ...]: one dimension only if it is copied
        q = ops.copy(t, q)
        k = ops.copy(t, k)
        v = ops.copy(t, v)
    size = d.num_heads * env.tokens * env.length
    scores = ops.baddbmm(t, env.alibi, q, k, size, d.head_dim)
    weights = ops.view(t, scores)
    if env.mask is not None:
        weights = ops.add(t, weights, env.mask)
    probs = ops.to(t, ops.softmax(t, weights, FP32), q.dtype)
    probs = dropout(t, probs, d.attention_dropout, "attention_dropout")
    context = ops.batched_matmul(t, ops.view(t, probs), v, q.numel, env.length, 1)
    context = ops.view(t, context, copied=env.batch > 1)  # batch and heads no longer fold
    context = ops.copy(t, context)  # _merge_heads
    out = m.linears["self_attention.dense"](t, context)
    out = dropout_add(t, out, residual, d.residual_dropout)
    t.owner = outer
    return out, probs


def reshape(t: Tape, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BloomAttention._reshape: views of [batch, length, heads, 3, head_dim]."""
    fused = ops.view(t, fused)
    part = fused.numel // 3
    return ops.slice_(t, fused, part), ops.slice_(t, fused, part), ops.slice_(t, fused, part)


def mlp(t: Tape, m: Layer, x: Tensor, residual: Tensor, env: Env) -> Tensor:
    """BloomMLP.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    h = m.linears["mlp.dense_h_to_4h"](t, x)
    t.owner = f"{m.name}.mlp.gelu_impl"
    h = ops.bloom_gelu(t, h)
    t.owner = f"{m.name}.mlp"
    out = m.linears["mlp.dense_4h_to_h"](t, h)
    out = dropout_add(t, out, residual, env.dims.residual_dropout)
    t.owner = outer
    return out


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """BloomBlock.forward; returns the attention weights too, which the model's loop keeps alive."""
    after = env.dims.residual_after_norm
    normed = layer_norm(t, m.norms["input_layernorm"], x, env)
    residual = normed if after else x
    attention_output, weights = attention(t, m, normed, residual, env)
    normed = layer_norm(t, m.norms["post_attention_layernorm"], attention_output, env)
    residual = normed if after else attention_output
    out = mlp(t, m, normed, residual, env)
    env.kept = weights
    return out


FAMILY = Family(
    model_type="bloom",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=causal_mask,
    enter=enter,
    positions=False,
    attentions=("eager",),
    source="transformers 5.17.0 models/bloom/modeling_bloom.py",
)
