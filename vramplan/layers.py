"""What transformers, bitsandbytes and peft put in the place of a model's modules.

From module specifications and a job this builds the parameters that really sit on the device (their
dtypes, their quantisation state, the adapters) and the forward functions of the layers that replace
``nn.Linear``.

Source: transformers 5.17 ``integrations/bitsandbytes.py``; peft 0.21 ``tuners/lora/layer.py``
(``Linear.forward``, ``ParamWrapper``), ``tuners/lora/bnb.py`` (``Linear4bit.forward``,
``Linear8bitLt.forward``), ``utils/other.py`` (``prepare_model_for_kbit_training``),
``utils/transformers_weight_conversion.py`` (``_convert_peft_config_moe``); bitsandbytes 0.50.2
``nn/modules.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from vramplan import ops
from vramplan.errors import UsageError
from vramplan.formats import FP16, FP32, QUANT_FORMATS, Dtype
from vramplan.job import ALL_LINEAR, Job
from vramplan.loading import checkpoint_name, natural_key, warm_up_bytes, weights
from vramplan.model import (
    Architecture,
    EmbeddingSpec,
    LinearSpec,
    Model,
    ModuleSpec,
    NormSpec,
    ParameterSpec,
)
from vramplan.tape import Param, Storage, Tape, Tensor
from vramplan.timeline import Kind, Phase
from vramplan.units import round_block


@dataclass(slots=True)
class Adapter:
    """LoRA: B(A(dropout(x))) * scaling."""

    a: Param
    b: Param
    r: int
    dropout: float


@dataclass(slots=True)
class Linear:
    """A linear layer as the libraries left it: plain, 4-bit or 8-bit, with or without adapter."""

    spec: LinearSpec
    owner: str
    weight: Param | None  # None: quantised
    bias: Param | None
    quant_type: str = ""
    compute: Dtype = FP32
    stored: Dtype = FP32
    dequantised: tuple[int, ...] = ()
    adapter: Adapter | None = None

    def __call__(self, t: Tape, x: Tensor) -> Tensor:
        """Run the layer on x [tokens, in_features]."""
        outer, t.owner = t.owner, self.owner
        t.num_layers += 1
        if self.adapter is None:
            out = self._base(t, x)
        elif self.quant_type:
            out = self._lora_quantised(t, x, self.adapter)
        else:
            out = self._lora(t, x, self.adapter)
        t.owner = outer
        return out

    def _base(self, t: Tape, x: Tensor) -> Tensor:
        rows, columns = self.spec.out_features, self.spec.in_features
        if not self.quant_type:
            return self._plain(t, x)
        if self.quant_type == "int8":
            return ops.matmul_8bit(t, x, rows, columns)
        dtype = x.dtype
        x = ops.to(t, x, self.compute)
        biased = self.bias is not None
        return ops.to(
            t,
            ops.matmul_4bit(t, x, rows, columns, self.dequantised, self.stored, biased=biased),
            dtype,
        )

    def _plain(self, t: Tape, x: Tensor) -> Tensor:
        rows, columns = self.spec.out_features, self.spec.in_features
        assert self.weight is not None
        if self.spec.cls == "Conv1D":
            assert self.bias is not None
            return ops.conv1d(t, x, self.weight, self.bias, rows, columns)
        product = ops.falcon_linear if self.spec.cls == "FalconLinear" else ops.linear
        return product(t, x, self.weight, self.bias, rows, columns)

    def _lora(self, t: Tape, x: Tensor, adapter: Adapter) -> Tensor:
        result = self._base(t, x)
        dtype = result.dtype
        x = ops.to(t, x, adapter.a.dtype)
        result = ops.add(t, result, self._delta(t, x, adapter))
        return ops.to(t, result, dtype)

    def _lora_quantised(self, t: Tape, x: Tensor, adapter: Adapter) -> Tensor:
        result = self._base(t, x)
        if self.quant_type != "int8":
            result = ops.copy(t, result)  # peft clones a 4-bit layer's output
        convert = t.autocast is None
        dtype = result.dtype
        if convert:
            x = ops.to(t, x, adapter.a.dtype)
        output = self._delta(t, x, adapter)
        if convert:
            output = ops.to(t, output, dtype)
        return ops.add(t, result, output)

    def _delta(self, t: Tape, x: Tensor, adapter: Adapter) -> Tensor:
        rows, columns = self.spec.out_features, self.spec.in_features
        return ops.scale(
            t,
            ops.linear(
                t,
                ops.linear(
                    t, ops.dropout(t, x, adapter.dropout), adapter.a, None, adapter.r, columns
                ),
                adapter.b,
                None,
                rows,
                adapter.r,
            ),
        )


@dataclass(slots=True)
class Parameter:
    """A bare parameter as peft left it: plain, or folded with its adapter at every forward."""

    spec: ParameterSpec
    owner: str
    weight: Param
    adapter: Adapter | None = None

    def factors(self, t: Tape) -> tuple[Tensor, Tensor]:
        """ParamWrapper.get_delta_factors: B and A per expert, in the weight's dtype."""
        assert self.adapter is not None
        left = ops.permuted(t, self.adapter.b)
        right = ops.view(t, self.adapter.a)
        return ops.to(t, left, self.weight.dtype), ops.to(t, right, self.weight.dtype)

    def fold(self, t: Tape, left: Tensor, right: Tensor) -> Tensor:
        """_LoraFactorsProxy.forward: all experts' weights once more, adapters included."""
        with t.no_autocast():
            return ops.fold_adapter(t, self.weight, left, right)

    def delta(self, t: Tape) -> Tensor:
        """Linear.get_delta_weight of a single matrix, in the weight's dtype."""
        assert self.adapter is not None
        rows, columns = self.spec.shape
        b = ops.autocast_weight(t, self.adapter.b)
        product = ops.linear(t, b, self.adapter.a, None, columns, self.adapter.r)
        assert product.numel == rows * columns
        return ops.to(t, ops.scale(t, product), self.weight.dtype)


