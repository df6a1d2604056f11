"""What ``from_pretrained`` allocates on the card, weight by weight.

A quantised model is loaded straight to the card. transformers first asks for one block of all
weights at their stored size and gives it back, so that the weights share one segment. Then it takes
the checkpoint's tensors sorted by name, one at a time (no worker threads when it quantises): the
whole tensor comes to the card in the loaded dtype, is quantised beside it and goes. Fused experts
are stacked there from the checkpoint's single ones. A model that is not quantised is loaded on the
host, and Trainer moves it to the card parameter by parameter.

Source: transformers 5.17.0 ``core_model_loading.py`` (``convert_and_load_state_dict_in_model``,
``dot_natural_key``, ``MergeModulelist``, ``Concatenate``), ``modeling_utils.py``
(``caching_allocator_warmup``), ``quantizers/quantizer_bnb_4bit.py``, ``integrations/
bitsandbytes.py``; bitsandbytes 0.50.2 ``nn/modules.py`` (``Params4bit._quantize``,
``Int8Params._quantize``), ``functional.py`` (``quantize_4bit``).

Known limitations:
    A checkpoint of 16-bit safetensors in the model's own names; a pre-quantised one needs less.
    ``device_map`` on a model that is not quantised, which loads with threads, is not modelled: its
    peak is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vramplan.formats import FP16, QUANT_FORMATS
from vramplan.job import Job
from vramplan.model import EmbeddingSpec, LinearSpec, Model, ModuleSpec, ParameterSpec
from vramplan.units import round_block

Request = tuple[int, int]  # (block, bytes); negative bytes release it, as in vramplan.replay
RENAMED = {  # what modules and parameters are called in the checkpoint where it differs
    "gpt_neox": {"lm_head": "embed_out"},
    "mixtral": {
        "mlp": "block_sparse_moe",
        "mlp.experts.gate_up_proj": "block_sparse_moe.experts.0.w1",
        "mlp.experts.down_proj": "block_sparse_moe.experts.0.w2",
    },
}
STACKED = ("mixtral", "qwen2_moe", "qwen3_moe")  # experts that lie singly in the checkpoint


class Weight(NamedTuple):
    """One tensor of the checkpoint.

    Attributes:
        name: Its name there, that of a layer's relative to the layer.
        stored: Bytes the warm-up counts for it.
        kept: Blocks that stay on the card, in bytes.
        passing: Blocks that go when it is loaded, the whole tensor first.
    """

    name: str
    stored: int
    kept: tuple[int, ...]
    passing: tuple[int, ...] = ()


def weights(model: Model, job: Job) -> list[list[Weight]]:
    """The checkpoint's tensors in the order in which they are loaded, those of a layer together.

    Layers of one kind share one list; its names are relative to the layer.
    """
    arch, dims = model.architecture, model.dims
    head, norm = arch.head, arch.final_norm
    outside: list[Weight] = []
    for spec in (arch.embedding, *arch.outside, *([norm] if norm is not None else [])):
        outside += _tensors(model, job, spec)
    if not dims.tied:
        outside += _tensors(model, job, head, quantised=False)
    elif head.bias:
        outside.append(_plain(f"{head.name}.bias", head.out_features, job))
    outside = [
        weight._replace(name=f"{checkpoint_name(model, module)}.{last}")
        for weight in outside
        for module, _, last in [weight.name.rpartition(".")]
    ]
    layers = {
        kind: sorted(
            (w for spec in arch.block_of(kind) for w in _tensors(model, job, spec)),
            key=lambda weight: natural_key(checkpoint_name(model, weight.name)),
        )
        for kind in set(dims.kinds)
    }
    named = [(weight.name, [[weight]]) for weight in outside]
    named.append((f"{arch.layer_prefix}.0", [layers[kind] for kind in dims.kinds]))
    return [
        group for _, groups in sorted(named, key=lambda n: natural_key(n[0])) for group in groups
    ]


def checkpoint_name(model: Model, module: str) -> str:
    """What a module's tensors are called in the checkpoint, by which they are sorted."""
    names = RENAMED.get(model.family, {})
    first, dot, rest = module.partition(".")
    return names.get(module) or names.get(first, first) + dot + rest


