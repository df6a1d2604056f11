"""GPT-2: learned positions, one fused c_attn, Conv1D in the place of nn.Linear, dropout everywhere.

Source: transformers 5.17.0 ``models/gpt2/modeling_gpt2.py``.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families.common import (
    Env,
    Family,
    activate,
    attend,
    causal_mask,
    dropout,
    layer_norm,
)
from vramplan.formats import FP32
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """GPT2Config."""
    hidden = c.size("n_embd", "hidden_size", default=768)
    heads = c.size("n_head", "num_attention_heads", default=12)
    if c.flag("add_cross_attention", default=False):
        raise c.fail("add_cross_attention", "is true; only decoders on their own are planned")
    return Dims(
        vocab_size=c.size("vocab_size", default=50257),
        hidden_size=hidden,
        num_layers=c.size("n_layer", "num_hidden_layers", default=12, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=c.heads(hidden, heads),
        intermediate_size=c.size("n_inner", default=4 * hidden),
        max_positions=c.size("n_positions", "max_position_embeddings", default=1024),
        hidden_act=c.text("activation_function", default="gelu_new"),
        tied=c.flag("tie_word_embeddings", default=True),
        attention_dropout=c.dropout("attn_pdrop", default=0.1),
        residual_dropout=c.dropout("resid_pdrop", default=0.1),
        embedding_dropout=c.dropout("embd_pdrop", default=0.1),
        upcast_attention=c.flag("reorder_and_upcast_attn", default=False),
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """GPT2LMHeadModel's modules."""
    h, inner = d.hidden_size, d.intermediate_size
    return Architecture(
        embedding=EmbeddingSpec("transformer.wte", d.vocab_size, h),
        outside=(EmbeddingSpec("transformer.wpe", d.max_positions, h),),
        block=(
            NormSpec("ln_1", h, bias=True),
            LinearSpec("attn.c_attn", h, 3 * h, bias=True, cls="Conv1D"),
            LinearSpec("attn.c_proj", h, h, bias=True, cls="Conv1D"),
            NormSpec("ln_2", h, bias=True),
            LinearSpec("mlp.c_fc", h, inner, bias=True, cls="Conv1D"),
            LinearSpec("mlp.c_proj", inner, h, bias=True, cls="Conv1D"),
        ),
        final_norm=NormSpec("transformer.ln_f", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size),
        layer_prefix="transformer.h",
    )


def enter(
    t: Tape, outside: Layer, inputs_embeds: Tensor, env: Env
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """GPT2Model.forward up to its layers: one row of wpe for every position."""
    wpe = outside.embeddings["transformer.wpe"]
    outer, t.owner = t.owner, wpe.owner
    position_embeds = ops.embedding(t, wpe.weight, env.length, wpe.spec.width)
    t.owner = outer
    hidden = ops.add(t, inputs_embeds, position_embeds)
    hidden = dropout(t, hidden, env.dims.embedding_dropout, "drop")
    return hidden, (inputs_embeds, position_embeds)


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """GPT2Attention.forward."""
    outer, t.owner = t.owner, f"{m.name}.attn"
    qkv = m.linears["attn.c_attn"](t, x)
    q, k, v = ops.split(t, qkv, (qkv.numel // 3,) * 3)
    del qkv
    if env.attention != "eager":
        out, weights = attend(t, q, k, v, env)
    else:
        merged, weights = (upcast if env.dims.upcast_attention else eager)(t, q, k, v, env)
        out = ops.copy(t, merged)  # transposed, so reshape copies
        del merged
    out = m.linears["attn.c_proj"](t, out)
    out = dropout(t, out, env.dims.residual_dropout, "resid_dropout")
    t.owner = outer
    return out, weights


def eager(t: Tape, q: Tensor, k: Tensor, v: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """eager_attention_forward: the softmax is in fp32 under autocast alone."""
    d = env.dims
    size = d.num_heads * env.tokens * env.length
    weights = ops.scale(t, ops.batched_matmul(t, q, k, size, d.head_dim, env.batch))
    if env.mask is not None:
        weights = ops.add(t, weights, env.mask)
    weights = ops.softmax(t, weights)
    weights = ops.to(t, weights, v.dtype)
    weights = ops.dropout(t, weights, d.attention_dropout)
    return ops.batched_matmul(
        t, weights, v, q.numel, env.length, env.batch, folds=(True, False)
    ), weights


def upcast(t: Tape, q: Tensor, k: Tensor, v: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """GPT2Attention._upcast_and_reordered_attn."""
    d = env.dims
    size = d.num_heads * env.tokens * env.length
    empty = t.new(size, FP32)
    with t.no_autocast():
        if env.batch > 1:  # reshape to [batch x heads, ...]
            flat_q, flat_k = ops.copy(t, q), ops.copy(t, k)
        else:
            flat_q, flat_k = q, k
        weights = ops.baddbmm(
            t, empty, ops.to(t, flat_q, FP32), ops.to(t, flat_k, FP32), size, d.head_dim
        )
        del empty
    if env.mask is not None:
        weights = ops.add(t, weights, env.mask)
    weights = ops.softmax(t, weights)
    weights = ops.to(t, weights, v.dtype)
    weights = dropout(t, weights, d.attention_dropout, "attn_dropout")
    return ops.batched_matmul(
        t, weights, v, q.numel, env.length, env.batch, folds=(True, False)
    ), weights


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GPT2MLP.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    h = m.linears["mlp.c_fc"](t, x)
    h = activate(t, h, env, "act")
    h = m.linears["mlp.c_proj"](t, h)
    h = dropout(t, h, env.dims.residual_dropout, "dropout")
    t.owner = outer
    return h


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GPT2Block.forward."""
    residual = x
    h = layer_norm(t, m.norms["ln_1"], x, env)
    attn_output, _weights = attention(t, m, h, env)
    h = ops.add(t, attn_output, residual)
    residual = h
    h = layer_norm(t, m.norms["ln_2"], h, env)
    feed_forward = mlp(t, m, h, env)
    return ops.add(t, residual, feed_forward)


FAMILY = Family(
    model_type="gpt2",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=causal_mask,
    enter=enter,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/gpt2/modeling_gpt2.py",
)
