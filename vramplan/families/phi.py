"""Phi-1, Phi-1.5 and Phi-2: parallel attention and MLP behind one norm, biases everywhere.

Source: transformers 5.17.0 ``models/phi/modeling_phi.py``.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families.common import (
    Env,
    Family,
    activate,
    attend,
    dropout,
    layer_norm,
    rotary_parts,
    rotary_prepare,
    rotate_both,
    split_heads,
)
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, ModuleSpec, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """PhiConfig."""
    hidden = c.size("hidden_size", default=2048)
    heads = c.size("num_attention_heads", default=32)
    head_dim = c.size("head_dim", default=0) or c.heads(hidden, heads)
    return Dims(
        vocab_size=c.size("vocab_size", default=51200),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers", default=24, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=c.kv_heads(heads),
        head_dim=head_dim,
        intermediate_size=c.size("intermediate_size", default=8192),
        max_positions=c.size("max_position_embeddings", default=2048),
        hidden_act=c.text("hidden_act", default="gelu_new"),
        tied=c.flag("tie_word_embeddings", default=False),
        rotary_dim=c.rotary_dim(head_dim, 0.5),
        attention_bias=True,
        mlp_bias=True,
        attention_dropout=c.dropout("attention_dropout"),
        residual_dropout=c.dropout("resid_pdrop"),
        embedding_dropout=c.dropout("embd_pdrop"),
        parallel_residual=True,
        qk_layernorm=c.flag("qk_layernorm", default=False),
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """PhiForCausalLM's modules."""
    h = d.hidden_size
    q_width, kv_width = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    norms: tuple[ModuleSpec, ...] = (
        NormSpec("self_attn.q_layernorm", h // d.num_heads, bias=True),
        NormSpec("self_attn.k_layernorm", h // d.num_heads, bias=True),
    )
    rotary_buffer = (d.rotary_dim // 2) * 4
    return Architecture(
        embedding=EmbeddingSpec("model.embed_tokens", d.vocab_size, h),
        block=(
            LinearSpec("self_attn.q_proj", h, q_width, bias=True),
            LinearSpec("self_attn.k_proj", h, kv_width, bias=True),
            LinearSpec("self_attn.v_proj", h, kv_width, bias=True),
            LinearSpec("self_attn.dense", q_width, h, bias=True),
            *(norms if d.qk_layernorm else ()),
            LinearSpec("mlp.fc1", h, d.intermediate_size, bias=True),
            LinearSpec("mlp.fc2", d.intermediate_size, h, bias=True),
            NormSpec("input_layernorm", h, bias=True),
        ),
        final_norm=NormSpec("model.final_layernorm", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size, bias=True),
        layer_prefix="model.layers",
        model_buffers=(rotary_buffer, rotary_buffer),  # inv_freq, original_inv_freq
    )


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """PhiAttention.forward; the unrotated parts stay in local variables to its end."""
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = split_heads(t, m.linears["self_attn.q_proj"](t, x), env)
    k = split_heads(t, m.linears["self_attn.k_proj"](t, x), env)
    v = split_heads(t, m.linears["self_attn.v_proj"](t, x), env, value=True)
    if env.dims.qk_layernorm:  # on transposed tensors
        q = layer_norm(t, m.norms["self_attn.q_layernorm"], q, env, contiguous=False)
        k = layer_norm(t, m.norms["self_attn.k_layernorm"], k, env, contiguous=False)
    q_rot, q_pass = rotary_parts(t, q, env)
    k_rot, k_pass = rotary_parts(t, k, env)
    q_rot, k_rot = rotate_both(t, q_rot, k_rot, env)
    q = ops.cat(t, (q_rot, q_pass))
    k = ops.cat(t, (k_rot, k_pass))
    out, weights = attend(t, q, k, v, env, contiguous=False)
    out = m.linears["self_attn.dense"](t, out)
    t.owner = outer
    return out, weights


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """PhiMLP.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    h = m.linears["mlp.fc1"](t, x)
    h = activate(t, h, env, "activation_fn")
    h = m.linears["mlp.fc2"](t, h)
    t.owner = outer
    return h


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """PhiDecoderLayer.forward."""
    p = env.dims.residual_dropout
    residual = x
    h = layer_norm(t, m.norms["input_layernorm"], x, env)
    attn, _weights = attention(t, m, h, env)
    attn = dropout(t, attn, p, "resid_dropout")
    feed_forward = dropout(t, mlp(t, m, h, env), p, "resid_dropout")
    return ops.add(t, ops.add(t, attn, feed_forward), residual)


def enter(t: Tape, outside: Layer, embeds: Tensor, env: Env) -> tuple[Tensor, tuple[Tensor, ...]]:
    """PhiModel.forward gives the dropped-out embeddings the name of the embeddings."""
    inputs_embeds = dropout(t, embeds, env.dims.embedding_dropout, "embed_dropout")
    return inputs_embeds, (inputs_embeds,)


FAMILY = Family(
    model_type="phi",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=rotary_prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/phi/modeling_phi.py",
    enter=enter,
)
