"""Pieces that block programs share: norms, rotary positions, attention.

Every function mirrors one of transformers' (5.17), variable by variable: what stays in a local
variable here stays alive there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from vramplan import ops
from vramplan.config import ConfigReader
from vramplan.formats import BOOL, FP32, Dtype
from vramplan.job import Job
from vramplan.layers import Embedding, Layer, Linear, Norm
from vramplan.model import Architecture, Dims
from vramplan.tape import Node, Tape, Tensor
from vramplan.timeline import Kind


@dataclass(slots=True)
class Shared:
    """What the model hands to every layer of a kind: rotary tables and mask, None for none."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None


@dataclass(slots=True)
class Env:
    """What a block sees besides its input: shapes and the tensors shared by all layers.

    Attributes:
        tokens: Tokens of a micro-batch, batch times length.
        cos: Rotary table [1, length, rotary_dim]; None where the model has none.
        mask: Attention mask tensor, None where the kernel masks by itself.
        alibi: Position bias of the attention scores, None where the model has none.
        capability: Compute capability of the card, which decides sdpa's kernel.
        shared: Tables and mask of each kind of layer, where a family has several; ``use`` puts
            those of the layer at work into cos, sin and mask.
        kept: What the model's loop keeps of a block's result until the next block returns.
    """

    job: Job
    dims: Dims
    attention: str
    batch: int
    length: int
    tokens: int
    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    alibi: Tensor | None = None
    kept: Tensor | None = None
    capability: tuple[int, int] = (9, 0)
    shared: dict[str, Shared] = field(default_factory=dict)

    def use(self, kind: str) -> None:
        """A layer of that kind runs next."""
        if kind in self.shared:
            mine = self.shared[kind]
            self.cos, self.sin, self.mask = mine.cos, mine.sin, mine.mask

    def keep(self, kinds: Collection[str], *, masks: bool = True) -> None:
        """Let go of what no layer of these kinds is handed.

        Args:
            kinds: The kinds still to come.
            masks: Whether their masks are still needed too.
        """
        if self.shared or not kinds or not masks:
            self.cos = self.sin = self.mask = self.alibi = None
        self.shared = {
            kind: Shared(mine.cos, mine.sin, mine.mask if masks else None)
            for kind, mine in self.shared.items()
            if kind in kinds
        }


def embed_tokens(t: Tape, table: Embedding, env: Env) -> Tensor:
    """torch.nn.Embedding.forward."""
    return ops.embedding(t, table.weight, env.tokens, table.spec.width)


def lm_head(t: Tape, head: Linear, hidden: Tensor, env: Env) -> Tensor:
    """The output head alone."""
    return head(t, hidden)


