"""Operations of mixtures of experts: routing, gathering rows, grouped products, folded adapters.

Source: torch 2.11 ``tools/autograd/derivatives.yaml``, ``torch/csrc/autograd/FunctionsManual.cpp``
(``_grouped_mm_mat2_backward``, ``value_selecting_reduction_backward``, ``clamp_backward``),
``aten/src/ATen/native/cuda/GroupedBlas.cpp``, ``cuda/Indexing.cu``
(``index_put_with_sort_kernel``); transformers 5.17.0 ``integrations/moe.py``
(``_grouped_mm_fallback``).

Known limitations:
    Temporaries of sort, topk and histc, and the grouped kernel's argument buffers (some ten KiB),
    are left out: they live and die before the permuted hidden states that follow them.
"""

from __future__ import annotations

from vramplan.formats import BOOL, FP32, INT64
from vramplan.ops.base import Grads, leaf_grad, same_size, to
from vramplan.ops.elementwise import fit_grad, tanh
from vramplan.tape import Node, Param, Tape, Tensor, alias
from vramplan.timeline import Kind


def index(t: Tape, x: Tensor, indices: Tensor, width: int) -> Tensor:
    """``x[indices]``: rows of ``width`` elements; the gradient is dense, summed up by sorting."""
    node = None
    if x.node is not None:
        node = t.node((x.node,), _index_backward, (indices,), (x.numel, indices.numel))
    t.moved_bytes += indices.numel * width * x.dtype.size
    return t.new(indices.numel * width, x.dtype, node=node)


def _index_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    numel, rows = node.args
    t.unpack(node.saved[0])
    t.moved_bytes += 2 * grad.numel * grad.dtype.size  # added to the zeros
    out = leaf_grad(t, numel, grad.dtype, node.edges[0])
    # linear, sorted and original indices and a range
    scratch = [t.new(rows, INT64, Kind.WORKSPACE) for _ in range(4)]
    del scratch
    return (out,)