@dataclass(slots=True)
class Norm:
    """A norm layer's parameters."""

    spec: NormSpec
    owner: str
    weight: Param
    bias: Param | None


@dataclass(slots=True)
class Embedding:
    """An embedding table; ``original`` is the one that a saved copy took the place of."""

    spec: EmbeddingSpec
    owner: str
    weight: Param
    original: Param


@dataclass(slots=True)
class Layer:
    """The modules of one decoder layer by name, standing for all identical ones.

    The modules outside the layers are one too, by full name.
    """

    name: str = ""
    kind: str = ""
    linears: dict[str, Linear] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    embeddings: dict[str, Embedding] = field(default_factory=dict)


class Run(NamedTuple):
    """Consecutive layers of these kinds, walked once for ``repeats`` repetitions of them."""

    kinds: tuple[str, ...]
    repeats: int


def runs_of(kinds: Sequence[str], lead: int = 1) -> list[Run]:
    """Fold the layers: the first alone, then repeating periods, what is between written out.

    Two repeated runs never touch: what one hands to the next would be counted differently on
    either side (see ``timeline.handed_on``).

    Args:
        kinds: The kind of every layer.
        lead: How many layers to write out first.
    """
    runs: list[Run] = []
    start = 0
    while start < len(kinds):
        length, repeats = 1, 1
        if start >= lead and runs[-1].repeats == 1:
            length, repeats = _period(kinds, start)
        runs.append(Run(tuple(kinds[start : start + length]), repeats))
        start += length * repeats
    return runs


