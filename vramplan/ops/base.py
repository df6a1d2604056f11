"""Casts, copies and views, and what the other operations share."""

from __future__ import annotations

from collections.abc import Sequence

from vramplan.formats import FP32, INT64, Dtype
from vramplan.tape import Node, Param, Tape, Tensor, alias
from vramplan.timeline import Kind

Grads = Sequence[Tensor | None]


def promote(a: Dtype, b: Dtype) -> Dtype:
    """torch.promote_types for floating dtypes."""
    if a is b:
        return a
    return a if a.size > b.size else b if b.size > a.size else FP32


def to(t: Tape, x: Tensor, dtype: Dtype) -> Tensor:
    """``x.to(dtype)``: nothing if it already has it."""
    if x.dtype is dtype:
        return x
    t.moved_bytes += x.numel * x.dtype.size
    out = t.new(x.numel, dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _to_backward, args=(x.dtype,))
    return out


def _to_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    dtype = node.args[0]
    if grad.dtype is dtype:
        return (grad,)
    t.moved_bytes += grad.numel * grad.dtype.size
    return (t.new(grad.numel, dtype),)


def autocast_weight(t: Tape, weight: Tensor) -> Tensor:
    """The weight as autocast hands it to a matrix product.

    Trainable fp32 leaves are cast once per context and cached, under no_grad too; frozen and
    computed ones are cast anew each time.
    """
    low = t.autocast
    if low is None or weight.dtype is low:
        return weight
    if not isinstance(weight, Param):
        return to(t, weight, low)
    cached = t.cached_cast(weight)
    if cached is not None:
        return cached
    cast = to(t, weight, low)
    if weight.trainable and weight.dtype is FP32:
        t.cache_cast(weight, cast)
    return cast


def copy(t: Tape, x: Tensor) -> Tensor:
    """``clone()``, or ``contiguous()`` of something that is not; the gradient passes through."""
    t.moved_bytes += x.numel * x.dtype.size
    out = t.new(x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _pass)
    return out


def view(t: Tape, x: Tensor, *, copied: bool = False) -> Tensor:
    """view, transpose, permute: another tensor over the same storage.

    Args:
        t: The tape.
        x: Input.
        copied: Whether the gradient comes in a memory order that no view leads back from: a view's
            backward is a ``reshape``, which then copies.
    """
    out = Tensor(x.storage, x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), same_size if copied else _view_backward)
    return out


def _view_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    return (alias(grad),)


def transpose(t: Tape, x: Tensor) -> Tensor:
    """A transposed view, whose gradient arrives contiguous and is copied back into x's order."""
    out = Tensor(x.storage, x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), same_size)
    return out


def _pass(t: Tape, node: Node, grad: Tensor) -> Grads:
    return (grad,)


def same_size(t: Tape, node: Node, grad: Tensor) -> Grads:
    """Backward that makes one new tensor of the gradient's size."""
    t.moved_bytes += grad.numel * grad.dtype.size
    return (t.new(grad.numel, grad.dtype),)


def slice_(t: Tape, x: Tensor, numel: int) -> Tensor:
    """``x[..., a:b]``: a view; its gradient is a zero-filled tensor of the whole size.

    Of everything Python's indexing takes no slice but an alias, whose gradient passes through.

    Source: torch 2.11 ``csrc/autograd/python_variable_indexing.cpp``, ``aten/src/ATen/
    TensorIndexing.h`` (``applySlice``).
    """
    out = Tensor(x.storage, numel, x.dtype)
    if x.node is not None:
        whole = numel == x.numel
        out.node = t.node((x.node,), _pass if whole else _slice_backward, args=(x.numel,))
    return out


def _slice_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.moved_bytes += 2 * grad.numel * grad.dtype.size  # copied into the zeros
    return (t.new(node.args[0], grad.dtype),)


def expand(t: Tape, x: Tensor, times: int) -> Tensor:
    """``x.expand(...)`` to ``times`` as many elements: a view; its gradient is summed down."""
    if times == 1:
        return x
    out = Tensor(x.storage, x.numel * times, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _sum_down, args=(x.numel,))
    return out


