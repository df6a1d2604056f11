"""gpt-oss: attention with a learned sink per head, biases everywhere, experts with a clamped gate.

transformers has no sdpa for it, and FlashAttention only as a kernel from the hub: eager attention
is what it trains with, and what is modelled. Windows change nothing there, since eager attention
makes and reads masks and scores of full size.

Source: transformers 5.17.0 ``models/gpt_oss/modeling_gpt_oss.py``.

Known limitations:
    A checkpoint in MXFP4 is planned as dequantised to its dtype, which is what training needs. With
    ``--dtype fp16``, from_pretrained keeps the layers' norms in fp32; they are planned in fp16.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import llama
from vramplan.families.common import Env, Family, Shared, make_mask, repeat_kv, split_heads
from vramplan.families.experts import Routing, experts, read_experts
from vramplan.families.mixtral import attention_specs
from vramplan.formats import FP32
from vramplan.layers import Layer, Norm
from vramplan.model import Architecture, Dims, NormSpec, ParameterSpec
from vramplan.tape import Tape, Tensor

SLIDING, FULL = "sliding_attention", "full_attention"


def read(c: ConfigReader) -> Dims:
    """GptOssConfig."""
    c = c.with_defaults(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        attention_bias=True,
    )
    dims = llama.read(c)
    c.warnings.append(
        "Published gpt-oss checkpoints hold their experts in MXFP4: the download is smaller, and "
        "these numbers are for weights dequantised to --dtype (for QLoRA: a checkpoint that is)."
    )
    if dims.head_dim % 2:
        raise c.fail("head_dim", f"({dims.head_dim}) is odd; its halves are rotated")
    usual = [(SLIDING, FULL)[index % 2] for index in range(dims.num_layers)]
    kinds = c.layer_types(dims.num_layers, (SLIDING, FULL), usual)
    count, chosen = read_experts(c, "num_local_experts", 128, 4)
    return replace(
        dims,
        mlp_bias=False,
        num_experts=count,
        num_experts_per_tok=chosen,
        moe_intermediate_size=dims.intermediate_size,
        layer_kinds=kinds,
    )


def architecture(d: Dims) -> Architecture:
    """GptOssForCausalLM's modules; the experts' matrices are [in, out]."""
    h, i, count = d.hidden_size, d.moe_intermediate_size, d.num_experts
    return replace(
        llama.architecture(d),
        block=(
            ParameterSpec("self_attn.sinks", (d.num_heads,)),
            *attention_specs(d),
            ParameterSpec("mlp.router", (count, h)),
            ParameterSpec("mlp.router.bias", (count,)),
            ParameterSpec("mlp.experts.gate_up_proj", (count, h, 2 * i)),
            ParameterSpec("mlp.experts.gate_up_proj_bias", (count, 2 * i)),
            ParameterSpec("mlp.experts.down_proj", (count, i, h)),
            ParameterSpec("mlp.experts.down_proj_bias", (count, h)),
            NormSpec("input_layernorm", h),
            NormSpec("post_attention_layernorm", h),
        ),
    )


def rms_norm(t: Tape, norm: Norm, x: Tensor, env: Env) -> Tensor:
    """GptOssRMSNorm.forward: the weight is applied before the cast."""
    outer, t.owner = t.owner, norm.owner
    dtype = x.dtype
    h = ops.to(t, x, FP32)
    variance = ops.mean(t, ops.pow_scalar(t, h), env.tokens)
    h = ops.mul(t, h, ops.rsqrt(t, ops.add_scalar(t, variance)))
    out = ops.to(t, ops.mul(t, norm.weight, h), dtype)
    t.owner = outer
    return out


def prepare(t: Tape, embeds: Tensor, env: Env) -> None:
    """A mask for full and one for sliding layers; cos and sin for half a head."""
    full, sliding = make_mask(t, embeds, env, None), make_mask(t, embeds, env, 0)
    outer, t.owner = t.owner, f"{t.owner}.rotary_emb"
    half = env.length * env.dims.rotary_dim // 2
    freqs = t.new(half, FP32)
    t.use("cublas")
    cos = ops.scale(t, t.new(half, FP32))
    sin = ops.scale(t, t.new(half, FP32))
    del freqs
    cos, sin = ops.to(t, cos, embeds.dtype), ops.to(t, sin, embeds.dtype)
    t.owner = outer
    env.shared = {FULL: Shared(cos, sin, full), SLIDING: Shared(cos, sin, sliding)}


def rotate(t: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """_apply_rotary_emb."""
    first_half, second_half = ops.split(t, x, (x.numel // 2,) * 2)
    first = ops.sub(t, ops.mul(t, first_half, cos), ops.mul(t, second_half, sin))
    second = ops.add(t, ops.mul(t, second_half, cos), ops.mul(t, first_half, sin))
    return ops.cat(t, (first, second))


def eager_attention(
    t: Tape, m: Layer, q: Tensor, k: Tensor, v: Tensor, env: Env
) -> tuple[Tensor, Tensor]:
    """eager_attention_forward: one more column of scores, for the sink, dropped after softmax."""
    d = env.dims
    groups = d.num_heads // d.num_kv_heads
    assert env.mask is not None
    key = repeat_kv(t, k, groups)
    value = repeat_kv(t, v, groups)
    size = d.num_heads * env.tokens * env.length
    # cat left q and k contiguous, repeating k and v: batch and heads fold without a copy
    weights = ops.scale(t, ops.batched_matmul(t, q, key, size, d.head_dim, 1))
    weights = ops.add(t, weights, env.mask)
    sinks = ops.expand(t, m.parameters["self_attn.sinks"].weight, env.tokens)
    combined = ops.cat(t, (weights, sinks))
    combined = ops.subtract_max(t, combined, d.num_heads * env.tokens)
    probs = ops.softmax(t, combined, combined.dtype)
    scores = ops.slice_(t, probs, size)
    weights = ops.to(t, ops.dropout(t, scores, d.attention_dropout), value.dtype)
    if groups == 1 and env.batch > 1:
        value = ops.copy(t, value)
    out = ops.batched_matmul(t, weights, value, q.numel, env.length, 1)
    return ops.copy(t, out), weights


def attention(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """GptOssAttention.forward."""
    assert env.cos is not None and env.sin is not None
    outer, t.owner = t.owner, f"{m.name}.self_attn"
    q = split_heads(t, m.linears["self_attn.q_proj"](t, x), env)
    k = split_heads(t, m.linears["self_attn.k_proj"](t, x), env)
    v = split_heads(t, m.linears["self_attn.v_proj"](t, x), env, value=True)
    q, k = rotate(t, q, env.cos, env.sin), rotate(t, k, env.cos, env.sin)
    out, weights = eager_attention(t, m, q, k, v, env)
    out = m.linears["self_attn.o_proj"](t, out)
    t.owner = outer
    return out, weights


def router(t: Tape, m: Layer, x: Tensor, env: Env) -> Routing:
    """GptOssTopKRouter.forward: the largest logits first, then their softmax, in their dtype."""
    d = env.dims
    outer, t.owner = t.owner, f"{m.name}.mlp.router"
    weight, bias = m.parameters["mlp.router"].weight, m.parameters["mlp.router.bias"].weight
    logits = ops.linear(t, x, weight, bias, d.num_experts, d.hidden_size)
    values, indices = ops.topk(t, logits, env.tokens * d.num_experts_per_tok)
    scores = ops.softmax(t, values, values.dtype)
    t.owner = outer
    return Routing(logits, scores, indices)


def gate(t: Tape, gate_up: Tensor, env: Env) -> Tensor:
    """GptOssExperts._apply_gate."""
    half = gate_up.numel // 2
    gate_, up = ops.slice_(t, gate_up, half), ops.slice_(t, gate_up, half)
    gate_ = ops.clamp(t, gate_, 1)
    up = ops.clamp(t, up, 2)
    glu = ops.mul(t, gate_, ops.sigmoid(t, ops.scale(t, gate_)))
    return ops.mul(t, ops.add_scalar(t, up), glu)


def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """GptOssMLP.forward; the router's scores are returned too."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    with t.flattened():
        routing = router(t, m, x, env)
    out = experts(t, m, x, routing.indices, routing.scores, env, gate)
    t.owner = outer
    return out, routing.scores


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """GptOssDecoderLayer.forward."""
    residual = x
    h = rms_norm(t, m.norms["input_layernorm"], x, env)
    h, _kept = attention(t, m, h, env)
    h = ops.add(t, residual, h)
    residual = h
    h = rms_norm(t, m.norms["post_attention_layernorm"], h, env)
    h, _kept = mlp(t, m, h, env)
    return ops.add(t, residual, h)


FAMILY = Family(
    model_type="gpt_oss",
    read=read,
    architecture=architecture,
    block=block,
    norm=rms_norm,
    prepare=prepare,
    attentions=("eager",),
    source="transformers 5.17.0 models/gpt_oss/modeling_gpt_oss.py",
)
