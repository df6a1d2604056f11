"""Matrix products: plain, batched and quantised."""

from __future__ import annotations

from collections.abc import Sequence

from vramplan.formats import FP16, Dtype
from vramplan.ops.base import Grads, autocast_weight, column_sum, copy, leaf_grad, to, view
from vramplan.ops.elementwise import add
from vramplan.tape import Node, Param, Tape, Tensor
from vramplan.timeline import Kind


def linear(
    t: Tape, x: Tensor, weight: Tensor, bias: Param | None, rows: int, columns: int
) -> Tensor:
    """``F.linear``: x [tokens, columns] times weight [rows, columns]."""
    # autocast's wrapper casts its arguments last to first, as C++ evaluates them here
    b = autocast_weight(t, bias) if bias is not None else None
    w = autocast_weight(t, weight)
    x = autocast_weight(t, x)  # a frozen embedding's output may be a leaf too, its cast cached
    return _product(t, x, w, b, rows, columns)


def conv1d(t: Tape, x: Tensor, weight: Param, bias: Param, rows: int, columns: int) -> Tensor:
    """Transformers' Conv1D: ``addmm`` of x [tokens, columns] and weight [columns, rows]."""
    w = autocast_weight(t, weight)
    if t.autocast is not None:
        x = to(t, x, t.autocast)
    b = autocast_weight(t, bias)
    return _product(t, x, w, b, rows, columns)


def falcon_linear(
    t: Tape, x: Tensor, weight: Param, bias: Param | None, rows: int, columns: int
) -> Tensor:
    """FalconLinear: ``x @ weight.T``, then the bias added on its own.

    Autocast sees a view of the weight, not the leaf, and so casts it anew each time.

    Source: transformers 5.17 ``models/falcon/modeling_falcon.py``.
    """
    w = view(t, weight)
    if t.autocast is not None:
        w = to(t, w, t.autocast)
        x = to(t, x, t.autocast)
    out = _product(t, x, w, None, rows, columns)
    if bias is None:
        return out
    del x, w  # the casts go with the product
    return add(t, out, bias)


def _product(t: Tape, x: Tensor, w: Tensor, b: Tensor | None, rows: int, columns: int) -> Tensor:
    """``addmm`` or ``mm`` of an activation and a weight, both cast already."""
    tokens = x.numel // columns
    t.multiply(x.dtype.name, 2 * tokens * rows * columns, (x.numel + rows * columns) * x.dtype.size)
    edges = (x.node, w.node, b.node if b is not None else None)
    node = None
    if edges != (None, None, None):
        saved = ((x,) if edges[1] is not None else ()) + ((w,) if edges[0] is not None else ())
        node = t.node(edges, _linear_backward, saved, (tokens, rows, columns, t.two_dimensional))
    out = t.new(tokens * rows, x.dtype, node=node)
    t.use("cublas" if b is None else "cublaslt")
    return out


def _linear_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    tokens, rows, columns, two_dimensional = node.args
    for saved in node.saved:
        t.unpack(saved)
    x_edge, w_edge, b_edge = node.edges
    gx = gw = None
    if b_edge is None:  # mm computes mat2's gradient first, addmm mat1's
        gw = leaf_grad(t, rows * columns, grad.dtype, w_edge)
        if gw is not None:
            t.use("cublas")
    if x_edge is not None:
        gx = t.new(tokens * columns, grad.dtype, Kind.ACTIVATION_GRADIENTS)
        t.use("cublas")
    if b_edge is not None:
        gw = leaf_grad(t, rows * columns, grad.dtype, w_edge)
    flops, size = 2 * tokens * rows * columns, grad.dtype.size
    if gx is not None:
        t.multiply(grad.dtype.name, flops, (grad.numel + rows * columns) * size)
    if gw is not None:
        t.multiply(grad.dtype.name, flops, (grad.numel + tokens * columns) * size)
    t.drop_recomputed(node)
    gb = leaf_grad(t, rows, grad.dtype, b_edge)  # the engine sums over the tokens
    if gb is not None:
        t.moved_bytes += grad.numel * grad.dtype.size
        column_sum(t, tokens, rows)
    if gx is not None:
        gx.aliased = not two_dimensional  # [batch, length, features]: reshaped
    if gw is not None:
        gw.aliased = True  # transposed
    return gx, gw, gb


