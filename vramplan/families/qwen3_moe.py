"""Qwen3-MoE: norms on every head's queries and keys, many small experts, none shared.

Its attention is Qwen3's.

Source: transformers 5.17.0 ``models/qwen3_moe/modeling_qwen3_moe.py``.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan.config import ConfigReader
from vramplan.families import llama, qwen3
from vramplan.families.common import Env, pre_norm_block, rms_norm
from vramplan.families.experts import expert_specs, read_experts, sparse_kinds, sparse_mlp
from vramplan.families.mixtral import attention_specs
from vramplan.families.qwen2_moe import router
from vramplan.layers import Layer
from vramplan.model import Architecture, Dims, ModuleSpec, NormSpec, ParameterSpec
from vramplan.tape import Tape, Tensor


def read(c: ConfigReader) -> Dims:
    """Qwen3MoeConfig: a window, if switched on, is every layer's."""
    c = c.with_defaults(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    dims = llama.read(c)
    used = c.flag("use_sliding_window", default=False)
    window = c.size("sliding_window", default=4096) if used else None
    count, chosen = read_experts(c, "num_experts", 128, 8)
    return replace(
        dims,
        mlp_bias=False,
        sliding_window=window,
        num_sliding_layers=dims.num_layers if window else 0,
        num_experts=count,
        num_experts_per_tok=chosen,
        moe_intermediate_size=c.size("moe_intermediate_size", default=768),
        norm_topk=c.flag("norm_topk_prob", default=False),
        layer_kinds=sparse_kinds(c, dims.num_layers),
    )


def architecture(d: Dims) -> Architecture:
    """Qwen3MoeForCausalLM's modules."""
    h = d.hidden_size
    head_norms = (
        NormSpec("self_attn.q_norm", d.head_dim),
        NormSpec("self_attn.k_norm", d.head_dim),
    )
    base = llama.architecture(d)
    dense: tuple[ModuleSpec, ...] = (*base.block, *head_norms)
    return replace(
        base,
        block=(
            *attention_specs(d),
            *head_norms,
            *expert_specs(d, ("gate_proj", "up_proj"), ("down_proj",)),
            ParameterSpec("mlp.gate", (d.num_experts, h), ("gate",)),
            NormSpec("input_layernorm", h),
            NormSpec("post_attention_layernorm", h),
        ),
        blocks={"dense": dense} if "dense" in d.layer_kinds else {},
    )


mlp = sparse_mlp(router)  # Qwen3MoeSparseMoeBlock


def block(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """Qwen3MoeDecoderLayer.forward."""
    own = llama.mlp if m.kind == "dense" else mlp
    return pre_norm_block(t, m, x, env, norm=rms_norm, attention=qwen3.attention, mlp=own)


FAMILY = replace(
    llama.FAMILY,
    model_type="qwen3_moe",
    read=read,
    architecture=architecture,
    block=block,
    source="transformers 5.17.0 models/qwen3_moe/modeling_qwen3_moe.py",
)