def enter(t: Tape, outside: Layer, embeds: Tensor, env: Env) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What most models do with the embeddings before the first layer: dropout, if at all."""
    return ops.dropout(t, embeds, env.dims.embedding_dropout), (embeds,)


def leave(t: Tape, outside: Layer, hidden: Tensor, env: Env) -> Tensor:
    """What most models do behind the final norm: nothing."""
    return hidden


@dataclass(frozen=True, slots=True)
class Family:
    """One model family: everything the estimator knows about it.

    Attributes:
        model_type: ``model_type`` of its config.json.
        read: Dimensions from the config's values.
        architecture: Modules from dimensions.
        block: The decoder layer's program.
        norm: The program of its norms.
        prepare: What the model computes once before its layers (position tables).
        attentions: ``attn_implementation`` values the family supports, the default first.
        source: File and version of the code it models.
        embed: The program of the input embedding.
        head: What the ForCausalLM does from the last hidden states to the logits.
        enter: From the token embeddings to the first layer's input, and what else the model's
            forward keeps in locals until it returns.
        leave: From the final norm's output to the head's input.
        positions: Whether the model counts positions with ``torch.arange``.
    """

    model_type: str
    read: Callable[[ConfigReader], Dims]
    architecture: Callable[[Dims], Architecture]
    block: Callable[[Tape, Layer, Tensor, Env], Tensor]
    norm: Callable[[Tape, Norm, Tensor, Env], Tensor]
    prepare: Callable[[Tape, Tensor, Env], None]
    attentions: tuple[str, ...]
    source: str
    embed: Callable[[Tape, Embedding, Env], Tensor] = embed_tokens
    head: Callable[[Tape, Linear, Tensor, Env], Tensor] = lm_head
    enter: Callable[[Tape, Layer, Tensor, Env], tuple[Tensor, tuple[Tensor, ...]]] = enter
    leave: Callable[[Tape, Layer, Tensor, Env], Tensor] = leave
    positions: bool = True


def rms_norm(t: Tape, norm: Norm, x: Tensor, env: Env) -> Tensor:
    """LlamaRMSNorm.forward, over hidden states or over each head."""
    outer, t.owner = t.owner, norm.owner
    dtype = x.dtype
    h = ops.to(t, x, FP32)
    variance = ops.mean(t, ops.pow_scalar(t, h), x.numel // norm.spec.size)
    h = ops.mul(t, h, ops.rsqrt(t, ops.add_scalar(t, variance)))
    out = ops.mul(t, norm.weight, ops.to(t, h, dtype))
    t.owner = outer
    return out


def layer_norm(t: Tape, norm: Norm, x: Tensor, env: Env, *, contiguous: bool = True) -> Tensor:
    """torch.nn.LayerNorm.forward, over hidden states or over each head."""
    outer, t.owner = t.owner, norm.owner
    groups = x.numel // norm.spec.size
    out = ops.layer_norm(t, x, norm.weight, norm.bias, groups, contiguous=contiguous)
    t.owner = outer
    return out


def dropout(t: Tape, x: Tensor, p: float, name: str) -> Tensor:
    """nn.Dropout, a module of that name in the one at work."""
    outer, t.owner = t.owner, f"{t.owner}.{name}"
    out = ops.dropout(t, x, p)
    t.owner = outer
    return out


def dropout_add(t: Tape, x: Tensor, residual: Tensor, p: float) -> Tensor:
    """dropout_add of Bloom and Falcon."""
    out = ops.dropout(t, x, p)
    return ops.add(t, residual, out)


def activate(t: Tape, x: Tensor, env: Env, name: str) -> Tensor:
    """The activation function, a module of that name in the one at work."""
    outer, t.owner = t.owner, f"{t.owner}.{name}"
    out = ops.activation(env.dims.hidden_act)(t, x)
    t.owner = outer
    return out


def rotary_tables(t: Tape, embeds: Tensor, env: Env) -> None:
    """LlamaRotaryEmbedding.forward: cos and sin in the hidden states' dtype."""
    env.cos, env.sin = cos_sin(t, env, embeds.dtype)


