"""OPT: learned positions behind an offset, ReLU, norms before or after, maybe a narrower embedding.

Source: transformers 5.17.0 ``models/opt/modeling_opt.py``.
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
    layer_norm,
    split_heads,
)
from vramplan.formats import INT64
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, ModuleSpec, NormSpec
from vramplan.tape import Tape, Tensor
from vramplan.timeline import Kind

POSITION_OFFSET = 2  # OPTLearnedPositionalEmbedding.offset
EMBED_POSITIONS = "model.decoder.embed_positions"
PROJECT_IN = "model.decoder.project_in"
PROJECT_OUT = "model.decoder.project_out"


def read(c: ConfigReader) -> Dims:
    """OPTConfig."""
    hidden = c.size("hidden_size", default=768)
    heads = c.size("num_attention_heads", default=12)
    width = c.size("word_embed_proj_dim", default=hidden)
    before = c.flag("do_layer_norm_before", default=True)
    if not c.flag("layer_norm_elementwise_affine", default=True):
        raise c.fail(
            "layer_norm_elementwise_affine", "is false; norms without weights are not planned"
        )
    if c.number("layerdrop", default=0.0, low=0.0, high=1.0) > 0:
        raise c.fail("layerdrop", "is above 0; a step that skips layers at random is not planned")
    return Dims(
        vocab_size=c.size("vocab_size", default=50272),
        hidden_size=hidden,
        num_layers=c.size("num_hidden_layers", default=12, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=c.heads(hidden, heads),
        intermediate_size=c.size("ffn_dim", default=3072),
        max_positions=c.size("max_position_embeddings", default=2048),
        hidden_act=c.text("activation_function", default="relu"),
        tied=c.flag("tie_word_embeddings", default=True),
        attention_bias=c.flag("enable_bias", default=True),
        mlp_bias=c.flag("enable_bias", default=True),
        attention_dropout=c.dropout("attention_dropout"),
        residual_dropout=c.dropout("dropout", default=0.1),
        embedding_width=width if width != hidden else 0,
        norm_before=before,
        final_norm=before and not c.flag("_remove_final_layer_norm", default=False),
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """OPTForCausalLM's modules."""
    h, width = d.hidden_size, d.embedding_width or d.hidden_size
    outside: tuple[ModuleSpec, ...] = (
        EmbeddingSpec(EMBED_POSITIONS, d.max_positions + POSITION_OFFSET, h),
    )
    if d.embedding_width:
        outside += (LinearSpec(PROJECT_OUT, h, width), LinearSpec(PROJECT_IN, width, h))
    return Architecture(
        embedding=EmbeddingSpec("model.decoder.embed_tokens", d.vocab_size, width),
        outside=outside,
        block=(
            LinearSpec("self_attn.k_proj", h, h, d.attention_bias),
            LinearSpec("self_attn.v_proj", h, h, d.attention_bias),
            LinearSpec("self_attn.q_proj", h, h, d.attention_bias),
            LinearSpec("self_attn.out_proj", h, h, d.attention_bias),
            NormSpec("self_attn_layer_norm", h, bias=True),
            LinearSpec("fc1", h, d.intermediate_size, d.mlp_bias),
            LinearSpec("fc2", d.intermediate_size, h, d.mlp_bias),
            NormSpec("final_layer_norm", h, bias=True),
        ),
        final_norm=NormSpec("model.decoder.final_layer_norm", h, bias=True)
        if d.final_norm
        else None,
        head=LinearSpec("lm_head", width, d.vocab_size),
        layer_prefix="model.decoder.layers",
    )


def enter(
    t: Tape, outside: Layer, inputs_embeds: Tensor, env: Env
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """OPTDecoder.forward up to its layers: positions counted from the attention mask."""
    table = outside.embeddings[EMBED_POSITIONS]
    position_ids = t.new(env.tokens, INT64, Kind.BATCH)
    outer, t.owner = t.owner, table.owner
    shifted = t.new(env.tokens, INT64, Kind.BATCH)  # position_ids + self.offset
    pos_embeds = ops.embedding(t, table.weight, env.tokens, table.spec.width, shifted)
    del shifted
    t.owner = outer
    if env.dims.embedding_width:
        inputs_embeds = outside.linears[PROJECT_IN](t, inputs_embeds)
    hidden = ops.add(t, inputs_embeds, pos_embeds)
    return hidden, (position_ids, inputs_embeds, pos_embeds)


def leave(t: Tape, outside: Layer, hidden: Tensor, env: Env) -> Tensor:
    """OPTDecoder.forward behind its norm."""
    return outside.linears[PROJECT_OUT](t, hidden) if env.dims.embedding_width else hidden


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """OPTAttention.forward."""
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    # nothing rotates them: the gradients of all three lie in memory as they do
    q = split_heads(t, ops.scale(t, m.linears["self_attn.q_proj"](t, x)), env, value=True)
    k = m.linears["self_attn.k_proj"](t, x)
    v = m.linears["self_attn.v_proj"](t, x)
    k = split_heads(t, k, env, value=True)
    v = split_heads(t, v, env, value=True)
    out, weights = attend(t, q, k, v, env)
    out = m.linears["self_attn.out_proj"](t, out)
    t.owner = outer
    return out, weights


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """OPTDecoderLayer.forward."""
    d = env.dims
    residual = h = x
    del x
    if d.norm_before:
        h = layer_norm(t, m.norms["self_attn_layer_norm"], h, env)
    h, _weights = attention(t, m, h, env)
    h = ops.dropout(t, h, d.residual_dropout)
    h = ops.add(t, residual, h)
    if not d.norm_before:
        h = layer_norm(t, m.norms["self_attn_layer_norm"], h, env)
    h = ops.view(t, h)
    residual = h
    if d.norm_before:
        h = layer_norm(t, m.norms["final_layer_norm"], h, env)
    h = m.linears["fc1"](t, h)
    h = activate(t, h, env, "activation_fn")
    h = m.linears["fc2"](t, h)
    h = ops.dropout(t, h, d.residual_dropout)
    h = ops.view(t, ops.add(t, residual, h))
    if not d.norm_before:
        h = layer_norm(t, m.norms["final_layer_norm"], h, env)
    return h


FAMILY = Family(
    model_type="opt",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=causal_mask,
    enter=enter,
    leave=leave,
    positions=False,
    attentions=("sdpa", "eager", "flash_attention_2"),
    source="transformers 5.17.0 models/opt/modeling_opt.py",
)