def load_requests(model: Model, job: Job) -> list[Request]:
    """What loading asks the allocator for: blocks by number, negative bytes when one goes."""
    groups = weights(model, job)
    requests: list[Request] = []
    number = 1
    if job.quantised:
        whole = warm_up_bytes(groups)
        requests += [(number, whole), (number, -whole)]
    for weight in (w for group in groups for w in group):
        passing = [(number + n, size) for n, size in enumerate(weight.passing, 1)]
        number += len(passing)
        requests += passing
        for size in weight.kept:
            number += 1
            requests.append((number, size))
        requests += [(block, -size) for block, size in passing]
    return requests + [(number + n, size) for n, size in enumerate(_buffers(model), 1)]


def load_peak_bytes(model: Model, job: Job) -> int:
    """Most bytes allocated while the weights are loaded, blocks at the size asked for.

    Args:
        model: The model.
        job: The job; its method, dtype and quantisation count.
    """
    groups = weights(model, job)
    live = 0
    most = warm_up_bytes(groups) if job.quantised else 0
    walked: dict[int, tuple[int, int]] = {}
    for group in groups:
        if id(group) not in walked:
            kept = top = 0
            for weight in group:
                kept += sum(weight.kept)
                top = max(top, kept + sum(weight.passing))
            walked[id(group)] = kept, top
        kept, top = walked[id(group)]
        most = max(most, live + top)
        live += kept
    return max(most, live + sum(_buffers(model)))


def _buffers(model: Model) -> list[int]:
    """What no checkpoint holds comes to the device last."""
    arch = model.architecture
    layers = arch.layer_buffers * model.dims.num_layers
    return [round_block(n) for n in (*arch.embedding.buffers, *layers, *arch.model_buffers)]


def warm_up_bytes(groups: list[list[Weight]]) -> int:
    """The one block that caching_allocator_warmup asks for, on a card with room for it."""
    return round_block(sum(weight.stored for group in groups for weight in group) // 2 * 2)


def _tensors(
    model: Model, job: Job, spec: ModuleSpec, *, quantised: bool = True
) -> Iterator[Weight]:
    name = spec.name
    if isinstance(spec, ParameterSpec):
        weight = _plain(name, spec.num_parameters, job)
        if spec.num_experts > 1 and model.family in STACKED and job.quantised:
            weight = weight._replace(passing=weight.kept)
        yield weight
        return
    if isinstance(spec, EmbeddingSpec):
        yield _plain(f"{name}.weight", spec.num_parameters, job)
        return
    if isinstance(spec, LinearSpec):
        rows, columns = spec.out_features, spec.in_features
        if quantised and job.quantised and spec.quantisable:
            yield _quantised(f"{name}.weight", rows, columns, job, turned=spec.cls == "Conv1D")
        else:
            yield _plain(f"{name}.weight", rows * columns, job)
        size = rows
    else:
        yield _plain(f"{name}.weight", spec.size, job)
        size = spec.size
    if spec.bias:
        yield _plain(f"{name}.bias", size, job)


def _plain(name: str, numel: int, job: Job) -> Weight:
    nbytes = numel * job.weight_dtype.size
    return Weight(name, nbytes, (round_block(nbytes),))


def _quantised(name: str, rows: int, columns: int, job: Job, *, turned: bool) -> Weight:
    """A weight that is quantised on the card; a Conv1D's is copied into nn.Linear's order first."""
    fmt = QUANT_FORMATS[job.quant_type]
    numel = rows * columns
    passing = [round_block(numel * job.weight_dtype.size)] * (1 + turned)
    if not fmt.block:  # LLM.int8: to the host, back in fp16, quantised
        passing = [passing[0], round_block(numel * FP16.size)]
    elif fmt.nested and job.double_quant:  # fp32 scales, and their distance from the mean
        passing += [round_block(-(-numel // fmt.block) * 4)] * 2
    kept = tuple(round_block(n) for _, n in fmt.parts(rows, columns, job.double_quant))
    return Weight(name, numel * fmt.bits // 8, kept, tuple(passing))


def natural_key(name: str) -> list[tuple[int, int | str, int]]:
    """dot_natural_key: numbers before words, words with their trailing number apart."""
    key: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        if part.isdigit():
            key.append((0, int(part), 0))
        else:
            text = part.rstrip("0123456789")
            tail = part[len(text) :]
            key.append((1, text, int(tail) if tail else -1))
    return key
