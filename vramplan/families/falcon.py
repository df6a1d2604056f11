"""Falcon: multi-query or grouped attention beside the MLP, and the older sequential ALiBi models.

FalconLinear is a subclass of nn.Linear, and bitsandbytes' integration replaces nn.Linear alone: a
"quantised" Falcon stays as it was loaded (in fp32 once prepared for k-bit training).

Source: transformers 5.17.0 ``models/falcon/modeling_falcon.py``, ``integrations/bitsandbytes.py``.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.errors import UsageError
from vramplan.families.common import (
    Env,
    Family,
    activate,
    allowed_positions,
    causal_mask,
    dropout,
    dropout_add,
    layer_norm,
    math_attention,
    picks_cudnn,
    rotary_tables,
    rotate,
)
from vramplan.formats import BF16, BOOL, FP32, INT64
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor
from vramplan.timeline import Kind


def read(c: ConfigReader) -> Dims:
    """FalconConfig."""
    hidden = c.size("n_embed", "hidden_size", default=4544)
    heads = c.size("num_attention_heads", "n_head", default=71)
    grouped = c.flag("new_decoder_architecture", default=False)
    parallel = c.flag("parallel_attn", default=True)
    norms = c.size("num_ln_in_parallel_attn", default=2 if grouped else 1, top=2)
    if grouped and not parallel:
        raise c.fail("parallel_attn", "is false, which the new decoder architecture cannot run")
    if norms == 2 and parallel and not grouped:
        raise c.fail("num_ln_in_parallel_attn", "is 2, which the old decoder cannot run")
    bias = c.flag("bias", default=False)
    return Dims(
        vocab_size=c.size("vocab_size", default=65024),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers", "n_layer", default=32, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=read_kv_heads(c, heads, grouped=grouped),
        head_dim=c.heads(hidden, heads),
        intermediate_size=c.size("ffn_hidden_size", default=4 * hidden),
        max_positions=c.size("max_position_embeddings", default=2048),
        hidden_act=c.text("activation", default="gelu"),
        tied=c.flag("tie_word_embeddings", default=True),
        rotary_dim=c.heads(hidden, heads),
        attention_bias=bias,
        mlp_bias=bias,
        attention_dropout=c.dropout("attention_dropout"),
        residual_dropout=c.dropout("hidden_dropout"),
        parallel_residual=parallel,
        alibi=c.flag("alibi", default=False),
        grouped_qkv=grouped,
        num_parallel_norms=norms,
        dtype=c.dtype(),
    )


def read_kv_heads(c: ConfigReader, heads: int, *, grouped: bool) -> int:
    """Key heads that FalconAttention works with."""
    count = c.size("num_kv_heads", default=heads)
    if grouped:
        if heads % count:
            raise c.fail("num_kv_heads", f"({count}) does not divide the {heads} heads")
        return count
    if c.flag("multi_query", default=True):
        return 1
    if count != heads:
        raise c.fail("num_kv_heads", f"({count}) differs from the {heads} heads without groups")
    return heads


def architecture(d: Dims) -> Architecture:
    """FalconForCausalLM's modules."""
    h, bias, cls = d.hidden_size, d.attention_bias, "FalconLinear"
    qkv = h + 2 * d.num_kv_heads * d.head_dim
    names = ["post_attention_layernorm", "input_layernorm"]
    if d.parallel_residual:
        names = ["ln_attn", "ln_mlp"] if d.num_parallel_norms == 2 else ["input_layernorm"]
    rotary_buffer = -(-d.rotary_dim // 2) * 4
    return Architecture(
        embedding=EmbeddingSpec("transformer.word_embeddings", d.vocab_size, h),
        block=(
            LinearSpec("self_attention.query_key_value", h, qkv, bias, cls),
            LinearSpec("self_attention.dense", h, h, bias, cls),
            LinearSpec("mlp.dense_h_to_4h", h, d.intermediate_size, bias, cls),
            LinearSpec("mlp.dense_4h_to_h", d.intermediate_size, h, bias, cls),
            *(NormSpec(name, h, bias=True) for name in names),
        ),
        final_norm=NormSpec("transformer.ln_f", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size),
        layer_prefix="transformer.h",
        model_buffers=(rotary_buffer, rotary_buffer),  # inv_freq, original_inv_freq
    )


def prepare(t: Tape, embeds: Tensor, env: Env) -> None:
    """FalconModel.forward before its layers: always a mask, ALiBi worked into it, rotary tables.

    Raises:
        UsageError: For FlashAttention with ALiBi, which transformers refuses.
    """
    if env.dims.alibi:
        if env.attention == "flash_attention_2":
            raise UsageError(
                "--attn-implementation flash_attention_2: transformers has none for Falcon with "
                "ALiBi; it has sdpa, eager"
            )
        positions = t.new(env.tokens, INT64, Kind.BATCH)  # of attention_mask.cumsum
        alibi = t.new(env.dims.num_heads * env.tokens, BF16, Kind.BATCH)
        if embeds.dtype is not BF16:
            alibi = t.new(alibi.numel, embeds.dtype, Kind.BATCH)
        env.alibi = alibi
        del positions
    causal_mask(t, embeds, env)
    if env.attention == "sdpa":
        env.mask = allowed_positions(t, env, None)  # allow_is_causal_skip=False
    if env.alibi is not None:
        add_alibi(t, embeds, env)
    rotary_tables(t, embeds, env)


def add_alibi(t: Tape, embeds: Tensor, env: Env) -> None:
    """A mask for every head: ``masked_fill(alibi / sqrt(d), causal_mask < -1, min)``."""
    assert env.alibi is not None and env.mask is not None
    env.mask = ops.to(t, env.mask, embeds.dtype)
    scaled = t.new(env.alibi.numel, embeds.dtype)
    masked = t.new(env.mask.numel, BOOL)
    env.mask = t.new(env.dims.num_heads * env.tokens * env.length, embeds.dtype, Kind.BATCH)
    del scaled, masked


def split_heads(t: Tape, fused: Tensor, env: Env) -> tuple[Tensor, Tensor, Tensor]:
    """FalconAttention._split_heads."""
    d = env.dims
    fused = ops.view(t, fused)
    width = env.tokens * d.num_heads * d.head_dim
    kv_width = env.tokens * d.num_kv_heads * d.head_dim
    if not d.grouped_qkv and d.num_kv_heads > 1:
        q, k, v = [ops.slice_(t, fused, width) for _ in range(3)]
        return q, k, v
    q = ops.slice_(t, fused, width)
    k = ops.pick(t, fused, kv_width)
    v = ops.pick(t, fused, kv_width)
    if not d.grouped_qkv:
        return q, k, v
    groups = d.num_heads // d.num_kv_heads
    k, v = ops.expand(t, k, groups), ops.expand(t, v, groups)
    if d.num_kv_heads == 1:  # flatten finds nothing to merge
        return q, k, v
    q, k, v = ops.copy(t, q), ops.copy(t, k), ops.copy(t, v)
    return q, k, v


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """FalconAttention.forward."""
    outer, t.owner = t.owner, f"{m.name}.self_attention"
    fused = m.linears["self_attention.query_key_value"](t, x)
    q, k, v = split_heads(t, fused, env)
    if not env.dims.alibi:
        assert env.cos is not None and env.sin is not None
        q, k = rotate(t, q, env.cos, env.sin), rotate(t, k, env.cos, env.sin)
    weights: Tensor | None = None
    if env.attention == "eager" and env.dims.alibi:
        out, weights, _locals = eager_alibi(t, q, k, v, x, env)
    elif env.attention == "eager":
        out, weights = eager(t, q, k, v, x, env)
    else:
        out = fused_attention(t, q, k, v, env)
    out = m.linears["self_attention.dense"](t, out)
    t.owner = outer
    return out, weights


def fused_attention(t: Tape, q: Tensor, k: Tensor, v: Tensor, env: Env) -> Tensor:
    """Sdpa or FlashAttention; one key head that is not spread out leaves sdpa plain products.

    Source: torch 2.11 ``sdp_utils_cpp.h`` (``check_batch_size_and_num_heads_dense``).
    """
    d = env.dims
    kv_heads = d.num_heads if d.grouped_qkv else d.num_kv_heads
    shape = (env.batch, d.num_heads, kv_heads, env.length, d.head_dim)
    if env.attention == "flash_attention_2":
        return ops.fused_attention(t, q, k, v, shape, cudnn=False)
    p = d.attention_dropout if d.alibi else 0.0
    if kv_heads == d.num_heads:
        low_precision = (t.autocast or q.dtype) is not FP32
        if low_precision and picks_cudnn(env):
            return ops.fused_attention(t, q, k, v, shape, cudnn=True, mask=env.mask)
        return ops.efficient_attention(t, q, k, v, shape, mask=env.mask)
    return ops.copy(t, math_attention(t, q, k, v, env, dropout=p, broadcast=True))


def eager(t: Tape, q: Tensor, k: Tensor, v: Tensor, x: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """FalconAttention.forward without sdpa and without ALiBi."""
    d = env.dims
    assert env.mask is not None
    size = d.num_heads * env.tokens * env.length
    scores = ops.batched_matmul(t, q, spread(t, k, env), size, d.head_dim, env.batch)
    scores = ops.scale_(t, scores)
    scores = ops.softmax(t, ops.add(t, scores, env.mask), x.dtype)
    out = ops.batched_matmul(
        t, scores, spread(t, v, env), q.numel, env.length, env.batch, folds=(True, False)
    )
    return ops.copy(t, out), scores


def eager_alibi(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, x: Tensor, env: Env
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """FalconAttention.forward without sdpa but with ALiBi; its locals live on to its end."""
    d = env.dims
    assert env.mask is not None and env.alibi is not None
    size = d.num_heads * env.tokens * env.length
    result = ops.batched_matmul(t, q, spread(t, k, env), size, d.head_dim, env.batch)
    scores = ops.to(t, ops.view(t, result), FP32)
    logits = ops.scale_(t, ops.add(t, scores, env.alibi))
    probs = ops.softmax(t, ops.add(t, logits, env.mask), x.dtype)
    probs = dropout(t, probs, d.attention_dropout, "attention_dropout")
    out = ops.batched_matmul(
        t, probs, spread(t, v, env), q.numel, env.length, env.batch, folds=(True, False)
    )
    return ops.copy(t, out), probs, (result, scores, logits)


def spread(t: Tape, x: Tensor, env: Env) -> Tensor:
    """One key head under all query heads, as ``@`` broadcasts it."""
    d = env.dims
    return x if d.grouped_qkv else ops.expand(t, x, d.num_heads // d.num_kv_heads)


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """FalconMLP.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    x = activate(t, m.linears["mlp.dense_h_to_4h"](t, x), env, "act")
    x = m.linears["mlp.dense_4h_to_h"](t, x)
    t.owner = outer
    return x


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """FalconDecoderLayer.forward; returns the weights too, which the model's loop keeps alive."""
    d = env.dims
    residual = x
    if d.grouped_qkv and d.num_parallel_norms == 2:
        normed = layer_norm(t, m.norms["ln_attn"], x, env)
        mlp_input = layer_norm(t, m.norms["ln_mlp"], x, env)
    else:
        mlp_input = normed = layer_norm(t, m.norms["input_layernorm"], x, env)
    attention_output, weights = attention(t, m, normed, env)
    if not d.parallel_residual:
        residual = dropout_add(t, attention_output, residual, d.attention_dropout)
        mlp_input = layer_norm(t, m.norms["post_attention_layernorm"], residual, env)
    out = mlp(t, m, mlp_input, env)
    if d.parallel_residual:
        out = ops.add_(t, out, attention_output)
    output = dropout_add(t, out, residual, d.residual_dropout)
    env.kept = weights
    return output


FAMILY = Family(
    model_type="falcon",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/falcon/modeling_falcon.py",
)
