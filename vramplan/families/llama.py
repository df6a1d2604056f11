"""Llama, and the block that Mistral and Qwen2 share with it.

Source: transformers 5.17.0 ``models/llama/modeling_llama.py``.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families.common import (
    Env,
    Family,
    activate,
    attend,
    pre_norm_block,
    rms_norm,
    rotary_prepare,
    rotate_both,
    split_heads,
)
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """LlamaConfig."""
    hidden = c.size("hidden_size", default=4096)
    heads = c.size("num_attention_heads", default=32)
    head_dim = c.size("head_dim", default=0) if c.values.get("head_dim") else 0
    return Dims(
        vocab_size=c.size("vocab_size", default=32000),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers", default=32, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=c.kv_heads(heads),
        head_dim=head_dim or c.heads(hidden, heads),
        intermediate_size=c.size("intermediate_size", default=11008),
        max_positions=c.size("max_position_embeddings", default=2048),
        hidden_act=c.text("hidden_act", default="silu"),
        tied=c.flag("tie_word_embeddings", default=False),
        rotary_dim=head_dim or hidden // heads,
        attention_bias=c.flag("attention_bias", default=False),
        mlp_bias=c.flag("mlp_bias", default=False),
        attention_dropout=c.dropout("attention_dropout"),
        dtype=c.dtype(),
    )


def architecture(d: Dims, *, qkv_bias: bool | None = None) -> Architecture:
    """LlamaForCausalLM's modules.

    Args:
        d: Dimensions.
        qkv_bias: Bias of q, k and v alone (Qwen2); None gives all four attention_bias.
    """
    q_width, kv_width = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    bias = d.attention_bias if qkv_bias is None else qkv_bias
    out_bias = d.attention_bias if qkv_bias is None else False
    rotary_buffer = (d.rotary_dim // 2) * 4
    return Architecture(
        embedding=EmbeddingSpec("model.embed_tokens", d.vocab_size, d.hidden_size),
        block=(
            LinearSpec("self_attn.q_proj", d.hidden_size, q_width, bias),
            LinearSpec("self_attn.k_proj", d.hidden_size, kv_width, bias),
            LinearSpec("self_attn.v_proj", d.hidden_size, kv_width, bias),
            LinearSpec("self_attn.o_proj", q_width, d.hidden_size, out_bias),
            LinearSpec("mlp.gate_proj", d.hidden_size, d.intermediate_size, d.mlp_bias),
            LinearSpec("mlp.up_proj", d.hidden_size, d.intermediate_size, d.mlp_bias),
            LinearSpec("mlp.down_proj", d.intermediate_size, d.hidden_size, d.mlp_bias),
            NormSpec("input_layernorm", d.hidden_size),
            NormSpec("post_attention_layernorm", d.hidden_size),
        ),
        final_norm=NormSpec("model.norm", d.hidden_size),
        head=LinearSpec("lm_head", d.hidden_size, d.vocab_size),
        layer_prefix="model.layers",
        model_buffers=(rotary_buffer, rotary_buffer),  # inv_freq, original_inv_freq
    )


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """LlamaAttention.forward."""
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = split_heads(t, m.linears["self_attn.q_proj"](t, x), env)
    k = split_heads(t, m.linears["self_attn.k_proj"](t, x), env)
    v = split_heads(t, m.linears["self_attn.v_proj"](t, x), env, value=True)
    q, k = rotate_both(t, q, k, env)
    out, weights = attend(t, q, k, v, env)
    out = m.linears["self_attn.o_proj"](t, out)
    t.owner = outer
    return out, weights


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """LlamaMLP.forward: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    out = m.linears["mlp.down_proj"](
        t,
        ops.mul(
            t,
            activate(t, m.linears["mlp.gate_proj"](t, x), env, "act_fn"),
            m.linears["mlp.up_proj"](t, x),
        ),
    )
    t.owner = outer
    return out


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """LlamaDecoderLayer.forward."""
    return pre_norm_block(t, m, x, env, norm=rms_norm, attention=attention, mlp=mlp)


FAMILY = Family(
    model_type="llama",
    read=read,
    architecture=architecture,
    block=block,
    norm=rms_norm,
    prepare=rotary_prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/llama/modeling_llama.py",
)