def masked_fill(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill(mask, 0.0)``: a new tensor; keeps the mask."""
    t.moved_bytes += x.numel * x.dtype.size
    node = t.node((x.node,), _masked_fill_backward, (mask,)) if x.node is not None else None
    return t.new(x.numel, x.dtype, node=node)


def masked_fill_(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill_(mask, 0.0)``: in place."""
    out = Tensor(x.storage, x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _masked_fill_backward, (mask,))
    return out


def _masked_fill_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.unpack(node.saved[0])
    return same_size(t, node, grad)


def topk(t: Tape, x: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """``torch.topk``: values and indices, ``numel`` of each; keeps the indices."""
    node = t.node((x.node,), _topk_backward, args=(x.numel,)) if x.node is not None else None
    values = t.new(numel, x.dtype, node=node)
    indices = t.new(numel, INT64)
    if node is not None:
        node.saved = t.save((indices,))
    return values, indices


def _topk_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.unpack(node.saved[0])
    return (t.new(node.args[0], grad.dtype),)


def normalise_(t: Tape, x: Tensor, rows: int) -> Tensor:
    """``x /= x.sum(dim=-1, keepdim=True)``: autograd keeps a copy of what was overwritten."""
    total = t.new(rows, x.dtype)
    if x.node is None:
        return x
    total.node = t.node((x.node,), _sum_backward, args=(x.numel,))
    original = t.new(x.numel, x.dtype)
    out = Tensor(x.storage, x.numel, x.dtype)
    out.node = t.node((x.node, total.node), _div_backward, (original, total))
    return out


def _sum_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    out = alias(grad)  # expanded
    out.numel = node.args[0]
    return (out,)


def _div_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    x, total = [t.unpack(saved) for saved in node.saved]
    quotients = [t.new(x.numel, x.dtype) for _ in range(3)]  # -((x / total) / total)
    of_total = t.new(x.numel, x.dtype)
    del quotients
    of_x = t.new(x.numel, x.dtype)
    t.drop_recomputed(node)
    return of_x, fit_grad(t, of_total, total.numel, total.dtype)


def sum_rows(t: Tape, x: Tensor, numel: int) -> Tensor:
    """``x.view(tokens, k, width).sum(dim=1)``, in fp32 under autocast.

    Its gradient, expanded, is written out by the view's backward or by the cast before it.
    """
    t.moved_bytes += x.numel * x.dtype.size
    out = t.new(numel, x.dtype if t.autocast is None else FP32)
    if x.node is not None:
        out.node = t.node((x.node,), _sum_rows_backward, args=(x.numel, x.dtype))
    return out


def _sum_rows_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    numel, dtype = node.args
    t.moved_bytes += numel * dtype.size
    return (t.new(numel, dtype),)


sigmoid = tanh  # keeps its result, too


def clamp(t: Tape, x: Tensor, num_bounds: int) -> Tensor:
    """``x.clamp(min, max)``: keeps its input; backward selects by one comparison per bound."""
    node = None
    if x.node is not None:
        node = t.node((x.node,), _clamp_backward, (x,), (num_bounds,))
    return t.new(x.numel, x.dtype, node=node)


def _clamp_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    x = t.unpack(node.saved[0])
    masks = [t.new(x.numel, BOOL) for _ in range(node.args[0])]
    out = t.new(grad.numel, grad.dtype)
    del masks
    return (out,)


def grouped_mm(
    t: Tape,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    shape: tuple[int, int],
    *,
    fallback: bool,
) -> Tensor:
    """``grouped_mm(x.to(weight.dtype), weight, offs=offsets)``; autocast does not know it.

    Args:
        t: The tape.
        x: Rows sorted by expert.
        weight: All experts' matrices.
        offsets: Where each expert's rows end.
        shape: Columns of x and of the result.
        fallback: Whether transformers' own loop runs (compute capability below 8.0): it keeps both
            operands and computes both gradients whether asked for or not.
    """
    columns, width = shape
    x = to(t, x, weight.dtype)
    rows = x.numel // columns
    read = (x.numel + weight.numel) * weight.dtype.size
    t.multiply(weight.dtype.name, 2 * rows * columns * width, read)
    edges = (x.node, weight.node)
    node = None
    if edges != (None, None):
        keep_x = fallback or edges[1] is not None
        keep_weight = fallback or edges[0] is not None
        saved = ((x,) if keep_x else ()) + ((weight,) if keep_weight else ()) + (offsets,)
        args = (rows, columns, width, weight.numel, fallback)
        node = t.node(edges, _grouped_mm_backward, saved, args)
    return t.new(rows * width, weight.dtype, node=node)


def _grouped_mm_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    rows, columns, width, numel, fallback = node.args
    for saved in node.saved:
        t.unpack(saved)
    x_edge, w_edge = node.edges
    gx = gw = None
    if fallback:
        gx = t.new(rows * columns, grad.dtype)
        gw = t.new(numel, grad.dtype)
        flops = 2 * rows * columns * width
        t.multiply(grad.dtype.name, flops, (grad.numel + numel) * grad.dtype.size)
        t.multiply(grad.dtype.name, flops, (grad.numel + rows * columns) * grad.dtype.size)
        return (gx if x_edge is not None else None), (gw if w_edge is not None else None)
    gw = leaf_grad(t, numel, grad.dtype, w_edge)  # mat2's gradient comes first
    if x_edge is not None:
        gx = t.new(rows * columns, grad.dtype)
    flops = 2 * rows * columns * width
    if gx is not None:
        t.multiply(grad.dtype.name, flops, (grad.numel + numel) * grad.dtype.size)
    if gw is not None:
        t.multiply(grad.dtype.name, flops, (grad.numel + rows * columns) * grad.dtype.size)
    return gx, gw


def permuted(t: Tape, x: Param) -> Tensor:
    """``x.reshape(a, b, c).permute(2, 0, 1)``: a view whose gradient must be copied into order."""
    out = Tensor(x.storage, x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _permuted_backward)
    return out


def _permuted_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.moved_bytes += grad.numel * grad.dtype.size
    return (leaf_grad(t, grad.numel, grad.dtype, node.edges[0]),)


def fold_adapter(t: Tape, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``torch.baddbmm(weight, left, right, alpha=scaling)`` on a stack of frozen matrices.

    ``left`` is permuted in a way that cuBLAS cannot read, so every product with it copies it.
    A scaling of exactly 1 would save one pass over each factor's gradient.
    """
    node = None
    if left.node is not None or right.node is not None:
        edges = (left.node, right.node)
        node = t.node(edges, _fold_backward, (left, right), (left.numel, right.numel))
    # copied into the result, which the product then reads and writes once more
    t.moved_bytes += 3 * weight.numel * weight.dtype.size
    out = t.new(weight.numel, weight.dtype, node=node)
    contiguous = t.scratch(left.numel * left.dtype.size)
    del contiguous
    t.use("cublas")
    return out


def _fold_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.moved_bytes += 2 * grad.numel * grad.dtype.size
    left, right = [t.unpack(saved) for saved in node.saved]
    product = t.new(left.numel, grad.dtype)
    g_left = t.new(left.numel, grad.dtype)
    del product
    product = t.new(right.numel, grad.dtype)
    contiguous = t.scratch(left.numel * left.dtype.size)
    del contiguous
    g_right = t.new(right.numel, grad.dtype)
    del product
    t.use("cublas")
    return g_left, g_right
