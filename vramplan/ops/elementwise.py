"""Elementwise operations and activation functions."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.errors import UnknownNameError
from vramplan.formats import BOOL, FP32, INT64, Dtype
from vramplan.ops.base import (
    Grads,
    column_sum,
    copy,
    promote,
    result_of,
    same_size,
    to,
)
from vramplan.tape import BackwardFn, Node, Param, Tape, Tensor


def fit_grad(
    t: Tape, grad: Tensor, numel: int, dtype: Dtype, edge: Node | Param | None = None
) -> Tensor:
    """validate_outputs: sum a broadcast gradient down, then cast it to its input's dtype.

    Args:
        t: The tape.
        grad: The gradient as it came.
        numel: Elements of the input.
        dtype: Its dtype.
        edge: Where it goes; a parameter was broadcast over rows.
    """
    if grad.numel != numel:
        rows = grad.numel // numel
        t.moved_bytes += grad.numel * grad.dtype.size
        grad = t.new(numel, grad.dtype)
        if type(edge) is Param:
            column_sum(t, rows, numel)
    if grad.dtype is not dtype:
        t.moved_bytes += numel * grad.dtype.size
        grad = t.new(numel, dtype)
    return grad


def mul(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a * b`` with broadcasting."""
    t.moved_bytes += a.numel * a.dtype.size + b.numel * b.dtype.size
    node = None
    if a.node is not None or b.node is not None:
        saved = ((b,) if a.node is not None else ()) + ((a,) if b.node is not None else ())
        args = (a.numel, a.dtype, b.numel, b.dtype)
        node = t.node((a.node, b.node), _mul_backward, saved, args)
    return t.new(max(a.numel, b.numel), promote(a.dtype, b.dtype), node=node)


def _mul_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    a_numel, a_dtype, b_numel, b_dtype = node.args
    for saved in node.saved:
        t.unpack(saved)
        del saved
    a_edge, b_edge = node.edges
    ga = gb = None
    if b_edge is not None:  # generated formulas go by argument name: other before self
        t.moved_bytes += grad.numel * grad.dtype.size + a_numel * a_dtype.size
        gb = t.new(grad.numel, promote(grad.dtype, a_dtype))
    if a_edge is not None:
        t.moved_bytes += grad.numel * grad.dtype.size + b_numel * b_dtype.size
        ga = t.new(grad.numel, promote(grad.dtype, b_dtype))
    t.drop_recomputed(node)
    if ga is not None:
        ga = fit_grad(t, ga, a_numel, a_dtype, a_edge)
    if gb is not None:
        gb = fit_grad(t, gb, b_numel, b_dtype, b_edge)
    return ga, gb