def batched_matmul(
    t: Tape,
    a: Tensor,
    b: Tensor,
    numel: int,
    inner: int,
    batch: int,
    *,
    folds: tuple[bool, bool] = (False, False),
) -> Tensor:
    """``torch.matmul`` of two [batch, heads, ...] activations.

    Batch and heads are folded into one dimension; operands whose memory order does not allow that
    (permuted ones, unless batch is 1) are copied, and the copies are what the node keeps.

    Args:
        t: The tape.
        a: First operand.
        b: Second operand, permuted.
        numel: Elements of the result.
        inner: Contracted dimension.
        batch: Batch size.
        folds: Whether the memory order of each operand lets batch and heads fold, as that of
            attention weights does.

    Source: torch 2.11 ``aten/src/ATen/native/LinearAlgebra.cpp`` (``_matmul_impl``).
    """
    if t.autocast is not None:
        b = to(t, b, t.autocast)
        a = to(t, a, t.autocast)
    arguments = a, b  # the caller holds them while matmul works on copies
    if batch > 1:
        if not folds[0]:
            a = copy(t, a)
        if not folds[1]:
            b = copy(t, b)
    t.multiply(a.dtype.name, 2 * numel * inner, (a.numel + b.numel) * a.dtype.size)
    node = None
    if a.node is not None or b.node is not None:
        saved = ((b,) if a.node is not None else ()) + ((a,) if b.node is not None else ())
        args = (a.numel, b.numel, inner)
        node = t.node((a.node, b.node), _matmul_backward, saved, args)
    out = t.new(numel, a.dtype, node=node)
    t.use("cublas")
    del arguments
    return out


def _matmul_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    a_numel, b_numel, inner = node.args
    for saved in node.saved:
        t.unpack(saved)
    a_edge, b_edge = node.edges
    gb = t.new(b_numel, grad.dtype) if b_edge is not None else None
    ga = t.new(a_numel, grad.dtype) if a_edge is not None else None
    for made, other in ((ga, b_numel), (gb, a_numel)):
        if made is not None:
            read = (grad.numel + other) * grad.dtype.size
            t.multiply(grad.dtype.name, 2 * grad.numel * inner, read)
    return ga, gb


def baddbmm(t: Tape, bias: Tensor, a: Tensor, b: Tensor, numel: int, inner: int) -> Tensor:
    """``bias.baddbmm(a, b, alpha=...)`` with a bias that is not trained.

    Args:
        t: The tape.
        bias: What is added, broadcast.
        a: First operand [batch x heads, rows, inner].
        b: Second operand [batch x heads, inner, columns].
        numel: Elements of the result.
        inner: Contracted dimension.
    """
    if t.autocast is not None:
        b = to(t, b, t.autocast)
        a = to(t, a, t.autocast)
        bias = to(t, bias, t.autocast)
    read = (a.numel + b.numel + numel) * a.dtype.size
    t.multiply(a.dtype.name, 2 * numel * inner, read)
    node = None
    if a.node is not None or b.node is not None:
        saved = ((b,) if a.node is not None else ()) + ((a,) if b.node is not None else ())
        node = t.node((a.node, b.node), _baddbmm_backward, saved, (a.numel, b.numel, inner))
    return t.new(numel, a.dtype, node=node)


def _baddbmm_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    a_numel, b_numel, inner = node.args
    for saved in node.saved:
        t.unpack(saved)
    grads: list[Tensor | None] = []
    for edge, numel in zip(node.edges, (a_numel, b_numel), strict=True):
        if edge is None:
            grads.append(None)
            continue
        product = t.new(numel, grad.dtype)
        grads.append(t.new(numel, grad.dtype))  # times alpha
        del product
        other = a_numel + b_numel - numel
        size = grad.dtype.size
        t.multiply(grad.dtype.name, 2 * grad.numel * inner, (grad.numel + other) * size)
        t.moved_bytes += numel * size
    return grads


