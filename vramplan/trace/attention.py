"""``scaled_dot_product_attention`` as CUDA runs it: which kernel, what it allocates and keeps.

Source: torch 2.11 ``aten/src/ATen/native/transformers/attention.cpp``, ``cuda/sdp_utils.cpp``,
``cuda/attention.cu``, ``cuda/attention_backward.cu``, ``cuda/flash_attn/flash_api.cpp``; cuDNN's
workspace from recorded histories (as ``vramplan/ops/attention.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from vramplan.trace.tracker import Books


def scaled_dot_product_attention(
    func: Any,
    books: Books,
    capability: tuple[int, int],
    autocast: bool,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention by the kernel that PyTorch picks on a card of this compute capability.

    Args:
        func: PyTorch's function, for what falls back to plain products.
        books: Where workspaces are written.
        capability: Compute capability.
        autocast: Whether autocast is on; it casts queries, keys and values.
        query: Queries [batch, heads, length, head_dim].
        key: Keys.
        value: Values.
        attn_mask: Boolean or additive mask.
        dropout_p: Dropout.
        is_causal: Whether the kernel masks by itself.
        scale: Scale of the scores.
        enable_gqa: Whether there are fewer keys than queries.
    """
    if autocast:
        dtype = torch.get_autocast_dtype("cpu")
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
        value, key, query = value.to(dtype), key.to(dtype), query.to(dtype)
    grouped = query.shape[1] != key.shape[1]
    if query.dtype not in (torch.bfloat16, torch.float16) and grouped:
        return _plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    half = query.dtype in (torch.bfloat16, torch.float16)
    fits = enable_gqa or not grouped
    widest = 256 if capability == (9, 0) else 128
    cudnn = capability in ((9, 0), (10, 0), (10, 3)) and query.shape[-1] <= widest
    alike = cudnn or query.shape[-1] == value.shape[-1]  # all that FlashAttention knows
    if half and (attn_mask is None or cudnn) and fits and alike and capability >= (8, 0):
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        return Fused.apply(query, key, value, attn_mask, books, cudnn)
    if grouped:
        return _plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None:
        attn_mask = _bias(attn_mask, query)
    return Efficient.apply(query, key, value, attn_mask, books)


def _plain(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    p: float,
    causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """``_scaled_dot_product_attention_math``, line by line; autocast is off inside.

    PyTorch's own adds the mask out of place for tensor subclasses, as fake tensors are.
    """
    with torch.autocast("cpu", enabled=False):
        dtype = q.dtype
        if mask is not None and mask.dtype is torch.bool:
            mask = torch.empty_like(mask, dtype=dtype)
        half = dtype in (torch.bfloat16, torch.float16)
        q_acc, k_acc, v_acc = (q.float(), k.float(), v.float()) if half else (q, k, v)
        factor = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
        query = q_acc * factor
        if causal:
            rows, columns = query.shape[-2], k_acc.shape[-2]
            allowed = torch.ones(rows, columns, dtype=torch.bool).tril()
            mask = torch.empty_like(allowed, dtype=query.dtype)
        key, value = k_acc, v_acc
        if enable_gqa:
            groups = q.shape[1] // k.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = torch.matmul(query, key.transpose(-2, -1) * factor)
        if mask is not None:
            weights.add_(mask)
        weights = torch.ops.aten._safe_softmax(weights, -1)
        if p > 0:
            weights = torch.native_dropout(weights, p, True)[0]
        _returned = weights.to(dtype)
        return torch.matmul(weights, value).to(dtype)


def _bias(mask: Any, query: Any) -> Any:
    """A boolean mask becomes an additive one; rows are padded to multiples of 16."""
    if mask.dtype is torch.bool:
        mask = torch.empty_like(mask, dtype=query.dtype)
    if mask.shape[-1] % 16:
        width = math.ceil(mask.shape[-1] / 16) * 16
        mask = torch.empty((*mask.shape[:-1], width), dtype=mask.dtype)[..., : mask.shape[-1]]
    return mask


class Fused(torch.autograd.Function):  # type: ignore[misc]
    """FlashAttention-2 or cuDNN."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, books: Books, cudnn: bool) -> Any:
        """Result, log-sum-exp and the dropout's seed and offset."""
        batch, heads, length, dim = q.shape
        out = torch.empty_like(q if v.shape[-1] == dim else v.expand(batch, heads, length, -1))
        lse = torch.empty(batch, heads, length, dtype=torch.float32)
        seed = torch.empty(1, dtype=torch.int64)
        offset = torch.empty(1, dtype=torch.int64)
        ctx.save_for_backward(q, k, v, mask, out, lse, seed, offset)
        ctx.books, ctx.cudnn = books, cudnn
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Three gradients and the kernel's workspace."""
        saved = ctx.saved_tensors  # held by the node's call to its end
        q, k, v = saved[:3]
        batch, heads, length, dim = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        rows = batch * heads * length
        expanded = 2 * rows * dim * q.element_size() if heads != k.shape[1] else 0
        if ctx.cudnn:
            sizes = [rows * dim * 4 + rows * 4 + expanded]
        else:
            rounded = batch * heads * (-(-length // 128) * 128)
            wide = -(-dim // 32) * 32 if dim <= 128 else -(-dim // 64) * 64
            sizes = [rounded * 4, rounded * wide * 4, expanded // 2, expanded // 2]
        with ctx.books.scratch(sizes):
            pass
        return dq, dk, dv, None, None, None


def _tokens_first(x: Any) -> Any:
    """A tensor like x that lies in memory as [batch, length, heads, head_dim]."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


class Efficient(torch.autograd.Function):  # type: ignore[misc]
    """The memory-efficient kernel."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, books: Books) -> Any:
        """Result and log-sum-exp, its rows rounded up to 32."""
        batch, heads, length, _ = q.shape
        out = _tokens_first(v.expand(batch, heads, length, -1))
        lse = torch.empty(batch, heads, -(-length // 32) * 32, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.books = books
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Three gradients and delta."""
        saved = ctx.saved_tensors  # held by the node's call to its end
        q, k, v = saved[:3]
        batch, heads, length, _ = q.shape
        dq, dk, dv = _tokens_first(q), _tokens_first(k), _tokens_first(v)
        with ctx.books.scratch([batch * heads * length * 4]):
            pass
        return dq, dk, dv, None, None
