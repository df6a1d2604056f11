"""Pieces that the mixture-of-experts families share: routing, the experts, their adapters.

transformers holds all experts of a layer in fused 3-D parameters and, unless asked for something
else, multiplies them grouped by expert: every token's hidden state is copied once per chosen expert
and sorted, so the number of rows is always tokens times experts per token, whatever the router
decides. bitsandbytes leaves these parameters and the router alone, since they are no ``nn.Linear``.

Source: transformers 5.17.0 ``integrations/moe.py`` (``grouped_mm_experts_forward``),
``modeling_utils.py`` (``get_correct_experts_implementation``: grouped_mm is the default); peft
0.21.0 ``tuners/lora/layer.py`` (``ParamWrapper``); torch 2.11 ``nn/utils/parametrize.py``.

Known limitations:
    ``experts_implementation`` other than the default (eager, batched_mm, kernels) and the auxiliary
    router loss are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vramplan import ops
from vramplan.config import MAX_LAYERS, ConfigReader
from vramplan.families.common import Env, activate
from vramplan.formats import BOOL, FP32, INT32, INT64
from vramplan.layers import Layer, Parameter
from vramplan.model import Dims, ParameterSpec
from vramplan.tape import Tape, Tensor

MAX_EXPERTS = 1023  # more groups than the grouped product's kernel takes

Gate = Callable[[Tape, Tensor, Env], Tensor]


def read_experts(c: ConfigReader, key: str, default: int, per_token: int) -> tuple[int, int]:
    """Number of experts and how many of them see a token.

    Args:
        c: The config.
        key: Name of the number of experts.
        default: Its default.
        per_token: Default of ``num_experts_per_tok``.

    Raises:
        ConfigError: If a token would need more experts than there are.
    """
    count = c.size(key, "num_experts", "num_local_experts", default=default, top=MAX_EXPERTS)
    chosen = c.size("num_experts_per_tok", default=per_token, top=MAX_EXPERTS)
    if chosen > count:
        raise c.fail("num_experts_per_tok", f"({chosen}) is more than the {count} experts")
    if c.flag("output_router_logits", default=False):
        c.warnings.append(
            "The config asks for router logits (output_router_logits): their auxiliary loss, and "
            "the logits of all layers that it keeps, are not in the numbers."
        )
    return count, chosen


def sparse_kinds(c: ConfigReader, num_layers: int) -> tuple[str, ...]:
    """Which layers have experts ("sparse") and which a plain MLP ("dense"); empty: all have them.

    Raises:
        ConfigError: If mlp_only_layers is not a list of numbers.
    """
    step = c.size("decoder_sparse_step", default=1, top=MAX_LAYERS)
    listed = c.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(index) is int for index in listed):
        raise c.fail("mlp_only_layers", "must be a list of layer numbers")
    dense = set(listed)
    kinds = tuple(
        "dense" if index in dense or (index + 1) % step else "sparse" for index in range(num_layers)
    )
    return kinds if "dense" in kinds else ()


def expert_specs(
    d: Dims, gate_up: tuple[str, ...] = (), down: tuple[str, ...] = ()
) -> tuple[ParameterSpec, ParameterSpec]:
    """The fused parameters, [experts, out, in] each, and the layer names peft maps to them."""
    h, i = d.hidden_size, d.moe_intermediate_size
    return (
        ParameterSpec("mlp.experts.gate_up_proj", (d.num_experts, 2 * i, h), gate_up),
        ParameterSpec("mlp.experts.down_proj", (d.num_experts, h, i), down),
    )


class Routing(NamedTuple):
    """What a router returns; the block keeps all three until it returns."""

    logits: Tensor
    scores: Tensor
    indices: Tensor


def router_weight(t: Tape, m: Layer, name: str) -> Tensor:
    """The router's weight, with its adapter added if it has one (ParamWrapper.forward)."""
    router = m.parameters[name]
    if router.adapter is None:
        return router.weight
    delta = router.delta(t)
    ops.add(t, router.weight, delta)  # register_parametrization tries it once
    return ops.add(t, router.weight, delta)


