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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vramplan import ops
from vramplan.errors import UsageError
from vramplan.formats import FP32, QUANT_FORMATS, Dtype
from vramplan.job import ALL_LINEAR, Job
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
    """An embedding table."""

    spec: EmbeddingSpec
    owner: str
    weight: Param


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
    """Layers up to the first with something to train: later ones alone see a gradient's input."""
    arch = model.architecture
    names = resolve_targets(arch, job) | set(job.modules_to_save)
    parameters = parameter_targets(arch, job)
    for index, kind in enumerate(model.dims.kinds):
        modules = arch.block_of(kind)
        if job.method == "full" or any(
            m.name in parameters or m.name.rsplit(".", 1)[-1] in names for m in modules
        ):
            return index + 1
    return 1


class Built:
    """A model on the tape: layers to run and everything that occupies memory before training.

    Args:
        t: The tape; weights are written to it as allocations.
        model: The model.
        job: The job, which decides dtypes, quantisation and adapters.
        runs: How the layers are folded; ``layers`` holds one list a run.
    """

    def __init__(self, t: Tape, model: Model, job: Job, runs: list[Run]) -> None:
        self.t = t
        self.runs = runs
        self.job = job
        self.model = model
        arch = model.architecture
        self.targets = resolve_targets(arch, job)
        self.parameter_targets = parameter_targets(arch, job)
        self.params: list[Param] = []
        self._to_cast: list[Param] = []
        self.trainable: list[Param] = []
        self.storages: list[Storage] = []
        self.num_trainable = 0
        self.embedding = self._embedding(arch.embedding)
        self.outside = Layer()
        for spec in arch.outside:
            self._add(self.outside, spec, "", 1)
        self.layers: list[list[Layer]] = []
        start = 0
        for run in runs:
            self.layers.append(self._run(arch, run, start))
            start += len(run.kinds) * run.repeats
        self.final_norm = self._norm(arch.final_norm, "", 1) if arch.final_norm else None
        self.head = self._head(arch.head)
        for nbytes in arch.model_buffers:
            self._hold(nbytes, Kind.WEIGHTS, "buffers")
        if self._to_cast:
            self._cast_to_fp32()
        self._add_adapters()

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
        """prepare_model_for_kbit_training: one parameter after another, then empty_cache.

        The small parameters of the folded layers are fp32 from the start here; they are far from
        deciding anything.
        """
        self.t.phase = Phase.PREPARE
        for param in self._to_cast:
            param.storage = Storage(
                self.t, round_block(param.numel * param.dtype.size), Kind.WEIGHTS, param.owner
            )
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
        cast = kind is Kind.WEIGHTS and dtype is not loaded and copies == 1
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
        weight = self._param(numel, spec.num_embeddings, self.plain_dtype, spec.name, 1)
        saved = self._saved_copy(spec.name)
        if saved:
            weight = self._adapter_param(numel, spec.num_embeddings, spec.name, 1, saved=True)
        for nbytes in spec.buffers * (1 + saved):  # the copy is one of the whole module
            self._hold(nbytes, Kind.WEIGHTS, "buffers")
        weight.embedding = True
        return Embedding(spec, spec.name, weight)

    def _norm(self, spec: NormSpec, prefix: str, copies: int) -> Norm:
        owner = prefix + spec.name
        saved = self._saved_copy(spec.name)
        names = ("weight", "bias") if spec.bias else ("weight",)
        made = [self._param(spec.size, 1, self.plain_dtype, owner, copies) for _ in names]
        if saved:
            made = [self._adapter_param(spec.size, 1, owner, copies, saved=True) for _ in names]
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
            bias = self._param(rows, 1, self.plain_dtype, owner, copies) if spec.bias else None
            layer = Linear(spec, owner, weight, bias)
        return layer

    def _parameter(self, spec: ParameterSpec, prefix: str, copies: int) -> Parameter:
        owner = prefix + spec.name
        experts = spec.num_experts
        rows, _columns = spec.shape[-2:] if len(spec.shape) > 1 else (1, spec.shape[0])
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
        scales = round_block(-(-rows * columns // fmt.block) * 4) if fmt.block else 0
        nested = fmt.nested and job.double_quant
        if nested:  # fp32 scales, then their distance from the mean, then those quantised
            passing.append(Storage(self.t, scales, Kind.WEIGHTS, owner))
        for name, nbytes in fmt.parts(rows, columns, job.double_quant):
            if nested and name == "absmax":
                passing.append(Storage(self.t, scales, Kind.WEIGHTS, owner))
            self._hold(nbytes, Kind.WEIGHTS, owner)
        del passing
        bias = self._param(rows, 1, self.plain_dtype, owner, copies) if spec.bias else None
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
        for spec in arch.block_of(kind):
            self._add(layer, spec, prefix, copies)
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
        """The output head: never quantised, never in all-linear, maybe tied."""
        rows, columns = spec.out_features, spec.in_features
        saved = self._saved_copy(spec.name)
        if self.model.dims.tied and not saved:
            weight = self.embedding.weight
        else:
            weight = (
                self.embedding.weight
                if self.model.dims.tied
                else self._param(rows * columns, rows, self.plain_dtype, spec.name, 1)
            )
            if saved:
                weight = self._adapter_param(rows * columns, rows, spec.name, 1, saved=True)
        bias = None
        if spec.bias:
            bias = self._param(rows, 1, self.plain_dtype, spec.name, 1)
            if saved:
                bias = self._adapter_param(rows, 1, spec.name, 1, saved=True)
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