def add(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a + b``: keeps nothing, hands the same gradient to both."""
    out = t.new(max(a.numel, b.numel), promote(a.dtype, b.dtype))
    t.moved_bytes += a.numel * a.dtype.size + b.numel * b.dtype.size
    if a.node is not None or b.node is not None:
        args = (a.numel, a.dtype, b.numel, b.dtype)
        out.node = t.node((a.node, b.node), _add_backward, args=args)
    return out


def _add_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    """The same gradient for both, summed down and cast where one was broadcast or promoted."""
    a_numel, a_dtype, b_numel, b_dtype = node.args
    a_edge, b_edge = node.edges
    return (
        fit_grad(t, grad, a_numel, a_dtype) if a_edge is not None else None,
        fit_grad(t, grad, b_numel, b_dtype) if b_edge is not None else None,
    )


def sub(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a - b``: keeps nothing; hands the gradient to one, its negative to the other."""
    out = t.new(max(a.numel, b.numel), promote(a.dtype, b.dtype))
    t.moved_bytes += a.numel * a.dtype.size + b.numel * b.dtype.size
    if a.node is not None or b.node is not None:
        args = (a.numel, a.dtype, b.numel, b.dtype)
        out.node = t.node((a.node, b.node), _sub_backward, args=args)
    return out


def _sub_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    a_numel, a_dtype, b_numel, b_dtype = node.args
    a_edge, b_edge = node.edges
    gb = None
    if b_edge is not None:
        t.moved_bytes += grad.numel * grad.dtype.size
        gb = fit_grad(t, t.new(grad.numel, grad.dtype), b_numel, b_dtype)
    return (fit_grad(t, grad, a_numel, a_dtype) if a_edge is not None else None), gb


def subtract_max(t: Tape, x: Tensor, groups: int) -> Tensor:
    """``x - x.max(dim=-1, keepdim=True).values``: the maximum's indices are kept."""
    node = t.node((x.node,), _max_backward, args=(x.numel,)) if x.node is not None else None
    t.moved_bytes += x.numel * x.dtype.size
    values = t.new(groups, x.dtype, node=node)
    indices = t.new(groups, INT64)
    if node is not None:
        node.saved = t.save((indices,))
    return sub(t, x, values)


def _max_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.unpack(node.saved[0])
    return (t.new(node.args[0], grad.dtype),)


def scale(t: Tape, x: Tensor) -> Tensor:
    """``x * 2.0``, ``x / 2.0``, ``-x``: a new tensor, the gradient likewise."""
    out = t.new(x.numel, x.dtype)
    t.moved_bytes += x.numel * x.dtype.size
    if x.node is not None:
        out.node = t.node((x.node,), same_size)
    return out


neg = scale


def scale_(t: Tape, x: Tensor) -> Tensor:
    """``x *= 2.0``, ``x /= 2.0``: in place; the gradient is a new tensor."""
    out = Tensor(x.storage, x.numel, x.dtype)
    t.moved_bytes += 2 * x.numel * x.dtype.size
    if x.node is not None:
        out.node = t.node((x.node,), same_size)
    return out


def add_(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """``a += b``: in place, hands the same gradient to both."""
    out = Tensor(a.storage, a.numel, a.dtype)
    t.moved_bytes += 2 * a.numel * a.dtype.size + b.numel * b.dtype.size
    if a.node is not None or b.node is not None:
        args = (a.numel, a.dtype, b.numel, b.dtype)
        out.node = t.node((a.node, b.node), _add_backward, args=args)
    return out


def add_scalar(t: Tape, x: Tensor) -> Tensor:
    """``x + 1.0``: a new tensor, the same gradient."""
    return copy(t, x)


def pow_scalar(t: Tape, x: Tensor) -> Tensor:
    """``x.pow(n)``, in fp32 under autocast; backward is ``grad * (n * x.pow(n - 1))``."""
    if t.autocast is not None:
        x = to(t, x, FP32)
    t.moved_bytes += x.numel * x.dtype.size
    node = t.node((x.node,), _pow_backward, (x,)) if x.node is not None else None
    return t.new(x.numel, x.dtype, node=node)


def _pow_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    x = t.unpack(node.saved[0])
    t.moved_bytes += 4 * x.numel * x.dtype.size
    power = t.new(x.numel, x.dtype)
    scaled = t.new(x.numel, x.dtype)
    out = t.new(x.numel, x.dtype)
    del power, scaled
    return (out,)


def mean(t: Tape, x: Tensor, groups: int) -> Tensor:
    """Mean over the last dimension; its gradient is expanded and divided at full size."""
    t.moved_bytes += x.numel * x.dtype.size
    out = t.new(groups, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _mean_backward, args=(x.numel,))
    return out


def _mean_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    return (t.new(node.args[0], grad.dtype),)


def rsqrt(t: Tape, x: Tensor) -> Tensor:
    """``torch.rsqrt``: keeps its result; backward is ``-0.5 * grad * result.pow(3)``."""
    return _keep_result(t, x, _three_temporaries)


def _keep_result(t: Tape, x: Tensor, backward: BackwardFn) -> Tensor:
    """An operation whose node keeps its result."""
    t.moved_bytes += x.numel * x.dtype.size
    node = t.node((x.node,), backward) if x.node is not None else None
    out = t.new(x.numel, x.dtype, node=node)
    if node is not None:
        node.saved = t.save((result_of(out),))
    return out


def _three_temporaries(t: Tape, node: Node, grad: Tensor) -> Grads:
    x = t.unpack(node.saved[0])
    t.moved_bytes += 4 * x.numel * x.dtype.size
    first = t.new(x.numel, x.dtype)
    second = t.new(x.numel, x.dtype)
    out = t.new(x.numel, x.dtype)
    del first, second
    return (out,)


def keep_input(t: Tape, x: Tensor) -> Tensor:
    """silu, gelu, relu² …: one kernel that keeps its input; backward is one kernel too."""
    node = t.node((x.node,), _keep_input_backward, (x,)) if x.node is not None else None
    out = t.new(x.numel, x.dtype, node=node)
    t.moved_bytes += x.numel * x.dtype.size
    return out


def _keep_input_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    x = t.unpack(node.saved[0])
    t.moved_bytes += x.numel * x.dtype.size + grad.numel * grad.dtype.size
    return (t.new(x.numel, x.dtype),)


def tanh(t: Tape, x: Tensor) -> Tensor:
    """``torch.tanh``: keeps its result."""
    return _keep_result(t, x, _keep_input_backward)


def gelu_new(t: Tape, x: Tensor) -> Tensor:
    """Transformers' NewGELUActivation, written out in Python there and here.

    ``0.5 * x * (1.0 + tanh(c * (x + 0.044715 * pow(x, 3.0))))``; pow runs in fp32 under autocast.
    """
    return mul(
        t,
        scale(t, x),
        add_scalar(t, tanh(t, scale(t, add(t, x, scale(t, pow_scalar(t, x)))))),
    )


def gelu_fast(t: Tape, x: Tensor) -> Tensor:
    """Transformers' FastGELUActivation, written out in Python there and here.

    ``0.5 * x * (1.0 + tanh(x * c * (1.0 + 0.044715 * x * x)))``
    """
    return mul(
        t,
        scale(t, x),
        add_scalar(t, tanh(t, mul(t, scale(t, x), add_scalar(t, mul(t, scale(t, x), x))))),
    )


def bloom_gelu(t: Tape, x: Tensor) -> Tensor:
    """BloomGelu: an autograd.Function that keeps its input and works out everything again.

    ``x * 0.5 * (1.0 + tanh(c * x * (1 + 0.044715 * x * x)))``

    Source: transformers 5.17 ``models/bloom/modeling_bloom.py`` (``GeLUFunction``).
    """
    plain = Tensor(x.storage, x.numel, x.dtype)  # forward of a Function records nothing
    out = mul(
        t,
        scale(t, plain),
        add_scalar(t, tanh(t, _bloom_gelu_inner(t, plain))),
    )
    if x.node is not None:
        node = t.node((x.node,), _bloom_gelu_backward)
        node.saved = t.save((x,))
        out.node = node
    return out


def _bloom_gelu_inner(t: Tape, x: Tensor) -> Tensor:
    """``0.79788456 * x * (1 + 0.044715 * x * x)``."""
    return mul(t, scale(t, x), add_scalar(t, mul(t, scale(t, x), x)))


def _bloom_gelu_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    """bloom_gelu_back, line by line."""
    saved = t.unpack(node.saved[0])
    x = Tensor(saved.storage, saved.numel, saved.dtype)
    tanh_out = tanh(t, _bloom_gelu_inner(t, x))
    ff = add(
        t,
        mul(
            t,
            scale(t, x),
            mul(
                t,
                add_scalar(t, mul(t, tanh_out, tanh_out)),
                add_scalar(t, mul(t, scale(t, x), x)),
            ),
        ),
        scale(t, add_scalar(t, tanh_out)),
    )
    return (mul(t, ff, grad),)


ACTIVATIONS: dict[str, Callable[[Tape, Tensor], Tensor]] = {
    "silu": keep_input,
    "swish": keep_input,
    "gelu": keep_input,
    "gelu_pytorch_tanh": keep_input,
    "relu": tanh,  # threshold_backward keeps the result
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
}


def activation(name: str) -> Callable[[Tape, Tensor], Tensor]:
    """The operation of that ``hidden_act`` (transformers' ``ACT2FN``).

    Raises:
        UnknownNameError: If it is not modelled.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise UnknownNameError("activation function", name, ACTIVATIONS) from None


def dropout(t: Tape, x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training: a mask of one byte an element; nothing at all for p = 0.

    Source: torch 2.11 ``aten/src/ATen/native/cuda/Dropout.cu`` (the mask comes first).
    """
    if p == 0:
        return x
    t.moved_bytes += x.numel * x.dtype.size
    mask = t.new(x.numel, BOOL)
    out = t.new(x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _dropout_backward, (mask,))
    return out


def _dropout_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.moved_bytes += grad.numel * (grad.dtype.size + BOOL.size)
    t.unpack(node.saved[0])
    return (t.new(grad.numel, grad.dtype),)