def _period(kinds: Sequence[str], start: int) -> tuple[int, int]:
    """Length and repetitions of the period from ``start`` that saves the most layers."""
    best, saved = (1, 1), 0
    left = len(kinds) - start
    for length in range(1, left // 2 + 1):
        if saved >= left - length:
            break
        period = kinds[start : start + length]
        repeats = 1
        while kinds[start + repeats * length : start + (repeats + 1) * length] == period:
            repeats += 1
        if length * (repeats - 1) > saved:
            best, saved = (length, repeats), length * (repeats - 1)
    return best


def num_lead_layers(model: Model, job: Job) -> int:
    """Layers to write out before any is folded.

    Up to the first with something to train: later ones alone see a gradient's input. Without
    checkpointing those of adapters are followed by one of every kind: what that first layer leaves
    (attention weights, tables that no node of its keeps) is let go of once, by the next, and the
    tables are held by the first layer whose whole graph is there.
    """
    arch = model.architecture
    names = resolve_targets(arch, job) | set(job.modules_to_save)
    parameters = parameter_targets(arch, job)
    for index, kind in enumerate(model.dims.kinds):
        modules = arch.block_of(kind)
        if job.method == "full" or any(
            m.name in parameters or m.name.rsplit(".", 1)[-1] in names for m in modules
        ):
            if job.method == "full" or job.gradient_checkpointing:
                return index + 1
            later = model.dims.kinds[index + 1 :]
            return index + 1 + max((later.index(kind) + 1 for kind in set(later)), default=0)
    return 1


class Built:
    """A model on the tape: layers to run and everything that occupies memory before training.

    Args:
        t: The tape; weights are written to it as allocations.
        model: The model.
        job: The job, which decides dtypes, quantisation and adapters.
        runs: How the layers are folded; ``layers`` holds one list a run.
        from_checkpoint: Whether ``from_pretrained`` loads the weights, in the order of
            ``vramplan.loading``; otherwise they are made on the card in the order of registration.
    """

    def __init__(
        self, t: Tape, model: Model, job: Job, runs: list[Run], *, from_checkpoint: bool = False
    ) -> None:
        self.t = t
        # a model that is not quantised is loaded on the host and moved in order of registration
        self.from_checkpoint = from_checkpoint and job.quantised
        self.made_on_card = not from_checkpoint
        self.runs = runs
        self.job = job
        self.model = model
        arch = model.architecture
        self.targets = resolve_targets(arch, job)
        self.parameter_targets = parameter_targets(arch, job)
        if job.method != "full":
            _refuse_idle(model, job, self.targets, self.parameter_targets)
        self.params: list[Param] = []
        self._to_cast: list[Param] = []
        self.trainable: list[Param] = []
        self.storages: list[Storage] = []
        self.num_trainable = 0
        self.outside = Layer()
        self.layers: list[list[Layer]] = []
        self.final_norm: Norm | None = None
        if self.from_checkpoint:
            warm_up = Storage(t, warm_up_bytes(weights(model, job)), Kind.WEIGHTS, "warm-up")
            del warm_up
        self._load(arch)
        for nbytes in arch.model_buffers:
            self._hold(nbytes, Kind.WEIGHTS, "buffers")
        if self._to_cast:
            self._cast_to_fp32()
        self._add_adapters()
        t.phase = Phase.PREPARE
        t.empty_cache()  # Trainer.train begins with accelerate's free_memory

    def _load(self, arch: Architecture) -> None:
        """Every module: as registered, or as the checkpoint's tensors come, sorted by name."""
        parts: list[tuple[str, Callable[[Architecture], None]]] = [
            (arch.embedding.name, self._load_embedding),
            *((spec.name, self._loader_of(spec)) for spec in arch.outside),
            (f"{arch.layer_prefix}.0", self._load_layers),
        ]
        if arch.final_norm is not None:
            parts.append((arch.final_norm.name, self._load_final_norm))
        # a tied head shares the embedding's weight: behind all others
        name = "~" if self.model.dims.tied else checkpoint_name(self.model, arch.head.name)
        parts.append((name, self._load_head))
        order = list(range(len(parts)))
        if self.from_checkpoint:
            order.sort(key=lambda index: natural_key(parts[index][0]))
        cast: dict[int, list[Param]] = {}
        for index in order:
            before = len(self._to_cast)
            parts[index][1](arch)
            cast[index] = self._to_cast[before:]
        self._to_cast = [param for index in range(len(parts)) for param in cast[index]]

    def _load_embedding(self, arch: Architecture) -> None:
        self.embedding = self._embedding(arch.embedding)

    def _loader_of(self, spec: ModuleSpec) -> Callable[[Architecture], None]:
        return lambda _: self._add(self.outside, spec, "", 1)

    def _load_layers(self, arch: Architecture) -> None:
        start = 0
        for run in self.runs:
            self.layers.append(self._run(arch, run, start))
            start += len(run.kinds) * run.repeats

    def _load_final_norm(self, arch: Architecture) -> None:
        assert arch.final_norm is not None
        self.final_norm = self._norm(arch.final_norm, "", 1)

    def _load_head(self, arch: Architecture) -> None:
        self.head = self._head(arch.head)

    def _add_adapters(self) -> None:
        """get_peft_model, once the model is loaded and prepared.

        Adapters come to the device in the dtype of a layer that is not quantised; when all are
        there, peft makes them fp32 one after another.

        Source: peft 0.21 ``tuners/tuners_utils.py`` (``_move_adapter_to_device_of_base_layer``,
        ``cast_adapter_dtype``).
        """
        self.t.phase = Phase.PREPARE
        made = [(1, self._adapt(self.outside.linears.values(), 1))]
        for run, layers in zip(self.runs, self.layers, strict=True):
            with self.t.repeated(run.repeats):
                linears = [linear for layer in layers for linear in layer.linears.values()]
                params = self._adapt(linears, run.repeats)
                for layer in layers:
                    params += self._adapt_parameters(layer.parameters.values(), run.repeats)
                made.append((run.repeats, params))
        made.append((1, self._adapt([self.head], 1)))
        for repeats, params in made:
            with self.t.repeated(repeats):
                for param in params:
                    nbytes = round_block(param.numel * param.dtype.size)
                    if param.storage is not None and param.storage.nbytes != nbytes:
                        param.storage = Storage(self.t, nbytes, Kind.ADAPTERS, param.owner)

    def adapters(self) -> list[Adapter]:
        """Every layer's LoRA matrices."""
        layers = [self.outside, *(layer for layers in self.layers for layer in layers)]
        linears = [linear for layer in layers for linear in layer.linears.values()]
        return [x.adapter for x in (*linears, self.head) if x.adapter is not None]

    def _adapt(self, linears: Iterable[Linear], copies: int) -> list[Param]:
        """LoRA matrices for those that are targets; the two of each, in order."""
        r, made = self.job.lora_r, []
        for linear in linears:
            rows, columns = linear.spec.out_features, linear.spec.in_features
            if linear.spec.name.rsplit(".", 1)[-1] in self.targets:
                a = self._adapter_param(r * columns, r, linear.owner, copies)
                b = self._adapter_param(rows * r, rows, linear.owner, copies)
                linear.adapter = Adapter(a, b, r, self.job.lora_dropout)
                made += [a, b]
        return made

    def _adapt_parameters(self, parameters: Iterable[Parameter], copies: int) -> list[Param]:
        """The same for bare parameters: one pair of matrices for all experts together."""
        made = []
        for parameter in parameters:
            spec = parameter.spec
            if spec.name in self.parameter_targets:
                rows, columns = spec.shape[-2:]
                r = self.job.lora_r * len(spec.targets) * spec.num_experts
                a = self._adapter_param(r * columns, r, parameter.owner, copies)
                b = self._adapter_param(rows * r, rows, parameter.owner, copies)
                parameter.adapter = Adapter(a, b, r, 0.0)
                made += [a, b]
        return made

    def _cast_to_fp32(self) -> None:
        """prepare_model_for_kbit_training: one parameter after another, then empty_cache."""
        self.t.phase = Phase.PREPARE
        for copies, params in groupby(self._to_cast, key=lambda param: param.copies):
            with self.t.repeated(copies):
                for param in params:
                    nbytes = round_block(param.numel * param.dtype.size)
                    param.storage = Storage(self.t, nbytes, Kind.WEIGHTS, param.owner)
        self.t.empty_cache()

    def cast_biases(self) -> None:
        """What the first forward does for good: a 4-bit layer's bias takes the compute dtype.

        Source: bitsandbytes 0.50.2 ``nn/modules.py`` (``Linear4bit.forward``).
        """
        for layers, run in zip(self.layers, self.runs, strict=True):
            with self.t.repeated(run.repeats):
                for linear in (x for layer in layers for x in layer.linears.values()):
                    bias = linear.bias
                    four_bit = linear.quant_type not in ("", "int8")
                    if four_bit and bias is not None and bias.dtype is not linear.compute:
                        nbytes = round_block(bias.numel * linear.compute.size)
                        bias.storage = Storage(self.t, nbytes, Kind.WEIGHTS, bias.owner)
                        bias.dtype = linear.compute

    # -- building blocks ----------------------------------------------------------------------

    def _hold(self, nbytes: int, kind: Kind, owner: str) -> Storage:
        storage = Storage(self.t, round_block(nbytes), kind, owner)
        self.storages.append(storage)
        return storage

    def _param(
        self,
        numel: int,
        rows: int,
        dtype: Dtype,
        owner: str,
        copies: int,
        *,
        kind: Kind = Kind.WEIGHTS,
        trainable: bool | None = None,
    ) -> Param:
        if trainable is None:
            trainable = self.job.method == "full"
        loaded = self.job.weight_dtype
        cast = kind is Kind.WEIGHTS and dtype is not loaded
        moved = kind is Kind.ADAPTERS and not self.job.quantised  # cast by peft when all are there
        size = loaded.size if cast or moved else dtype.size
        storage = Storage(self.t, round_block(numel * size), kind, owner)
        param = Param(storage, numel, dtype, trainable, owner, copies)
        if cast:
            self._to_cast.append(param)
        param.rows = rows
        self.params.append(param)
        if trainable:
            self.trainable.append(param)
            self.num_trainable += numel * copies
        return param

    @property
    def plain_dtype(self) -> Dtype:
        """Dtype of unquantised base parameters once the model is prepared."""
        if self.job.quantised and self.job.prepare_kbit:
            return FP32
        return self.job.weight_dtype

    def _saved_copy(self, name: str) -> bool:
        return name.rsplit(".", 1)[-1] in self.job.modules_to_save

    def _embedding(self, spec: EmbeddingSpec) -> Embedding:
        numel = spec.num_parameters
        weight = original = self._param(numel, spec.num_embeddings, self.plain_dtype, spec.name, 1)
        saved = self._saved_copy(spec.name)
        if saved:
            weight = self._adapter_param(numel, spec.num_embeddings, spec.name, 1, saved=True)
        for nbytes in spec.buffers * (1 + saved):  # the copy is one of the whole module
            self._hold(nbytes, Kind.WEIGHTS, "buffers")
        weight.embedding = True
        return Embedding(spec, spec.name, weight, original)

    def _norm(self, spec: NormSpec, prefix: str, copies: int) -> Norm:
        owner = prefix + spec.name
        saved = self._saved_copy(spec.name)
        names = ("weight", "bias") if spec.bias else ("weight",)
        made = [self._param(spec.size, 0, self.plain_dtype, owner, copies) for _ in names]
        if saved:
            made = [self._adapter_param(spec.size, 0, owner, copies, saved=True) for _ in names]
        return Norm(spec, owner, made[0], made[1] if spec.bias else None)

    def _adapter_param(
        self, numel: int, rows: int, owner: str, copies: int, *, saved: bool = False
    ) -> Param:
        """A LoRA matrix (fp32 in the end), or a modules_to_save copy (in the original's dtype)."""
        return self._param(
            numel,
            rows,
            self.plain_dtype if saved else self.job.adapter_dtype,
            owner,
            copies,
            kind=Kind.ADAPTERS,
            trainable=True,
        )

    def _linear(self, spec: LinearSpec, prefix: str, copies: int) -> Linear:
        job = self.job
        owner = prefix + spec.name
        rows, columns = spec.out_features, spec.in_features
        if job.quantised and spec.quantisable:
            layer = self._quantised(spec, owner, copies)
        else:
            weight = self._param(rows * columns, rows, self.plain_dtype, owner, copies)
            bias = self._param(rows, 0, self.plain_dtype, owner, copies) if spec.bias else None
            layer = Linear(spec, owner, weight, bias)
        return layer

    def _parameter(self, spec: ParameterSpec, prefix: str, copies: int) -> Parameter:
        owner = prefix + spec.name
        experts = spec.num_experts
        rows, _columns = spec.shape[-2:] if len(spec.shape) > 1 else (0, spec.shape[0])
        first = experts * rows  # as a matrix of all experts' rows
        weight = self._param(spec.num_parameters, first, self.plain_dtype, owner, copies)
        weight.matrices = experts
        return Parameter(spec, owner, weight)

    def _quantised(self, spec: LinearSpec, owner: str, copies: int) -> Linear:
        job = self.job
        rows, columns = spec.out_features, spec.in_features
        fmt = QUANT_FORMATS[job.quant_type]
        # the whole weight comes to the device first and goes when it is quantised
        whole = rows * columns * job.weight_dtype.size
        passing = [Storage(self.t, round_block(whole), Kind.WEIGHTS, owner)]
        if self.from_checkpoint and spec.cls == "Conv1D":  # copied into nn.Linear's order
            passing.append(Storage(self.t, round_block(whole), Kind.WEIGHTS, owner))
        elif self.from_checkpoint and not fmt.block:  # LLM.int8: to the host and back in fp16
            half = round_block(rows * columns * FP16.size)
            passing.append(Storage(self.t, half, Kind.WEIGHTS, owner))
        scales = round_block(-(-rows * columns // fmt.block) * 4) if fmt.block else 0
        nested = fmt.nested and job.double_quant
        if nested:  # fp32 scales, then their distance from the mean, then those quantised
            passing.append(Storage(self.t, scales, Kind.WEIGHTS, owner))
        for name, nbytes in fmt.parts(rows, columns, job.double_quant):
            if nested and name == "absmax":
                passing.append(Storage(self.t, scales, Kind.WEIGHTS, owner))
            self._hold(nbytes, Kind.WEIGHTS, owner)
        del passing
        bias = self._param(rows, 0, self.plain_dtype, owner, copies) if spec.bias else None
        layer = Linear(spec, owner, None, bias, job.quant_type, job.compute_dtype, job.weight_dtype)
        if fmt.block:
            layer.dequantised = dequantised_bytes(job, rows, columns)
        return layer

    def _run(self, arch: Architecture, run: Run, start: int) -> list[Layer]:
        layers = []
        with self.t.repeated(run.repeats):  # loaded layer after layer
            for index, kind in enumerate(run.kinds, start):
                position = "*" if run.repeats > 1 else str(index)
                layers.append(self._layer(arch, kind, position, run.repeats))
        return layers

    def _layer(self, arch: Architecture, kind: str, position: str, copies: int) -> Layer:
        prefix = f"{arch.layer_prefix}.{position}."
        layer = Layer(prefix.removesuffix("."), kind)
        specs = arch.block_of(kind)
        ordered = (
            sorted(specs, key=lambda s: natural_key(checkpoint_name(self.model, s.name)))
            if self.from_checkpoint
            else specs
        )
        for spec in ordered:
            self._add(layer, spec, prefix, copies)
        # peft meets them as registered
        names = [spec.name for spec in specs if spec.name in layer.linears]
        layer.linears = {name: layer.linears[name] for name in names}
        for nbytes in arch.layer_buffers:
            self._hold(nbytes, Kind.WEIGHTS, prefix + "buffers")
        return layer

    def _add(self, layer: Layer, spec: ModuleSpec, prefix: str, copies: int) -> None:
        if isinstance(spec, LinearSpec):
            layer.linears[spec.name] = self._linear(spec, prefix, copies)
        elif isinstance(spec, EmbeddingSpec):
            layer.embeddings[spec.name] = self._embedding(spec)
        elif isinstance(spec, ParameterSpec):
            layer.parameters[spec.name] = self._parameter(spec, prefix, copies)
        else:
            layer.norms[spec.name] = self._norm(spec, prefix, copies)

    def _head(self, spec: LinearSpec) -> Linear:
        """The output head: never quantised, never in all-linear, maybe tied.

        Peft's copy of one of two tied modules is its alone: the other keeps the frozen table.

        Source: peft 0.21 ``utils/other.py`` (``ModulesToSaveWrapper``; ``ensure_weight_tying`` is
        off by default).
        """
        rows, columns = spec.out_features, spec.in_features
        saved = self._saved_copy(spec.name)
        if self.model.dims.tied and self.made_on_card:  # with a weight of its own until it is tied
            untied = Storage(
                self.t, round_block(rows * columns * self.plain_dtype.size), Kind.WEIGHTS, spec.name
            )
            del untied
        if self.model.dims.tied:
            weight = self.embedding.original
        else:
            weight = self._param(rows * columns, rows, self.plain_dtype, spec.name, 1)
        if saved:
            weight = self._adapter_param(rows * columns, rows, spec.name, 1, saved=True)
        bias = None
        if spec.bias:
            bias = self._param(rows, 0, self.plain_dtype, spec.name, 1)
            if saved:
                bias = self._adapter_param(rows, 0, spec.name, 1, saved=True)
        return Linear(spec, spec.name, weight, bias)


def resolve_targets(arch: Architecture, job: Job) -> frozenset[str]:
    """The last path components of the layers that get an adapter.

    Raises:
        UsageError: If a target or a module to save is not in the model.
    """
    if job.method == "full":
        return frozenset()
    replaced = {name for spec in arch.parameters() for name in spec.targets}
    linear = set(arch.linear_names()) - replaced
    head = arch.head.name.rsplit(".", 1)[-1]
    known = linear | {head}
    savable = known | {arch.embedding.name.rsplit(".", 1)[-1]}
    norm = () if arch.final_norm is None else (arch.final_norm,)
    savable |= {
        m.name.rsplit(".", 1)[-1]
        for m in (*arch.modules(), *arch.outside, *norm)
        if not isinstance(m, ParameterSpec)
    }
    savable -= linear  # a layer that is quantised or adapted cannot be saved whole
    for name in job.modules_to_save:
        if name not in savable:
            raise UsageError(
                f"--modules-to-save {name!r} is not in this model; it has "
                + ", ".join(sorted(savable))
            )
    if job.target_modules == ALL_LINEAR:
        return frozenset(linear)
    assert not isinstance(job.target_modules, str)
    for name in job.target_modules:
        if name not in known | replaced:
            raise UsageError(
                f"--target-modules {name!r} is not a linear layer of this model; it has "
                + ", ".join(sorted(known | replaced))
            )
    return frozenset(job.target_modules) - replaced


def _refuse_idle(model: Model, job: Job, targets: frozenset[str], bare: frozenset[str]) -> None:
    """Refuse adapters that no layer of the model has a place for.

    Raises:
        UsageError: If there is none.
    """
    arch = model.architecture
    blocks = (arch.block_of(kind) for kind in set(model.dims.kinds))
    modules = [*arch.outside, arch.head, *(module for block in blocks for module in block)]
    for module in modules:
        linear = isinstance(module, LinearSpec) and module.name.rsplit(".", 1)[-1] in targets
        if linear or module.name in bare:
            return
    raise UsageError(
        f"--target-modules {', '.join(job.target_modules)}: no layer of {model.name} takes an "
        "adapter by that name (peft adapts a model's fused experts instead, where it has some)"
    )


def parameter_targets(arch: Architecture, job: Job) -> frozenset[str]:
    """Names of the bare parameters that get an adapter, instead of the layers they replaced.

    Raises:
        UsageError: If peft could not adapt them.
    """
    if job.method == "full":
        return frozenset()
    every = job.target_modules == ALL_LINEAR
    found = set()
    for spec in arch.parameters():
        asked = spec.targets if every else set(spec.targets) & set(job.target_modules)
        if not asked:
            continue
        if len(asked) < len(spec.targets):
            raise UsageError(
                f"--target-modules: peft adapts {' and '.join(spec.targets)} only together, "
                f"because transformers fuses them into {spec.name}"
            )
        if job.lora_dropout:
            raise UsageError(
                f"--lora-dropout {job.lora_dropout}: peft cannot apply dropout to {spec.name}, "
                f"which {'all-linear' if every else ', '.join(spec.targets)} adapts in this model"
            )
        found.add(spec.name)
    return frozenset(found)


FUSED_MAX_TOKENS = 8


def dequantised_bytes(job: Job, rows: int, columns: int) -> tuple[int, ...]:
    """What a 4-bit layer's forward dequantises into: absmax twice if nested, and the weight."""
    if job.tokens <= FUSED_MAX_TOKENS:
        return ()
    blocks = -(-rows * columns // 64) * 4
    nested = (blocks, blocks) if job.double_quant else ()
    return (*nested, rows * columns * job.compute_dtype.size)
