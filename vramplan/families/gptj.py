"""GPT-J: parallel attention and MLP, rotary positions on part of each head, no sdpa.

Source: transformers 5.17.0 ``models/gptj/modeling_gptj.py``.
"""

from __future__ import annotations

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families.common import Env, Family, activate, attend, causal_mask, layer_norm
from vramplan.formats import FP32, INT64
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, EmbeddingSpec, LinearSpec, NormSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """GPTJConfig."""
    hidden = c.size("n_embd", "hidden_size", default=4096)
    heads = c.size("n_head", "num_attention_heads", default=16)
    head_dim = c.heads(hidden, heads)
    rotary = c.size("rotary_dim", default=64)
    if rotary > head_dim:
        raise c.fail("rotary_dim", f"({rotary}) is wider than a head ({head_dim})")
    return Dims(
        vocab_size=c.size("vocab_size", default=50400),
        hidden_size=hidden,
        num_layers=c.size("n_layer", "num_hidden_layers", default=28, top=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=c.size("n_inner", default=4 * hidden),
        max_positions=c.size("n_positions", "max_position_embeddings", default=2048),
        hidden_act=c.text("activation_function", default="gelu_new"),
        tied=c.flag("tie_word_embeddings", default=False),
        rotary_dim=rotary,
        attention_dropout=c.dropout("attn_pdrop"),
        residual_dropout=c.dropout("resid_pdrop"),
        embedding_dropout=c.dropout("embd_pdrop"),
        dtype=c.dtype(),
    )


def architecture(d: Dims) -> Architecture:
    """GPTJForCausalLM's modules."""
    h = d.hidden_size
    return Architecture(
        embedding=EmbeddingSpec("transformer.wte", d.vocab_size, h),
        block=(
            NormSpec("ln_1", h, bias=True),
            LinearSpec("attn.k_proj", h, h),
            LinearSpec("attn.v_proj", h, h),
            LinearSpec("attn.q_proj", h, h),
            LinearSpec("attn.out_proj", h, h),
            LinearSpec("mlp.fc_in", h, d.intermediate_size, bias=True),
            LinearSpec("mlp.fc_out", d.intermediate_size, h, bias=True),
        ),
        final_norm=NormSpec("transformer.ln_f", h, bias=True),
        head=LinearSpec("lm_head", h, d.vocab_size, bias=True),
        layer_prefix="transformer.h",
        layer_buffers=(d.max_positions * d.rotary_dim * 4,),  # embed_positions
    )


def rotate_every_two(t: Tape, x: Tensor) -> Tensor:
    """``stack((-x[..., 1::2], x[..., ::2]), dim=-1)``."""
    x1 = ops.slice_(t, x, x.numel // 2)
    x2 = ops.slice_(t, x, x.numel // 2)
    return ops.cat(t, (ops.neg(t, x2), x1))


def rotate(t: Tape, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """apply_rotary_pos_emb."""
    sin = t.new(2 * sin.numel, sin.dtype)  # repeat_interleave
    cos = t.new(2 * cos.numel, cos.dtype)
    return ops.add(t, ops.mul(t, x, cos), ops.mul(t, rotate_every_two(t, x), sin))


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """GPTJAttention.forward."""
    d = env.dims
    outer, t.owner = t.owner, f"{m.name}.attn"
    q = ops.view(t, m.linears["attn.q_proj"](t, x))
    k = ops.view(t, m.linears["attn.k_proj"](t, x))
    v = ops.view(t, m.linears["attn.v_proj"](t, x), copied=True)
    _positions = t.new(d.max_positions * d.rotary_dim, FP32)
    _repeated = t.new(env.length * d.rotary_dim, INT64)
    sincos = ops.to(t, t.new(env.length * d.rotary_dim, FP32), k.dtype)
    sin = Tensor(sincos.storage, sincos.numel // 2, sincos.dtype)
    cos = Tensor(sincos.storage, sincos.numel // 2, sincos.dtype)
    rotated = env.tokens * d.num_heads * d.rotary_dim
    k_rot = ops.slice_(t, k, rotated)
    k_pass = ops.slice_(t, k, k.numel - rotated)
    q_rot = ops.slice_(t, q, rotated)
    q_pass = ops.slice_(t, q, q.numel - rotated)
    k_rot = rotate(t, k_rot, sin, cos)
    q_rot = rotate(t, q_rot, sin, cos)
    k = ops.cat(t, (k_rot, k_pass))
    q = ops.cat(t, (q_rot, q_pass))
    if env.attention == "eager":
        out, weights = eager(t, q, k, v, env)
        out = ops.view(t, out, copied=env.batch > 1)
        out = ops.copy(t, out)  # _merge_heads
    else:
        out, weights = attend(t, q, k, v, env)
    out = m.linears["attn.out_proj"](t, out)
    out = ops.dropout(t, out, d.residual_dropout)
    t.owner = outer
    return out, weights


def eager(t: Tape, q: Tensor, k: Tensor, v: Tensor, env: Env) -> tuple[Tensor, Tensor | None]:
    """GPTJAttention._attn: asks for fp32, autocast brings the products back to 16 bit."""
    d = env.dims
    size = d.num_heads * env.tokens * env.length
    q = ops.to(t, q, FP32)
    k = ops.to(t, k, FP32)
    weights = ops.batched_matmul(t, q, k, size, d.head_dim, env.batch)
    weights = ops.scale(t, weights)
    if env.mask is not None:
        weights = ops.add(t, weights, env.mask)
    weights = ops.softmax(t, weights)
    weights = ops.to(t, weights, v.dtype)
    weights = ops.dropout(t, weights, d.attention_dropout)
    out = ops.batched_matmul(t, weights, v, q.numel, env.length, env.batch, folds=(True, False))
    return out, weights


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GPTJMLP.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    h = m.linears["mlp.fc_in"](t, x)
    h = activate(t, h, env, "act")
    h = m.linears["mlp.fc_out"](t, h)
    h = ops.dropout(t, h, env.dims.residual_dropout)
    t.owner = outer
    return h


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GPTJBlock.forward; returns the attention weights too, which the model's loop keeps alive."""
    residual = x
    h = layer_norm(t, m.norms["ln_1"], x, env)
    attn, weights = attention(t, m, h, env)
    feed_forward = mlp(t, m, h, env)
    h = ops.add(t, ops.add(t, attn, feed_forward), residual)
    env.kept = weights
    return h


FAMILY = Family(
    model_type="gptj",
    read=read,
    architecture=architecture,
    block=block,
    norm=layer_norm,
    prepare=causal_mask,
    attentions=("eager", "flash_attention_2"),
    source="transformers 5.17.0 models/gptj/modeling_gptj.py",
)
