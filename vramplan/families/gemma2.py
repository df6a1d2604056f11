"""Gemma 2: norms around attention and MLP, capped scores and logits, every other layer windowed.

Source: transformers 5.17.0 ``models/gemma2/modeling_gemma2.py``. Its default is sdpa in training
too, which leaves ``attn_logit_softcapping`` out; eager attention caps the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import gemma, llama
from vramplan.families.common import Env, Family, Shared, cos_sin, make_mask
from vramplan.layers import Layer, Linear
from vramplan.model import Architecture, Dims, NormSpec
from vramplan.tape import Tape, Tensor

Attention = Callable[[Tape, Layer, Tensor, Env], tuple[Tensor, Tensor | None]]
SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}


def read(c: ConfigReader) -> Dims:
    """Gemma2Config."""
    return read_windowed(c.with_defaults(**DEFAULTS), c, 2, 50.0, 30.0)


def read_windowed(
    c: ConfigReader,
    given: ConfigReader,
    pattern: int,
    attention_cap: float | None,
    logit_cap: float | None,
) -> Dims:
    """What Gemma 2 and 3 read alike.

    Args:
        c: The config with the family's defaults.
        given: The config as given, in which null switches a cap off.
        pattern: Every ``pattern``-th layer sees everything.
        attention_cap: Default of attn_logit_softcapping.
        logit_cap: Default of final_logit_softcapping.
    """
    gemma.refuse_bidirectional(c)
    dims = llama.read(c)
    c.heads(dims.hidden_size, dims.num_heads)  # transformers insists, though head_dim is given
    kinds = c.layer_types(
        dims.num_layers,
        (SLIDING, FULL),
        [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(dims.num_layers)],
    )
    return replace(
        dims,
        hidden_act=c.text("hidden_activation", default="gelu_pytorch_tanh"),
        mlp_bias=False,
        sliding_window=c.size("sliding_window"),
        num_sliding_layers=kinds.count(SLIDING),
        layer_kinds=kinds,
        attn_logit_softcapping=given.optional("attn_logit_softcapping", attention_cap),
        final_logit_softcapping=given.optional("final_logit_softcapping", logit_cap),
    )


def architecture(d: Dims) -> Architecture:
    """Gemma2ForCausalLM's modules."""
    arch = gemma.architecture(d)
    more = (
        NormSpec("pre_feedforward_layernorm", d.hidden_size),
        NormSpec("post_feedforward_layernorm", d.hidden_size),
    )
    return replace(arch, block=(*arch.block, *more))


def masks(t: Tape, embeds: Tensor, env: Env) -> None:
    """causal_mask_mapping: one mask a kind, whether or not a layer of that kind exists."""
    env.shared = {
        FULL: Shared(mask=make_mask(t, embeds, env, None)),
        SLIDING: Shared(mask=make_mask(t, embeds, env, env.dims.sliding_window)),
    }


def prepare(t: Tape, embeds: Tensor, env: Env) -> None:
    """Both masks, and one pair of rotary tables for all layers."""
    masks(t, embeds, env)
    cos, sin = cos_sin(t, env, embeds.dtype)
    for shared in env.shared.values():
        shared.cos, shared.sin = cos, sin


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Gemma2DecoderLayer.forward."""
    return decoder_layer(t, m, x, env, llama.attention)


def decoder_layer(t: Tape, m: Layer, x: Tensor, env: Env, attention: Attention) -> Tensor:
    """The layer of Gemma 2 and 3 around its attention."""
    residual = x
    h = gemma.rms_norm(t, m.norms["input_layernorm"], x, env)
    h, _weights = attention(t, m, h, env)
    h = gemma.rms_norm(t, m.norms["post_attention_layernorm"], h, env)
    h = ops.add(t, residual, h)
    residual = h
    h = gemma.rms_norm(t, m.norms["pre_feedforward_layernorm"], h, env)
    h = llama.mlp(t, m, h, env)
    h = gemma.rms_norm(t, m.norms["post_feedforward_layernorm"], h, env)
    return ops.add(t, residual, h)


def head(t: Tape, lm_head: Linear, hidden: Tensor, env: Env) -> Tensor:
    """Gemma2ForCausalLM.forward after the decoder: the logits, capped."""
    logits = lm_head(t, hidden)
    t.owner = lm_head.owner
    if env.dims.final_logit_softcapping is not None:
        logits = ops.scale(t, logits)
        logits = ops.tanh(t, logits)
        logits = ops.scale(t, logits)
    return logits


FAMILY = Family(
    model_type="gemma2",
    read=read,
    architecture=architecture,
    block=block,
    norm=gemma.rms_norm,
    prepare=prepare,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/gemma2/modeling_gemma2.py",
    embed=gemma.embed,
    head=head,
)