def _sum_down(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.moved_bytes += grad.numel * grad.dtype.size
    return (t.new(node.args[0], grad.dtype),)


def pick(t: Tape, x: Tensor, numel: int) -> Tensor:
    """``x[..., [i], :]``: gathered by a list, so a copy; its gradient is one of the whole size."""
    position = t.new(1, INT64)
    node = None
    if x.node is not None:
        node = t.node((x.node,), _pick_backward, (position,), (x.numel,))
    return t.new(numel, x.dtype, node=node)


def _pick_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.unpack(node.saved[0])
    return (t.new(node.args[0], grad.dtype),)


def split(t: Tape, x: Tensor, numels: Sequence[int]) -> list[Tensor]:
    """``split``/``chunk``: views; their gradients are gathered in one concatenation."""
    outs = [Tensor(x.storage, n, x.dtype) for n in numels]
    if x.node is not None:
        parts: list[Tensor] = []
        whole = t.node((x.node,), _split_backward, args=(parts, x.numel, x.dtype))
        for out in outs:
            out.node = t.node((whole,), _split_part, args=(parts,))
            out.node.seq = whole.seq
    return outs


def _split_part(t: Tape, node: Node, grad: Tensor) -> Grads:
    node.args[0].append(grad)
    return (Tensor(None, 0, grad.dtype),)


def _split_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    parts, numel, dtype = node.args
    t.moved_bytes += numel * dtype.size
    out = t.new(numel, dtype)
    parts.clear()
    return (out,)


def cat(t: Tape, tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat``: gradients are views of the incoming one."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = promote(dtype, x.dtype)
    out = t.new(sum(x.numel for x in tensors), dtype)
    t.moved_bytes += out.numel * dtype.size
    if any(x.node is not None for x in tensors):
        sizes = tuple((x.numel, x.dtype) for x in tensors)
        out.node = t.node(tuple(x.node for x in tensors), _cat_backward, args=sizes)
    return out


def _cat_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    return [
        None
        if edge is None
        else Tensor(grad.storage, numel, dtype)
        if dtype is grad.dtype
        else t.new(numel, dtype)
        if numel
        else Tensor(None, 0, dtype)  # no elements, no block
        for edge, (numel, dtype) in zip(node.edges, node.args, strict=True)
    ]


def result_of(x: Tensor) -> Tensor:
    """A node keeps its own result without a reference cycle: another tensor, same storage."""
    return Tensor(x.storage, x.numel, x.dtype)


def leaf_grad(t: Tape, numel: int, dtype: Dtype, edge: Node | Param | None) -> Tensor | None:
    """A gradient that a parameter may take over; None where nothing asks for it."""
    if edge is None:
        return None
    return t.new(numel, dtype, Kind.GRADIENTS if type(edge) is Param else None)


# An H100's; other cards differ in the buffer's size, not in when there is one.
NUM_MULTIPROCESSORS = 132
THREADS_PER_MULTIPROCESSOR = 2048


def column_sum_bytes(rows: int, columns: int) -> int:
    """Global memory that summing [rows, columns] over its rows takes for a moment.

    A bias's gradient is such a sum. From 1024 rows on, several thread blocks share a column and
    leave their parts in a buffer.

    Args:
        rows: Elements summed into one.
        columns: Sums; taken as a multiple of 4, as widths of layers are.

    Returns:
        Bytes; 0 where one block does a column.

    Source: torch 2.11 ``aten/src/ATen/native/cuda/Reduce.cuh`` (``setReduceConfig``,
    ``global_memory_size``), with fp32 sums; to the byte in recorded histories.
    """
    vector = 4
    threads = 512 // vector
    width = min(_last_power_of_2(columns // vector), 32)
    height = min(_last_power_of_2(rows), threads // max(width, 1))
    values = -(-rows // max(height, 1))
    if not columns or values < 256:
        return 0
    grid = -(-columns // vector // width)
    target = NUM_MULTIPROCESSORS * (THREADS_PER_MULTIPROCESSOR // (width * height))
    if grid > target:
        return 0
    blocks = max(min(-(-target // grid), -(-values // 16)), -(-values // 256))
    return 4 * columns * blocks * width * vector if blocks > 1 else 0


def _last_power_of_2(number: int) -> int:
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def column_sum(t: Tape, rows: int, columns: int) -> None:
    """The buffer of such a sum, taken and given back."""
    nbytes = column_sum_bytes(rows, columns)
    if nbytes:
        t.scratch(nbytes)
