"""StarCoder2: Llama's attention with LayerNorms, biases, a plain MLP and dropouts.

Source: transformers 5.17.0 ``models/starcoder2/modeling_starcoder2.py``.
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
    pre_norm_block,
    rotary_prepare,
    rotate_both,
    split_heads,
)
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """Starcoder2Config: all layers use the window, if there is one."""
    c = c.with_defaults(num_key_value_heads=2)
    hidden = c.size("hidden_size", default=3072)
    heads = c.size("num_attention_heads", default=24)
    layers = c.size("num_hidden_layers", default=30, top=MAX_LAYERS)
    head_dim = c.size("head_dim", default=0) or c.heads(hidden, heads)
    window = c.size("sliding_window") if c.values.get("sliding_window") else None
    bias = c.flag("use_bias", default=True)
    return Dims(
        vocab_size=c.size("vocab_size", default=49152),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=c.kv_heads(heads),
        head_dim=head_dim,
        intermediate_size=c.size("intermediate_size", default=12288),
        max_positions=c.size("max_position_embeddings", default=4096),
        hidden_act=c.text("hidden_act", default="gelu_pytorch_tanh"),
        tied=c.flag("tie_word_embeddings", default=True),
        rotary_dim=head_dim,
        attention_bias=bias,
        mlp_bias=bias,
        attention_dropout=c.dropout("attention_dropout"),
        residual_dropout=c.dropout("residual_dropout"),
        embedding_dropout=c.dropout("embedding_dropout"),
        sliding_window=window,
        num_sliding_layers=layers if window else 0,
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """Starcoder2ForCausalLM's modules."""
    h = d.hidden_size
    q_width, kv_width = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    rotary_buffer = -(-d.rotary_dim // 2) * 4
    return Architecture(
        embedding=EmbeddingSpec("model.embed_tokens", d.vocab_size, h),
        block=(
            LinearSpec("self_attn.q_proj", h, q_width, d.attention_bias),
            LinearSpec("self_attn.k_proj", h, kv_width, d.attention_bias),
            LinearSpec("self_attn.v_proj", h, kv_width, d.attention_bias),
            LinearSpec("self_attn.o_proj", q_width, h, d.attention_bias),
            LinearSpec("mlp.c_fc", h, d.intermediate_size, d.mlp_bias),
            LinearSpec("mlp.c_proj", d.intermediate_size, h, d.mlp_bias),
            NormSpec("input_layernorm", h, bias=True),
            NormSpec("post_attention_layernorm", h, bias=True),
        ),
        final_norm=NormSpec("model.norm", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size),
        layer_prefix="model.layers",
        model_buffers=(rotary_buffer, rotary_buffer),  # inv_freq, original_inv_freq
    )


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """Starcoder2Attention.forward."""
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = split_heads(t, m.linears["self_attn.q_proj"](t, x), env)
    k = split_heads(t, m.linears["self_attn.k_proj"](t, x), env)
    v = split_heads(t, m.linears["self_attn.v_proj"](t, x), env, value=True)
    q, k = rotate_both(t, q, k, env)
    out, weights = attend(t, q, k, v, env)
    out = m.linears["self_attn.o_proj"](t, out)
    out = ops.dropout(t, out, env.dims.residual_dropout)
    t.owner = outer
    return out, weights


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Starcoder2MLP.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    h = m.linears["mlp.c_fc"](t, x)
    h = activate(t, h, env, "act")
    h = m.linears["mlp.c_proj"](t, h)
    h = ops.dropout(t, h, env.dims.residual_dropout)
    t.owner = outer
    return h


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Starcoder2DecoderLayer.forward."""
    return pre_norm_block(t, m, x, env, norm=layer_norm, attention=attention, mlp=mlp)


FAMILY = Family(
    model_type="starcoder2",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=rotary_prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/starcoder2/modeling_starcoder2.py",
)
