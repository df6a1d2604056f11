"""What a model is made of: dimensions read from config.json, and its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from vramplan.formats import BF16, Dtype


@dataclass(frozen=True, slots=True)
class Dims:
    """The dimensions that decide memory, under transformers' names; sizes in elements.

    Attributes:
        head_dim: Width of one attention head.
        rotary_dim: Rotated part of a head; 0 where positions are not rotary.
        tied: Whether input embedding and output head are one parameter.
        sliding_window: Attention span in tokens, None for full attention.
        num_sliding_layers: Layers that use the window.
        num_experts: Experts of a layer; 0 in a dense model.
        num_experts_per_tok: Experts that every token is sent to.
        moe_intermediate_size: Width of one expert.
        shared_intermediate_size: Width of the expert that every token goes through.
        norm_topk: Whether the chosen experts' weights are made to sum to 1.
        attn_logit_softcapping: Cap of the attention scores (tanh), None for none.
        final_logit_softcapping: Cap of the logits (tanh), None for none.
        qk_layernorm: Whether queries and keys are normalised before they are rotated, where the
            config says so.
        layer_kinds: Kind of each layer where a family has several (``layer_types``); empty: one.
        embedding_width: Width of the token table where it is not hidden_size, else 0.
        norm_before: Whether a block's norms come before what they feed, not after.
        final_norm: Whether there is a norm after the last layer.
        residual_after_norm: Whether the residual branches off behind the norm.
        upcast_attention: Whether eager attention works out its scores in fp32.
        alibi: Whether positions are a bias on the attention scores.
        grouped_qkv: Whether the fused query_key_value holds groups (q, ..., q, k, v).
        num_parallel_norms: Norms that feed attention and MLP where they run side by side.
        dtype: dtype of the checkpoint (``torch_dtype`` of the config).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    hidden_act: str
    tied: bool
    rotary_dim: int = 0
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    norm_topk: bool = False
    layer_kinds: tuple[str, ...] = ()
    parallel_residual: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    qk_layernorm: bool = False
    embedding_width: int = 0
    norm_before: bool = True
    final_norm: bool = True
    residual_after_norm: bool = False
    upcast_attention: bool = False
    alibi: bool = False
    grouped_qkv: bool = False
    num_parallel_norms: int = 1
    dtype: Dtype = BF16

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer, "" where all are alike."""
        return self.layer_kinds or ("",) * self.num_layers


class LinearSpec(NamedTuple):
    """An ``nn.Linear``: weight [out_features, in_features] and maybe a bias.

    ``cls`` is the class of the module: ``Conv1D`` holds its weight transposed, ``FalconLinear`` is
    a subclass that bitsandbytes leaves alone.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    cls: str = "Linear"

    @property
    def quantisable(self) -> bool:
        """Whether bitsandbytes replaces it: nn.Linear and Conv1D, no other subclass."""
        return self.cls in ("Linear", "Conv1D")

    @property
    def num_parameters(self) -> int:
        """Elements of weight and bias."""
        return self.in_features * self.out_features + (self.out_features if self.bias else 0)


class ParameterSpec(NamedTuple):
    """A bare ``nn.Parameter``: fused experts, routers, sinks. bitsandbytes never quantises it.

    Attributes:
        name: Its path, that of the module for a module's only weight.
        shape: Its dimensions; three for a stack of experts' matrices.
        targets: Names of the linear layers that it replaced. peft adapts it for these, and for
            all-linear, with the rank of all of them together.
    """

    name: str
    shape: tuple[int, ...]
    targets: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def num_experts(self) -> int:
        """How many matrices are stacked."""
        return self.shape[0] if len(self.shape) == 3 else 1


class NormSpec(NamedTuple):
    """A norm layer: one weight of ``size`` elements, and a bias if it is a LayerNorm."""

    name: str
    size: int
    bias: bool = False

    @property
    def num_parameters(self) -> int:
        """Elements of weight and bias."""
        return self.size * (2 if self.bias else 1)