def matmul_4bit(
    t: Tape,
    x: Tensor,
    rows: int,
    columns: int,
    dequantised: Sequence[int],
    stored: Dtype,
    *,
    biased: bool = False,
) -> Tensor:
    """Bitsandbytes' ``MatMul4Bit`` on x [tokens, columns] in the compute dtype.

    Args:
        t: The tape.
        x: Input.
        rows: Output features.
        columns: Input features.
        dequantised: Bytes of the tensors that a forward call dequantises into first (the hidden
            workspace); empty where the fused kernel runs.
        stored: dtype that backward dequantises to before casting to the gradient's.
        biased: Whether it adds a bias.

    Source: bitsandbytes 0.50.2 ``autograd/_functions.py``, ``backends/cuda/ops.py``.
    """
    tokens = x.numel // columns
    hidden = [t.scratch(nbytes) for nbytes in dequantised]
    out = t.new(tokens * rows, x.dtype)
    t.use("cublaslt" if biased else "cublas")
    del hidden
    _multiply_dequantised(t, tokens, rows, columns, x.numel, x.dtype, x.dtype)
    if x.node is not None:
        args = (tokens, rows, columns, stored)
        out.node = t.node((x.node,), _matmul_4bit_backward, args=args)
    return out


def _matmul_4bit_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    tokens, rows, columns, stored = node.args
    absmax = t.scratch(-(-rows * columns // 64) * 4)
    weight = t.scratch(rows * columns * stored.size)
    del absmax
    if stored is not grad.dtype:
        weight = t.scratch(rows * columns * grad.dtype.size)
    gx = t.new(tokens * columns, grad.dtype)
    del weight
    _multiply_dequantised(t, tokens, rows, columns, grad.numel, grad.dtype, stored)
    return (gx,)


def _multiply_dequantised(
    t: Tape, tokens: int, rows: int, columns: int, read: int, dtype: Dtype, stored: Dtype
) -> None:
    """The work of a 4-bit product: dequantise, cast where ``stored`` differs, multiply."""
    weights = rows * columns
    t.num_quantised += 1
    t.dequantised += weights
    if stored is not dtype:
        t.moved_bytes += weights * (stored.size + dtype.size)
    t.multiply(dtype.name, 2 * tokens * weights, (read + weights) * dtype.size)


def matmul_8bit(t: Tape, x: Tensor, rows: int, columns: int) -> Tensor:
    """Bitsandbytes' ``MatMul8bitLt`` (LLM.int8) on x [tokens, columns] with a frozen weight.

    Source: bitsandbytes 0.50.2 ``autograd/_functions.py``, ``backends/cuda/ops.py``.

    Known limitations:
        Outlier columns (threshold 6.0) depend on the data and are taken as none.
    """
    tokens = x.numel // columns
    half = None if x.dtype is FP16 else t.scratch(x.numel * 2)
    row_scale = t.scratch(tokens * 4)
    quantised = t.scratch(x.numel)
    absolute = t.scratch(x.numel * 2)
    outliers = t.scratch(x.numel)
    del absolute
    del outliers, half
    product = t.scratch(tokens * rows * 4)
    half = None if x.dtype is FP16 else t.scratch(tokens * rows * 2)  # what the kernel can write
    out = t.new(tokens * rows, x.dtype)
    del half, product, quantised, row_scale
    t.num_quantised += 1
    t.multiply("int8", 2 * tokens * rows * columns, x.numel + rows * columns)
    # the input read, cast, quantised; the 32-bit products written, read
    t.moved_bytes += x.numel * (x.dtype.size + 5) + tokens * rows * 8
    if x.node is not None:
        # ctx.tensors keeps the input itself, out of reach of saved-tensor hooks; executing the node
        # frees what it saved, not that
        t.keep_with_graph(x)
        out.node = t.node((x.node,), _matmul_8bit_backward, args=(tokens, rows, columns, x))
    return out


def _matmul_8bit_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    tokens, rows, columns, x = node.args
    weight = t.scratch(rows * columns * x.dtype.size)
    gx = t.new(tokens * columns, x.dtype)
    del weight
    t.num_quantised += 1
    t.dequantised += rows * columns
    read = (grad.numel + rows * columns) * x.dtype.size
    t.multiply(x.dtype.name, 2 * tokens * rows * columns, read)
    return (gx,)
