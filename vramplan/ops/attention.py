"""Fused attention kernels."""

from __future__ import annotations

from vramplan.formats import FP32, INT64
from vramplan.ops.base import Grads, result_of, to
from vramplan.tape import Node, Tape, Tensor

ATTENTION = "attention"  # a unit of work of its own: these kernels reach less than plain products


def fused_attention(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int, int, int, int],
    *,
    cudnn: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """``scaled_dot_product_attention``: cuDNN's kernel, or FlashAttention-2 without a mask.

    Both keep q, k, v, the output and one fp32 log-sum-exp per row. Backward accumulates dq in fp32
    and, with grouped queries, dk and dv per query head before summing them.

    Args:
        t: The tape.
        q: Queries.
        k: Keys.
        v: Values.
        shape: (batch, query heads, key heads, sequence, head dimension).
        cudnn: Whether PyTorch picks cuDNN (compute capability 9.0 and above).
        mask: Boolean, for cuDNN alone; it becomes an additive one at every call and is kept.

    Source: torch 2.11 ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``,
    ``cuda/sdp_utils.cpp`` (choice of kernel); cuDNN's workspace from recorded histories.
    """
    if t.autocast is not None:
        v = to(t, v, t.autocast)
        k = to(t, k, t.autocast)
        q = to(t, q, t.autocast)
    batch, heads, _kv_heads, length, dim = shape
    kept: tuple[Tensor, ...] = (q, k, v)
    if mask is not None:
        kept += (to(t, mask, q.dtype),)
    edges = (q.node, k.node, v.node)
    node = None
    if edges != (None, None, None):
        node = t.node(edges, _fused_attention_backward, kept, (shape, cudnn, mask is not None))
    out = t.new(q.numel, q.dtype, node=node)
    lse = t.new(batch * heads * length, FP32)
    seed = t.new(1, INT64)
    offset = t.new(1, INT64)
    # causal: half of 4 L² d; a mask hides no work from the kernel
    passes = 1 if mask is None else 2
    read = (q.numel + k.numel + v.numel) * q.dtype.size
    if mask is not None:
        read += mask.numel * q.dtype.size
    t.multiply(ATTENTION, 2 * passes * batch * heads * length * length * dim, read)
    if node is not None:
        node.saved += t.save((result_of(out), lse, seed, offset))
    return out


def _fused_attention_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    shape, cudnn, masked = node.args
    q, k, v = [t.unpack(saved) for saved in node.saved][:3]
    batch, heads, kv_heads, length, dim = shape
    dq = t.new(q.numel, q.dtype)
    dk = t.new(k.numel, k.dtype)
    dv = t.new(v.numel, v.dtype)
    rows = batch * heads * length
    expanded = 2 * rows * dim * q.dtype.size if heads != kv_heads else 0
    if cudnn:
        workspace = [t.scratch(rows * dim * 4 + rows * 4 + expanded)]
    else:
        rounded = batch * heads * (-(-length // 128) * 128)
        dim_rounded = -(-dim // 32) * 32 if dim <= 128 else -(-dim // 64) * 64
        workspace = [t.scratch(rounded * 4), t.scratch(rounded * dim_rounded * 4)]
        workspace += [t.scratch(expanded // 2) for _ in range(2 if expanded else 0)]
    t.moved_bytes += 2 * sum(storage.nbytes for storage in workspace)
    del workspace
    passes = 2 if masked else 1
    read = (3 * q.numel + k.numel + v.numel) * q.dtype.size
    t.multiply(ATTENTION, 5 * passes * batch * heads * length * length * dim, read)
    return dq, dk, dv


def efficient_attention(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int, int, int, int],
    *,
    mask: Tensor | None,
) -> Tensor:
    """``scaled_dot_product_attention`` by the memory-efficient kernel.

    Its rows need a multiple of 16 elements. A boolean mask becomes an additive one in the queries'
    dtype at every call and is kept; so does an additive one that autocast has to cast.

    Source: torch 2.11 ``aten/src/ATen/native/transformers/attention.cpp``
    (``convert_boolean_attn_mask``), ``cuda/attention.cu``, ``cuda/attention_backward.cu``.
    """
    if t.autocast is not None:
        v = to(t, v, t.autocast)
        k = to(t, k, t.autocast)
        q = to(t, q, t.autocast)
    batch, heads, _kv_heads, length, dim = shape
    kept: tuple[Tensor, ...] = (q, k, v)
    if mask is not None:
        bias = to(t, mask, q.dtype)
        if length % 16:  # rows are padded
            bias = t.new(mask.numel // length * (-(-length // 16) * 16), q.dtype)
        kept += (bias,)
    edges = (q.node, k.node, v.node)
    node = None
    if edges != (None, None, None):
        node = t.node(edges, _efficient_attention_backward, kept, (shape,))
    out = t.new(q.numel, q.dtype, node=node)
    lse = t.new(batch * heads * (-(-length // 32) * 32), FP32)
    read = (q.numel + k.numel + v.numel) * q.dtype.size
    t.multiply(ATTENTION, 4 * batch * heads * length * length * dim, read)
    if node is not None:
        node.saved += t.save((result_of(out), lse))
    return out


def _efficient_attention_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    (shape,) = node.args
    q, k, v = [t.unpack(saved) for saved in node.saved][:3]
    batch, heads, _kv_heads, length, dim = shape
    dq = t.new(q.numel, q.dtype)
    dk = t.new(k.numel, k.dtype)
    dv = t.new(v.numel, v.dtype)
    delta = t.scratch(batch * heads * length * 4)
    del delta
    read = (3 * q.numel + k.numel + v.numel) * q.dtype.size
    t.multiply(ATTENTION, 10 * batch * heads * length * length * dim, read)
    return dq, dk, dv