def cos_sin(t: Tape, env: Env, dtype: Dtype) -> tuple[Tensor, Tensor]:
    """The rotary tables [1, length, rotary_dim]."""
    outer, t.owner = t.owner, f"{t.owner}.rotary_emb"
    width = env.dims.rotary_dim
    half = t.new(env.length * width // 2, FP32)
    t.use("cublas")
    emb = t.new(env.length * width, FP32)

    cos = ops.scale(t, t.new(env.length * width, FP32))  # emb.cos() * attention_scaling
    sin = ops.scale(t, t.new(env.length * width, FP32))
    del half, emb
    tables = ops.to(t, cos, dtype), ops.to(t, sin, dtype)
    t.owner = outer
    return tables


def rotate_half(t: Tape, x: Tensor) -> Tensor:
    """``torch.cat((-x2, x1), dim=-1)``."""
    x1 = ops.slice_(t, x, x.numel // 2)
    x2 = ops.slice_(t, x, x.numel - x.numel // 2)
    return ops.cat(t, (ops.neg(t, x2), x1))


def rotate(t: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(x * cos) + (rotate_half(x) * sin)``."""
    return ops.add(t, ops.mul(t, x, cos), ops.mul(t, rotate_half(t, x), sin))


def split_heads(t: Tape, x: Tensor, env: Env, *, value: bool = False) -> Tensor:
    """``x.view(hidden_shape).transpose(1, 2)``: [batch, heads, length, head_dim].

    Slices, plain products and repeated heads hand gradients back in that memory order, which takes
    a copy to view as x again. Rotation slices queries and keys; a fused kernel's gradient of what
    was not rotated (``value``) lies in memory as that does.
    """
    several = x.numel > env.tokens * env.dims.head_dim
    grouped = env.dims.num_heads > env.dims.num_kv_heads
    fused = env.attention != "eager" and not (
        env.attention == "sdpa" and grouped and (env.mask is not None or env.capability < (8, 0))
    )
    return ops.view(t, x, copied=several and not (value and fused))


def rotary_parts(t: Tape, x: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """``x[..., :rotary_dim]`` and ``x[..., rotary_dim:]``, views of every head."""
    rotated = x.numel // env.dims.head_dim * env.dims.rotary_dim
    return ops.slice_(t, x, rotated), ops.slice_(t, x, x.numel - rotated)


def rotate_both(t: Tape, q: Tensor, k: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb of the Llama-like models."""
    assert env.cos is not None and env.sin is not None
    return rotate(t, q, env.cos, env.sin), rotate(t, k, env.cos, env.sin)


def repeat_kv(t: Tape, x: Tensor, groups: int, *, heads: int = 0) -> Tensor:
    """Keys or values repeated for every query head; nothing for one group.

    Args:
        t: The tape.
        x: Keys or values.
        groups: Query heads per key head.
        heads: Key heads, where transformers repeats them (``expand``, then ``reshape``): a single
            one stays a view. PyTorch's own ``repeat_interleave`` always copies.
    """
    if groups == 1:
        return x
    if heads == 1:
        out = Tensor(x.storage, x.numel * groups, x.dtype)
    else:
        t.moved_bytes += x.numel * x.dtype.size
        out = t.new(x.numel * groups, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _repeat_kv_backward, args=(x.numel,))
    return out


def _repeat_kv_backward(t: Tape, node: Node, grad: Tensor) -> tuple[Tensor]:
    t.moved_bytes += grad.numel * grad.dtype.size
    return (t.new(node.args[0], grad.dtype),)


def pre_norm_block(
    t: Tape,
    m: Layer,
    x: Tensor,
    env: Env,
    *,
    norm: Callable[[Tape, Norm, Tensor, Env], Tensor],
    attention: Callable[[Tape, Layer, Tensor, Env], tuple[Tensor, Tensor | None]],
    mlp: Callable[[Tape, Layer, Tensor, Env], Tensor],
) -> Tensor:
    """The decoder layer that most families share: two residuals, each behind its norm.

    Eager attention's weights stay until the layer returns, as in transformers' ``forward``.
    """
    residual = x
    h = norm(t, m.norms["input_layernorm"], x, env)
    h, _weights = attention(t, m, h, env)
    h = ops.add(t, residual, h)
    residual = h
    h = norm(t, m.norms["post_attention_layernorm"], h, env)
    h = mlp(t, m, h, env)
    return ops.add(t, residual, h)


def attend(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, env: Env, *, contiguous: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The attention interface: eager_attention_forward or sdpa_attention_forward.

    Args:
        t: The tape.
        q: Queries [batch, heads, length, head_dim].
        k: Keys [batch, key heads, length, head_dim].
        v: Values, as keys.
        env: Shapes, mask and implementation.
        contiguous: Whether q has the memory order [batch, length, heads, head_dim], so that the
            output's ``transpose(1, 2).contiguous()`` copies nothing in sdpa.

    Returns:
        The output and, from eager attention, the weights, which the caller keeps alive.
    """
    if env.attention == "eager":
        return eager_attention(t, q, k, v, env, contiguous=not contiguous)
    low_precision = (t.autocast or q.dtype) is not FP32  # all that cuDNN and FlashAttention know
    dims = env.dims
    cudnn = picks_cudnn(env)
    fused = (env.mask is None or cudnn) and env.capability >= (8, 0) and low_precision
    if env.attention == "sdpa" and not fused:
        return _sdpa_without_flash(t, q, k, v, env, contiguous=contiguous), None
    kv_heads = dims.num_kv_heads
    if env.mask is not None:  # transformers repeats keys and values itself where there is one
        groups = dims.num_heads // kv_heads
        k, v = repeat_kv(t, k, groups, heads=kv_heads), repeat_kv(t, v, groups, heads=kv_heads)
        kv_heads = dims.num_heads
    shape = (env.batch, dims.num_heads, kv_heads, env.length, dims.head_dim)
    out = ops.fused_attention(t, q, k, v, shape, cudnn=cudnn, mask=env.mask)
    return (out if contiguous else ops.copy(t, out)), None


def picks_cudnn(env: Env) -> bool:
    """Whether sdpa runs cuDNN's kernel rather than FlashAttention.

    Source: torch 2.11 ``transformers/cuda/sdp_utils.cpp`` (``check_prefer_cudnn_attention``,
    ``check_cudnn_tensor_shapes``), cuDNN newer than 9.15 as its CUDA 13 wheels bring.
    """
    widest = 256 if env.capability == (9, 0) else 128
    preferred = env.capability in ((9, 0), (10, 0), (10, 3))
    return env.attention == "sdpa" and preferred and env.dims.head_dim <= widest


def _sdpa_without_flash(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, env: Env, *, contiguous: bool
) -> Tensor:
    """Sdpa in fp32, before compute capability 8.0, or with a mask where cuDNN is not picked.

    The memory-efficient kernel takes over. It knows no grouped queries: with a mask transformers
    repeats keys and values first, without one PyTorch falls back to plain matrix products.

    Source: transformers 5.17 ``integrations/sdpa_attention.py`` (``use_gqa_in_sdpa``), torch 2.11
    ``transformers/cuda/sdp_utils.cpp``. The cards before 8.0 were not measured.
    """
    dims = env.dims
    groups = dims.num_heads // dims.num_kv_heads
    if groups > 1 and env.mask is None:
        p = dims.attention_dropout
        out = math_attention(t, q, k, v, env, dropout=p, contiguous=not contiguous)
        return ops.copy(t, out)
    heads = dims.num_kv_heads
    k, v = repeat_kv(t, k, groups, heads=heads), repeat_kv(t, v, groups, heads=heads)
    shape = (env.batch, dims.num_heads, dims.num_heads, env.length, dims.head_dim)
    # its output lies as [batch, length, heads, head_dim] whatever the queries do
    return ops.efficient_attention(t, q, k, v, shape, mask=env.mask)


def math_attention(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    env: Env,
    *,
    dropout: float,
    broadcast: bool = False,
    contiguous: bool = False,
) -> Tensor:
    """``_scaled_dot_product_attention_math``: everything in fp32, scores written out.

    Args:
        t: The tape.
        q: Queries.
        k: Keys.
        v: Values.
        env: Shapes and mask.
        dropout: Dropout of the weights.
        broadcast: Whether ``matmul`` spreads the one key head over the query heads, as it does
            without ``enable_gqa``; else they are repeated first.
        contiguous: Whether queries have the memory order [batch, heads, length, head_dim].

    Source: torch 2.11 ``aten/src/ATen/native/transformers/attention.cpp``.
    """
    dims = env.dims
    groups = dims.num_heads // dims.num_kv_heads
    if t.autocast is not None:
        v = ops.to(t, v, t.autocast)
        k = ops.to(t, k, t.autocast)
        q = ops.to(t, q, t.autocast)
    dtype = q.dtype
    size = dims.num_heads * env.tokens * env.length
    mask = None if env.mask is None else ops.to(t, env.mask, dtype)
    with t.no_autocast():
        q_acc, k_acc, v_acc = ops.to(t, q, FP32), ops.to(t, k, FP32), ops.to(t, v, FP32)
        query = ops.scale(t, q_acc)
        if mask is None:  # is_causal
            ones = t.new(env.length * env.length, BOOL)
            _lower = t.new(env.length * env.length, BOOL)  # tril
            del ones
            mask = t.new(env.length * env.length, FP32)
        if broadcast:
            key, value = ops.expand(t, ops.scale(t, k_acc), groups), v_acc
        else:
            expanded, value = repeat_kv(t, k_acc, groups), repeat_kv(t, v_acc, groups)
            key = ops.scale(t, expanded)
        repeated = not broadcast  # which leaves them contiguous
        folds = contiguous, repeated
        weights = ops.batched_matmul(t, query, key, size, dims.head_dim, env.batch, folds=folds)
        del key
        weights = ops.add_(t, weights, mask)
        weights = ops.safe_softmax(t, weights)
        weights = ops.dropout(t, weights, dropout)
        _returned = ops.to(t, weights, dtype)
        if broadcast:
            value = ops.expand(t, value, groups)
        folds = True, repeated
        out = ops.batched_matmul(t, weights, value, q.numel, env.length, env.batch, folds=folds)
        return ops.to(t, out, dtype)


def eager_attention(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, env: Env, *, contiguous: bool = False
) -> tuple[Tensor, Tensor | None]:
    """eager_attention_forward of the Llama-like models.

    Args:
        t: The tape.
        q: Queries [batch, heads, length, head_dim].
        k: Keys [batch, key heads, length, head_dim].
        v: Values, as keys.
        env: Shapes and mask.
        contiguous: Whether queries and keys have that memory order too, as concatenation leaves
            them and repetition leaves keys and values.
    """
    dims = env.dims
    groups = dims.num_heads // dims.num_kv_heads
    key = repeat_kv(t, k, groups, heads=dims.num_kv_heads)
    value = repeat_kv(t, v, groups, heads=dims.num_kv_heads)
    size = dims.num_heads * env.tokens * env.length
    folds = contiguous, contiguous or _repetition_folds(t, k, dims)
    weights = ops.scale(
        t, ops.batched_matmul(t, q, key, size, dims.head_dim, env.batch, folds=folds)
    )
    if dims.attn_logit_softcapping is not None:
        weights = ops.scale(t, weights)
        weights = ops.tanh(t, weights)
        weights = ops.scale(t, weights)
    if env.mask is not None:
        weights = ops.add(t, weights, env.mask)
    weights = ops.to(t, ops.softmax(t, weights, FP32), q.dtype)
    weights = ops.dropout(t, weights, dims.attention_dropout)
    folds = True, _repetition_folds(t, v, dims)
    out = ops.batched_matmul(t, weights, value, q.numel, env.length, env.batch, folds=folds)
    out = ops.view(t, out, copied=env.batch > 1)  # heads last: batch and heads no longer fold
    return ops.copy(t, out), weights


def _repetition_folds(t: Tape, x: Tensor, dims: Dims) -> bool:
    """Whether repeated keys or values lie [batch, heads, ...] in memory when matmul folds them.

    A copy does; the view of a single head only once autocast has cast it.
    """
    if dims.num_kv_heads == 1:
        return dims.num_heads > 1 and t.autocast is not None and x.dtype is not t.autocast
    return dims.num_heads > dims.num_kv_heads


def causal_mask(t: Tape, embeds: Tensor, env: Env) -> None:
    """The one mask of a model whose layers are all alike."""
    env.mask = make_mask(t, embeds, env, env.dims.sliding_window)


def make_mask(t: Tape, embeds: Tensor, env: Env, window: int | None) -> Tensor | None:
    """create_causal_mask, or with a window create_sliding_window_causal_mask.

    Eager attention always gets a tensor, sdpa only where the sequence outgrows the window.
    """
    if env.attention == "eager":
        allowed = allowed_positions(t, env, window)
        mask = t.new(env.tokens * env.length, embeds.dtype, Kind.BATCH)
        del allowed
        return mask
    if env.attention == "sdpa" and window is not None and env.length >= window:
        return allowed_positions(t, env, window)
    return None


def allowed_positions(t: Tape, env: Env, window: int | None) -> Tensor:
    """Which key each query sees [batch, 1, length, length]: ``and_masks`` makes several of them.

    The window's and the causal one are joined first, without the batch; padding comes last.

    Source: transformers 5.17.0 ``masking_utils.py`` (``and_masks``, ``sdpa_mask``).
    """
    square = env.length * env.length
    joined: Tensor | None = None
    for _ in range(1 if window is None else 2):
        part = t.new(square, BOOL, Kind.BATCH)
        joined = t.new(square, BOOL, Kind.BATCH)
        del part
    if window is not None:
        joined = t.new(square, BOOL, Kind.BATCH)
    allowed = t.new(env.tokens * env.length, BOOL, Kind.BATCH)
    del joined
    return allowed


def rotary_prepare(t: Tape, embeds: Tensor, env: Env) -> None:
    """What a model with rotary positions computes once before its layers."""
    causal_mask(t, embeds, env)
    rotary_tables(t, embeds, env)