def router_logits(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
    """``F.linear(hidden_states, self.weight)`` of the routers without a bias."""
    d = env.dims
    weight = router_weight(t, m, "mlp.gate")
    return ops.linear(t, x, weight, None, d.num_experts, d.hidden_size)


def silu_gate(t: Tape, gate_up: Tensor, env: Env) -> Tensor:
    """``_default_apply_gate``: ``act_fn(gate) * up``."""
    gate, up = ops.split(t, gate_up, (gate_up.numel // 2,) * 2)
    return ops.mul(t, activate(t, gate, env, "act_fn"), up)


def experts(
    t: Tape, m: Layer, x: Tensor, indices: Tensor, scores: Tensor, env: Env, gate: Gate = silu_gate
) -> Tensor:
    """The experts' forward, inside peft's wrappers if it has adapters.

    A wrapper adds the adapters to all experts' weights at once, in a copy as large as the weights,
    and does so twice: registering the parametrization computes it to check it. Both copies live
    until the outer wrapper returns, longer where the graph keeps them.
    """
    outer, t.owner = t.owner, f"{m.name}.mlp.experts"
    gate_up, down = m.parameters["mlp.experts.gate_up_proj"], m.parameters["mlp.experts.down_proj"]
    cache: dict[str, Tensor] = {}
    out = _wrapped(
        t, down, lambda down_weight: _wrapped(
            t, gate_up, lambda gate_up_weight: _grouped_mm_experts(
                t, m, x, indices, scores, env, gate, gate_up_weight, down_weight
            ), cache,
        ), cache,
    )  # fmt: skip
    cache.clear()
    t.owner = outer
    return out


Mlp = Callable[[Tape, Layer, Tensor, Env], Tensor]
Router = Callable[[Tape, Layer, Tensor, Env], Routing]


def sparse_mlp(router: Router) -> Mlp:
    """...SparseMoeBlock.forward: the experts that a family's router picks for every token."""

    def mlp(t: Tape, m: Layer, x: Tensor, env: Env) -> Tensor:
        outer, t.owner = t.owner, f"{m.name}.mlp"
        with t.flattened():
            routing = router(t, m, x, env)
            out = experts(t, m, x, routing.indices, routing.scores, env)
        t.owner = outer
        return out

    return mlp


Weight = Callable[[], Tensor]


def _wrapped(
    t: Tape, parameter: Parameter, run: Callable[[Weight], Tensor], cache: dict[str, Tensor]
) -> Tensor:
    """ParamWrapper.forward: the base layer sees the folded weight, made when first asked for."""
    if parameter.adapter is None:
        return run(lambda: parameter.weight)
    left, right = parameter.factors(t)
    parameter.fold(t, left, right)  # register_parametrization tries it once

    def weight() -> Tensor:
        name = parameter.spec.name
        if name not in cache:
            cache[name] = parameter.fold(t, left, right)
        return cache[name]

    return run(weight)


def _grouped_mm_experts(
    t: Tape,
    m: Layer,
    x: Tensor,
    indices: Tensor,
    scores: Tensor,
    env: Env,
    gate: Gate,
    gate_up_weight: Weight,
    down_weight: Weight,
) -> Tensor:
    """grouped_mm_experts_forward."""
    d = env.dims
    h, i = d.hidden_size, d.moe_intermediate_size
    rows = indices.numel
    fallback = env.capability < (8, 0)
    sample_weights = ops.view(t, scores)
    expert_ids_g, perm = t.new(rows, INT64), t.new(rows, INT64)
    selected = ops.index(t, x, t.new(rows, INT64), h)
    sample_weights_g = ops.index(t, sample_weights, perm, 1)
    histc_input = t.new(rows, INT32)
    tokens_per_expert = t.new(d.num_experts, INT32)
    offsets = t.new(d.num_experts, INT32)
    sentinel_mask = t.new(rows, BOOL)
    weights = gate_up_weight()
    biases = _selected_bias(t, m, "gate_up_proj_bias", expert_ids_g, 2 * i)
    selected = ops.masked_fill_(t, selected, sentinel_mask)
    proj_out = ops.grouped_mm(t, selected, weights, offsets, (h, 2 * i), fallback=fallback)
    if biases is not None:
        proj_out = ops.add_(t, proj_out, biases)
    proj_out = ops.masked_fill(t, proj_out, sentinel_mask)
    proj_out = gate(t, proj_out, env)
    weights = down_weight()
    biases = _selected_bias(t, m, "down_proj_bias", expert_ids_g, h)
    proj_out = ops.grouped_mm(t, proj_out, weights, offsets, (i, h), fallback=fallback)
    if biases is not None:
        proj_out = ops.add_(t, proj_out, biases)
    proj_out = ops.masked_fill(t, proj_out, sentinel_mask)
    weighted_out = ops.mul(t, proj_out, sample_weights_g)
    inv_perm = t.new(rows, INT64)
    positions = t.new(rows, INT64)
    del positions
    weighted_out = ops.index(t, weighted_out, inv_perm, h)
    final = ops.sum_rows(t, weighted_out, x.numel)
    out = ops.to(t, final, x.dtype)
    del expert_ids_g, perm, histc_input, tokens_per_expert, selected, biases, final
    return out


def _selected_bias(t: Tape, m: Layer, name: str, ids: Tensor, width: int) -> Tensor | None:
    """``bias[expert_ids_g]``: a row of bias for every row of hidden states."""
    bias = m.parameters.get(f"mlp.experts.{name}")
    return None if bias is None else ops.index(t, bias.weight, ids, width)


def topk_softmax(t: Tape, logits: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """The routers of Qwen: softmax in fp32, the largest, maybe normalised, in the logits' dtype."""
    d = env.dims
    probs = ops.softmax(t, logits, FP32)
    scores, indices = ops.topk(t, probs, env.tokens * d.num_experts_per_tok)
    if d.norm_topk:
        scores = ops.normalise_(t, scores, env.tokens)
    return ops.to(t, scores, logits.dtype), indices
