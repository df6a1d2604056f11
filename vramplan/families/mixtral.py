"""Mixtral: Llama's attention, a router and eight experts in the place of the MLP.

Source: transformers 5.17.0 ``models/mixtral/modeling_mixtral.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.families import llama, mistral
from vramplan.families.common import Env, pre_norm_block, rms_norm
from vramplan.families.experts import Routing, expert_specs, read_experts, router_logits, sparse_mlp
from vramplan.formats import FP32
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, LinearSpec, NormSpec, ParameterSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """MixtralConfig: every layer has experts as wide as intermediate_size."""
    dims = mistral.read(c)
    if c.number("router_jitter_noise", default=0.0, low=0.0, high=1.0):
        c.warnings.append("The router's jitter noise, one more tensor a layer, is not planned.")
    count, chosen = read_experts(c, "num_local_experts", 8, 2)
    return replace(
        dims,
        num_experts=count,
        num_experts_per_tok=chosen,
        moe_intermediate_size=dims.intermediate_size,
        norm_topk=True,
    )


def architecture(d: Dims) -> Architecture:
    """MixtralForCausalLM's modules."""
    return replace(
        llama.architecture(d),
        block=(
            *attention_specs(d),
            ParameterSpec("mlp.gate", (d.num_experts, d.hidden_size), ("gate",)),
            *expert_specs(d, ("w1", "w3"), ("w2",)),
            NormSpec("input_layernorm", d.hidden_size),
            NormSpec("post_attention_layernorm", d.hidden_size),
        ),
    )


def attention_specs(d: Dims, *, qkv_bias: bool | None = None) -> tuple[LinearSpec, ...]:
    """The four projections of Llama's attention."""
    return tuple(
        spec
        for spec in llama.architecture(d, qkv_bias=qkv_bias).block
        if isinstance(spec, LinearSpec) and spec.name.startswith("self_attn.")
    )


def router(t: Tape, m: Layer, x: Tensor, env: Env) -> Routing:
    """MixtralTopKRouter.forward: the scores stay in fp32."""
    outer, t.owner = t.owner, f"{m.name}.mlp.gate"
    logits = router_logits(t, m, x, env)
    probs = ops.softmax(t, ops.to(t, logits, FP32), FP32)
    scores, indices = ops.topk(t, probs, env.tokens * env.dims.num_experts_per_tok)
    scores = ops.normalise_(t, scores, env.tokens)
    t.owner = outer
    return Routing(logits, scores, indices)


mlp = sparse_mlp(router)  # MixtralSparseMoeBlock


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """MixtralDecoderLayer.forward."""
    return pre_norm_block(t, m, x, env, norm=rms_norm, attention=llama.attention, mlp=mlp)


FAMILY = replace(
    llama.FAMILY,
    model_type="mixtral",
    read=read,
    architecture=architecture,
    block=block,
    source="transformers 5.17.0 models/mixtral/modeling_mixtral.py",
)