class EmbeddingSpec(NamedTuple):
    """An ``nn.Embedding``: a table [num_embeddings, width], and bytes of each buffer beside it."""

    name: str
    num_embeddings: int
    width: int
    buffers: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Elements of the table."""
        return self.num_embeddings * self.width


ModuleSpec = LinearSpec | ParameterSpec | NormSpec | EmbeddingSpec


@dataclass(frozen=True, slots=True)
class Architecture:
    """Every module of a causal language model and where it sits.

    Attributes:
        embedding: Input table.
        block: Modules of one decoder layer, names relative to it, in order of registration.
        blocks: Modules of the layers of a kind, where those of ``block`` are not theirs.
        final_norm: Norm before the head, None where the model has none.
        head: Output head; shares the embedding's table when tied.
        layer_prefix: Path of the layers, e.g. ``model.layers``.
        layer_buffers: Bytes of each buffer of one layer.
        model_buffers: Bytes of each buffer outside the layers.
        outside: Further modules outside the layers, by full name (position tables, projections).
    """

    embedding: EmbeddingSpec
    block: tuple[ModuleSpec, ...]
    final_norm: NormSpec | None
    head: LinearSpec
    layer_prefix: str
    layer_buffers: tuple[int, ...] = ()
    model_buffers: tuple[int, ...] = ()
    outside: tuple[ModuleSpec, ...] = ()
    blocks: Mapping[str, tuple[ModuleSpec, ...]] = field(default_factory=dict)

    def block_of(self, kind: str) -> tuple[ModuleSpec, ...]:
        """Modules of a layer of that kind."""
        return self.blocks.get(kind, self.block)

    def modules(self) -> tuple[ModuleSpec, ...]:
        """Modules of one layer of every kind."""
        return (*self.block, *(module for block in self.blocks.values() for module in block))

    def num_parameters(self, dims: Dims) -> int:
        """Parameters of the model; a tied head is counted once."""
        head = self.head.num_parameters
        if dims.tied:
            head -= self.head.in_features * self.head.out_features
        layers = sum(
            count * sum(module.num_parameters for module in self.block_of(kind))
            for kind, count in Counter(dims.kinds).items()
        )
        outside = sum(module.num_parameters for module in self.outside)
        norm = self.final_norm.num_parameters if self.final_norm is not None else 0
        return self.embedding.num_parameters + layers + outside + norm + head

    def parameters(self) -> tuple[ParameterSpec, ...]:
        """Every bare parameter of a layer of any kind."""
        return tuple(m for m in self.modules() if isinstance(m, ParameterSpec))

    def linear_names(self) -> tuple[str, ...]:
        """Last path component of every linear layer but the head."""
        return tuple(
            m.name.rsplit(".", 1)[-1]
            for m in (*self.modules(), *self.outside)
            if isinstance(m, LinearSpec)
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A model to plan for.

    Attributes:
        name: Slug, path or hub id it was asked for by.
        family: ``model_type`` of its config.
        dims: Its dimensions.
        architecture: Its modules.
        num_parameters: Parameters, tied ones once.
        repository: Hub repository, if known.
        revision: Commit of the repository, if known.
        config: The config.json facts it was read from.
        warnings: What a user should know about how the config was read.
    """

    name: str
    family: str
    dims: Dims
    architecture: Architecture
    num_parameters: int
    repository: str | None = None
    revision: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    warnings: Sequence[str] = ()

    @property
    def checkpoint_dtype(self) -> Dtype:
        """Dtype of the checkpoint on disk."""
        return self.dims.dtype

    @property
    def dimensions(self) -> dict[str, int | None]:
        """The sizes that describe it, under transformers' names."""
        return {
            "num_hidden_layers": self.dims.num_layers,
            "hidden_size": self.dims.hidden_size,
            "vocab_size": self.dims.vocab_size,
            "max_position_embeddings": self.dims.max_positions,
        }


@dataclass(frozen=True, slots=True)
class TracedModel:
    """What a trace knows of a model of any family: no modules, no dimensions but a few.

    Attributes:
        name: Slug, path or hub id it was asked for by.
        family: ``model_type`` of its config.
        num_parameters: Parameters, tied ones once.
        attention: The attention implementation that transformers chose for the job.
        dimensions: Its sizes; None where the config has none.
        checkpoint_dtype: Dtype of the checkpoint on disk.
        repository: Hub repository, if known.
        revision: Commit of the repository, if known.
        warnings: What a user should know about how it was traced.
    """

    name: str
    family: str
    num_parameters: int
    attention: str
    dimensions: Mapping[str, int | None]
    checkpoint_dtype: Dtype = BF16
    repository: str | None = None
    revision: str | None = None
    warnings: Sequence[str] = ()
