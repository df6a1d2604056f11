"""Qwen2-MoE: Qwen2's attention; many small experts beside one that every token goes through.

Source: transformers 5.17.0 ``models/qwen2_moe/modeling_qwen2_moe.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import llama, qwen2
from vramplan.families.common import (
    Env,
    Shared,
    activate,
    cos_sin,
    make_mask,
    pre_norm_block,
    rms_norm,
)
from vramplan.families.experts import (
    Routing,
    expert_specs,
    experts,
    read_experts,
    router_logits,
    sparse_kinds,
    topk_softmax,
)
from vramplan.families.mixtral import attention_specs
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, LinearSpec, NormSpec, ParameterSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """Qwen2MoeConfig."""
    c = c.with_defaults(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    dims = qwen2.read(c)
    count, chosen = read_experts(c, "num_experts", 60, 4)
    return replace(
        dims,
        attention_bias=c.flag("qkv_bias", default=True),
        num_experts=count,
        num_experts_per_tok=chosen,
        moe_intermediate_size=c.size("moe_intermediate_size", default=1408),
        shared_intermediate_size=c.size("shared_expert_intermediate_size", default=5632),
        norm_topk=c.flag("norm_topk_prob", default=False),
        layer_kinds=sparse_kinds(c, dims.num_layers),
    )


def architecture(d: Dims) -> Architecture:
    """Qwen2MoeForCausalLM's modules."""
    h, shared = d.hidden_size, d.shared_intermediate_size
    base = llama.architecture(d, qkv_bias=d.attention_bias)
    return replace(
        base,
        block=(
            *attention_specs(d, qkv_bias=d.attention_bias),
            ParameterSpec("mlp.gate", (d.num_experts, h)),
            *expert_specs(d),
            LinearSpec("mlp.shared_expert.gate_proj", h, shared),
            LinearSpec("mlp.shared_expert.up_proj", h, shared),
            LinearSpec("mlp.shared_expert.down_proj", shared, h),
            LinearSpec("mlp.shared_expert_gate", h, 1),
            NormSpec("input_layernorm", h),
            NormSpec("post_attention_layernorm", h),
        ),
        blocks={"dense": base.block} if "dense" in d.layer_kinds else {},
    )


def prepare(t: Tape, embeds: Tensor, env: Env) -> None:
    """Both masks: the one for sliding layers is made even where no layer slides.

    Without use_sliding_window the config's window becomes 0, and no sequence is shorter than that.
    """
    d = env.dims
    mask = make_mask(t, embeds, env, d.sliding_window)
    other = make_mask(t, embeds, env, None if d.sliding_window else 0)
    cos, sin = cos_sin(t, env, embeds.dtype)
    env.shared = {kind: Shared(cos, sin, mask) for kind in d.kinds}
    env.shared["unused"] = Shared(mask=other)


def router(t: Tape, m: Layer, x: Tensor, env: Env) -> Routing:
    """Qwen2MoeTopKRouter.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp.gate"
    logits = router_logits(t, m, x, env)
    scores, indices = topk_softmax(t, logits, env)
    t.owner = outer
    return Routing(logits, scores, indices)


def shared_expert(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Qwen2MoeMLP.forward of the shared expert."""
    outer, t.owner = t.owner, f"{m.name}.mlp.shared_expert"
    out = m.linears["mlp.shared_expert.down_proj"](
        t,
        ops.mul(
            t,
            activate(t, m.linears["mlp.shared_expert.gate_proj"](t, x), env, "act_fn"),
            m.linears["mlp.shared_expert.up_proj"](t, x),
        ),
    )
    t.owner = outer
    return out


def sparse_mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Qwen2MoeSparseMoeBlock.forward."""
    outer, t.owner = t.owner, f"{m.name}.mlp"
    with t.flattened():
        shared = shared_expert(t, m, x, env)
        routing = router(t, m, x, env)
        out = experts(t, m, x, routing.indices, routing.scores, env)
        shared = ops.mul(t, ops.sigmoid(t, m.linears["mlp.shared_expert_gate"](t, x)), shared)
        out = ops.add(t, out, shared)
    t.owner = outer
    return out


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Qwen2MoeDecoderLayer.forward."""
    mlp = llama.mlp if m.kind == "dense" else sparse_mlp
    return pre_norm_block(t, m, x, env, norm=rms_norm, attention=llama.attention, mlp=mlp)


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen2_moe",
    read=read,
    architecture=architecture,
    block=block,
    prepare=prepare,
    source="transformers 5.17.0 models/qwen2_moe/modeling_qwen2_moe.py",
)
