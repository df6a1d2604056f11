"""StableLM: LayerNorms around Llama's MLP, rotary positions on part of each head.

Source: transformers 5.17.0 ``models/stablelm/modeling_stablelm.py``.

Known limitations:
    The norms of single heads (``qk_layernorm``) copy a gradient of one head's size in backward when
    a batch holds more than one sequence; that copy is not counted.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families import llama
from vramplan.families.common import (
    Env,
    Family,
    attend,
    dropout,
    layer_norm,
    rotary_parts,
    rotary_prepare,
    rotate_both,
    split_heads,
)
from vramplan.formats import FP32
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, ModuleSpec, NormSpec
from vramplan.tape import Tape, Tensor

MAX_NORMED_HEADS = 1024  # each is a module of its own; published models have 40


def read(c: ConfigReader) -> Dims:
    """StableLmConfig."""
    hidden = c.size("hidden_size", default=2560)
    qk_layernorm = c.flag("qk_layernorm", default=False)
    heads = c.size("num_attention_heads", default=32)
    if qk_layernorm and heads > MAX_NORMED_HEADS:
        raise c.fail("num_attention_heads", f"({heads}) is too many to normalise one by one")
    head_dim = c.heads(hidden, heads)
    return Dims(
        vocab_size=c.size("vocab_size", default=50304),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers", default=32, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=c.kv_heads(heads),
        head_dim=head_dim,
        intermediate_size=c.size("intermediate_size", default=6912),
        max_positions=c.size("max_position_embeddings", default=4096),
        hidden_act=c.text("hidden_act", default="silu"),
        tied=c.flag("tie_word_embeddings", default=False),
        rotary_dim=c.rotary_dim(head_dim, 0.25),
        attention_bias=c.flag("use_qkv_bias", default=False),
        attention_dropout=c.dropout("attention_dropout"),
        residual_dropout=c.dropout("hidden_dropout"),
        parallel_residual=c.flag("use_parallel_residual", default=False),
        qk_layernorm=qk_layernorm,
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """StableLmForCausalLM's modules."""
    h = d.hidden_size
    kv_width = d.num_kv_heads * d.head_dim
    head_norms: tuple[ModuleSpec, ...] = tuple(
        NormSpec(f"self_attn.{name}.norms.{head}", d.head_dim)
        for name, heads in (("q_layernorm", d.num_heads), ("k_layernorm", d.num_kv_heads))
        for head in range(heads)
    )
    second_norm: tuple[ModuleSpec, ...] = (NormSpec("post_attention_layernorm", h, bias=True),)
    rotary_buffer = (d.rotary_dim // 2) * 4
    return Architecture(
        embedding=EmbeddingSpec("model.embed_tokens", d.vocab_size, h),
        block=(
            LinearSpec("self_attn.q_proj", h, h, d.attention_bias),
            LinearSpec("self_attn.k_proj", h, kv_width, d.attention_bias),
            LinearSpec("self_attn.v_proj", h, kv_width, d.attention_bias),
            LinearSpec("self_attn.o_proj", h, h),
            *(head_norms if d.qk_layernorm else ()),
            LinearSpec("mlp.gate_proj", h, d.intermediate_size),
            LinearSpec("mlp.up_proj", h, d.intermediate_size),
            LinearSpec("mlp.down_proj", d.intermediate_size, h),
            NormSpec("input_layernorm", h, bias=True),
            *(() if d.parallel_residual else second_norm),
        ),
        final_norm=NormSpec("model.norm", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size),
        layer_prefix="model.layers",
        model_buffers=(rotary_buffer, rotary_buffer),  # inv_freq, original_inv_freq
    )


def norm_per_head(t: Tape, m: Layer, name: str, x: Tensor, heads: int, env: Env) -> Tensor:
    """StableLmLayerNormPerHead.forward: every head by a LayerNorm of its own, then joined.

    A head of a transposed tensor is contiguous once autocast has cast it.
    """
    outer, t.owner = t.owner, f"{m.name}.self_attn.{name}"
    states_per_heads = ops.split(t, x, (x.numel // heads,) * heads)
    contiguous = t.autocast is not None and x.dtype is not FP32
    normed = [
        layer_norm(t, m.norms[f"self_attn.{name}.norms.{head}"], states, env, contiguous=contiguous)
        for head, states in enumerate(states_per_heads)
    ]
    out = ops.cat(t, normed)
    t.owner = outer
    return out


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """StableLmAttention.forward; the unrotated parts stay in local variables to its end."""
    d = env.dims
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = m.linears["self_attn.q_proj"](t, x)
    k = m.linears["self_attn.k_proj"](t, x)
    v = m.linears["self_attn.v_proj"](t, x)
    q = split_heads(t, q, env)
    k = split_heads(t, k, env)
    v = split_heads(t, v, env, value=True)
    if d.qk_layernorm:
        q = norm_per_head(t, m, "q_layernorm", q, d.num_heads, env)
        k = norm_per_head(t, m, "k_layernorm", k, d.num_kv_heads, env)
    q_rot, q_pass = rotary_parts(t, q, env)
    k_rot, k_pass = rotary_parts(t, k, env)
    q_rot, k_rot = rotate_both(t, q_rot, k_rot, env)
    q = ops.cat(t, (q_rot, q_pass))
    k = ops.cat(t, (k_rot, k_pass))
    out, weights = attend(t, q, k, v, env, contiguous=False)
    out = m.linears["self_attn.o_proj"](t, out)
    t.owner = outer
    return out, weights


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """StableLmDecoderLayer.forward; the normed input and attention's output stay to its end."""
    p = env.dims.residual_dropout
    residual = x
    h = layer_norm(t, m.norms["input_layernorm"], x, env)
    attn, _weights = attention(t, m, h, env)
    if env.dims.parallel_residual:
        out = llama.mlp(t, m, h, env)
        out = dropout(t, out, p, "dropout")
        return ops.add(t, ops.add(t, residual, attn), out)
    residual = ops.add(t, residual, attn)
    second_norm = m.norms["post_attention_layernorm"]
    out = llama.mlp(t, m, layer_norm(t, second_norm, residual, env), env)
    out = dropout(t, out, p, "dropout")
    return ops.add(t, residual, out)


FAMILY = Family(
    model_type="stablelm",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=rotary_prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/stablelm/modeling_stablelm.py",
)
