"""Operations: each described once.

For every operation: what it allocates going forward, what its autograd node keeps, what backward
allocates (with C++ temporaries, which live until the end of their expression), its floating point
operations and, through ``Tape.new``, the bytes it writes. Names and argument order are PyTorch's.

Source: torch 2.11 ``tools/autograd/derivatives.yaml`` and ``torch/csrc/autograd/
FunctionsManual.cpp`` (formulas), ``aten/src/ATen/autocast_mode.cpp`` (casts),
``aten/src/ATen/native/LinearAlgebra.cpp`` (``matmul`` folding), checked against recorded allocator
histories (``profiles/calibrations``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vramplan.errors import UnknownNameError
from vramplan.formats import BOOL, FP32, INT64, Dtype
from vramplan.tape import BackwardFn, Node, Param, Storage, Tape, Tensor, alias
from vramplan.timeline import Kind

Grads = Sequence[Tensor | None]


def promote(a: Dtype, b: Dtype) -> Dtype:
    """torch.promote_types for floating dtypes."""
    if a is b:
        return a
    return a if a.size > b.size else b if b.size > a.size else FP32


# -- casts, copies and views -------------------------------------------------------------------


def to(t: Tape, x: Tensor, dtype: Dtype) -> Tensor:
    """``x.to(dtype)``: nothing if it already has it."""
    if x.dtype is dtype:
        return x
    out = t.new(x.numel, dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _to_backward, args=(x.dtype,))
    return out


def _to_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    dtype = node.args[0]
    return (grad if grad.dtype is dtype else t.new(grad.numel, dtype),)


def autocast_weight(t: Tape, weight: Param) -> Tensor:
    """The weight as autocast hands it to a matrix product.

    Trainable fp32 leaves are cast once per context and cached; frozen ones are cast anew each time.
    """
    low = t.autocast
    if low is None or weight.dtype is low:
        return weight
    cached = t.cached_cast(weight)
    if cached is not None:
        return cached
    cast = to(t, weight, low)
    if weight.node is not None and weight.dtype is FP32:
        t.cache_cast(weight, cast)
    return cast


def copy(t: Tape, x: Tensor) -> Tensor:
    """``clone()``, or ``contiguous()`` of something that is not; the gradient passes through."""
    out = t.new(x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _pass)
    return out


def view(t: Tape, x: Tensor) -> Tensor:
    """view, transpose, permute: another tensor over the same storage."""
    out = Tensor(x.storage, x.numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _view_backward)
    return out


def _view_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    return (alias(grad),)


def _pass(t: Tape, node: Node, grad: Tensor) -> Grads:
    return (grad,)


def _same_size(t: Tape, node: Node, grad: Tensor) -> Grads:
    return (t.new(grad.numel, grad.dtype),)


def slice_(t: Tape, x: Tensor, numel: int) -> Tensor:
    """``x[..., a:b]``: a view; its gradient is a zero-filled tensor of the whole size."""
    out = Tensor(x.storage, numel, x.dtype)
    if x.node is not None:
        out.node = t.node((x.node,), _slice_backward, args=(x.numel,))
    return out


def _slice_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
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
    out = t.new(numel, dtype)
    parts.clear()
    return (out,)


def cat(t: Tape, tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat``: gradients are views of the incoming one."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = promote(dtype, x.dtype)
    out = t.new(sum(x.numel for x in tensors), dtype)
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
        for edge, (numel, dtype) in zip(node.edges, node.args, strict=True)
    ]


# -- elementwise -------------------------------------------------------------------------------


def _fit(t: Tape, grad: Tensor, numel: int, dtype: Dtype) -> Tensor:
    """validate_outputs: sum a broadcast gradient down, then cast it to its input's dtype."""
    if grad.numel != numel:
        grad = t.new(numel, grad.dtype)
    if grad.dtype is not dtype:
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
    a_edge, b_edge = node.edges
    ga = gb = None
    if a_edge is not None:
        ga = t.new(grad.numel, promote(grad.dtype, b_dtype))
    if b_edge is not None:
        gb = t.new(grad.numel, promote(grad.dtype, a_dtype))
    if ga is not None:
        ga = _fit(t, ga, a_numel, a_dtype)
    if gb is not None:
        gb = _fit(t, gb, b_numel, b_dtype)
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
    a_numel, a_dtype, b_numel, b_dtype = node.args
    a_edge, b_edge = node.edges
    return (
        _fit(t, grad, a_numel, a_dtype) if a_edge is not None else None,
        _fit(t, grad, b_numel, b_dtype) if b_edge is not None else None,
    )


def scale(t: Tape, x: Tensor) -> Tensor:
    """``x * 2.0``, ``x / 2.0``, ``-x``: a new tensor, the gradient likewise."""
    out = t.new(x.numel, x.dtype)
    t.moved_bytes += x.numel * x.dtype.size
    if x.node is not None:
        out.node = t.node((x.node,), _same_size)
    return out


neg = scale


def add_scalar(t: Tape, x: Tensor) -> Tensor:
    """``x + 1.0``: a new tensor, the same gradient."""
    return copy(t, x)


def pow_scalar(t: Tape, x: Tensor) -> Tensor:
    """``x.pow(n)``, in fp32 under autocast; backward is ``grad * (n * x.pow(n - 1))``."""
    if t.autocast is not None:
        x = to(t, x, FP32)
    node = t.node((x.node,), _pow_backward, (x,)) if x.node is not None else None
    return t.new(x.numel, x.dtype, node=node)


def _pow_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    x = t.unpack(node.saved[0])
    power = t.new(x.numel, x.dtype)
    scaled = t.new(x.numel, x.dtype)
    out = t.new(x.numel, x.dtype)
    del power, scaled
    return (out,)


def mean(t: Tape, x: Tensor, groups: int) -> Tensor:
    """Mean over the last dimension; its gradient is expanded and divided at full size."""
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
    node = t.node((x.node,), backward) if x.node is not None else None
    out = t.new(x.numel, x.dtype, node=node)
    if node is not None:
        node.saved = t.save((out_alias(out),))
    return out


def out_alias(x: Tensor) -> Tensor:
    """A node keeps its own result without a reference cycle: another tensor, same storage."""
    return Tensor(x.storage, x.numel, x.dtype)


def _three_temporaries(t: Tape, node: Node, grad: Tensor) -> Grads:
    x = t.unpack(node.saved[0])
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
    """``F.dropout`` in training: a mask of one byte an element; nothing at all for p = 0."""
    if p == 0:
        return x
    out = t.new(x.numel, x.dtype)
    mask = t.new(x.numel, BOOL)
    if x.node is not None:
        out.node = t.node((x.node,), _dropout_backward, (mask,))
    return out


def _dropout_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    t.unpack(node.saved[0])
    return (t.new(grad.numel, grad.dtype),)


# -- norms, softmax, embedding -------------------------------------------------------------------


def layer_norm(t: Tape, x: Tensor, weight: Param, bias: Param | None, groups: int) -> Tensor:
    """``F.layer_norm``: autocast runs it, weights included, in fp32."""
    if t.autocast is not None:
        x = to(t, x, FP32)
    w = to(t, weight, FP32) if t.autocast is not None else weight
    b = bias if bias is None or t.autocast is None else to(t, bias, FP32)
    edges = (x.node, w.node, b.node if b is not None else None)
    node = None
    if edges != (None, None, None):
        node = t.node(edges, _layer_norm_backward, (x, w))
    out = t.new(x.numel, x.dtype, node=node)
    mean_ = t.new(groups, FP32)
    rstd = t.new(groups, FP32)
    if node is not None:
        node.saved += t.save((mean_, rstd))
    return out


def _layer_norm_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    x, w, _mean, _rstd = [t.unpack(saved) for saved in node.saved]
    gx = t.new(x.numel, x.dtype) if node.edges[0] is not None else None
    gw = _leaf_grad(t, w.numel, w.dtype, node.edges[1])
    gb = _leaf_grad(t, w.numel, w.dtype, node.edges[2])
    return gx, gw, gb


def _leaf_grad(t: Tape, numel: int, dtype: Dtype, edge: Node | Param | None) -> Tensor | None:
    if edge is None:
        return None
    return t.new(numel, dtype, Kind.GRADIENTS if type(edge) is Param else None)


def softmax(t: Tape, x: Tensor, dtype: Dtype | None = None) -> Tensor:
    """``F.softmax(x, dtype=...)``: keeps its result; in fp32 under autocast."""
    in_dtype = x.dtype
    if dtype is None:
        if t.autocast is not None:
            x = to(t, x, FP32)
            in_dtype = FP32
        dtype = x.dtype
    node = t.node((x.node,), _softmax_backward, (), (in_dtype,)) if x.node is not None else None
    out = t.new(x.numel, dtype, node=node)
    if node is not None:
        node.saved = t.save((out_alias(out),))
    return out


def _softmax_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    result = t.unpack(node.saved[0])
    return (t.new(result.numel, node.args[0]),)


def embedding(t: Tape, weight: Param, num_tokens: int, width: int) -> Tensor:
    """``F.embedding``: rows gathered; the gradient of the table is dense."""
    out = t.new(num_tokens * width, weight.dtype)
    if weight.node is not None:
        out.node = t.node((weight,), _embedding_backward, args=(weight.numel, num_tokens))
    return out


def _embedding_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    numel, num_tokens = node.args
    gw = t.new(numel, grad.dtype, Kind.GRADIENTS)
    # embedding_dense_backward_cuda sorts the indices above 3072 of them
    if num_tokens > 3072:
        scratch = [t.new(num_tokens, INT64, Kind.WORKSPACE) for _ in range(3)]
        del scratch
    return (gw,)


# -- matrix products -----------------------------------------------------------------------------


def linear(
    t: Tape, x: Tensor, weight: Param, bias: Param | None, rows: int, columns: int
) -> Tensor:
    """``F.linear``: x [tokens, columns] times weight [rows, columns]."""
    # autocast's wrapper casts its arguments last to first, as C++ evaluates them here
    b = autocast_weight(t, bias) if bias is not None else None
    w = autocast_weight(t, weight)
    if t.autocast is not None:
        x = to(t, x, t.autocast)
    tokens = x.numel // columns
    t.flops += 2 * tokens * rows * columns
    t.moved_bytes += (x.numel + rows * columns) * x.dtype.size
    edges = (x.node, w.node, b.node if b is not None else None)
    node = None
    if edges != (None, None, None):
        saved = ((x,) if edges[1] is not None else ()) + ((w,) if edges[0] is not None else ())
        node = t.node(edges, _linear_backward, saved, (tokens, rows, columns))
    return t.new(tokens * rows, x.dtype, node=node)


def _linear_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    tokens, rows, columns = node.args
    for saved in node.saved:
        t.unpack(saved)
    x_edge, w_edge, b_edge = node.edges
    gx = gw = None
    if b_edge is None:  # mm computes mat2's gradient first, addmm mat1's
        gw = _leaf_grad(t, rows * columns, grad.dtype, w_edge)
    if x_edge is not None:
        gx = t.new(tokens * columns, grad.dtype, Kind.ACTIVATION_GRADIENTS)
    if b_edge is not None:
        gw = _leaf_grad(t, rows * columns, grad.dtype, w_edge)
    t.flops += 2 * tokens * rows * columns * ((gx is not None) + (gw is not None))
    gb = _leaf_grad(t, rows, grad.dtype, b_edge)
    for viewed in (gx, gw):  # reshaped, transposed
        if viewed is not None:
            viewed.aliased = True
    return gx, gw, gb


def batched_matmul(t: Tape, a: Tensor, b: Tensor, numel: int, inner: int, batch: int) -> Tensor:
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

    Source: torch 2.11 ``aten/src/ATen/native/LinearAlgebra.cpp`` (``_matmul_impl``).
    """
    if t.autocast is not None:
        b = to(t, b, t.autocast)
        a = to(t, a, t.autocast)
    if batch > 1:
        if a.numel < numel:  # queries; attention weights are contiguous already
            a = copy(t, a)
        b = copy(t, b)
    t.flops += 2 * numel * inner
    node = None
    if a.node is not None or b.node is not None:
        saved = ((b,) if a.node is not None else ()) + ((a,) if b.node is not None else ())
        args = (a.numel, b.numel, inner)
        node = t.node((a.node, b.node), _matmul_backward, saved, args)
    return t.new(numel, a.dtype, node=node)


def _matmul_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    a_numel, b_numel, inner = node.args
    for saved in node.saved:
        t.unpack(saved)
    a_edge, b_edge = node.edges
    gb = t.new(b_numel, grad.dtype) if b_edge is not None else None
    ga = t.new(a_numel, grad.dtype) if a_edge is not None else None
    t.flops += 2 * grad.numel * inner * ((ga is not None) + (gb is not None))
    return ga, gb


def matmul_4bit(
    t: Tape, x: Tensor, rows: int, columns: int, dequantised: Sequence[int], stored: Dtype
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

    Source: bitsandbytes 0.50.2 ``autograd/_functions.py``, ``backends/cuda/ops.py``.
    """
    tokens = x.numel // columns
    hidden = [t.scratch(nbytes) for nbytes in dequantised]
    out = t.new(tokens * rows, x.dtype)
    del hidden
    t.flops += 2 * tokens * rows * columns
    t.moved_bytes += rows * columns // 2 + x.numel * x.dtype.size
    if x.node is not None:
        args = (tokens, rows, columns, stored)
        out.node = t.node((x.node,), _matmul_4bit_backward, args=args)
    return out


def _matmul_4bit_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    tokens, rows, columns, stored = node.args
    absmax = t.scratch(-(-rows * columns // 64) * 4)
    weight = t.scratch(rows * columns * stored.size)
    del absmax
    cast: Storage | None = None
    if stored is not grad.dtype:
        cast = t.scratch(rows * columns * grad.dtype.size)
    gx = t.new(tokens * columns, grad.dtype)
    del weight, cast
    t.flops += 2 * tokens * rows * columns
    return (gx,)


def matmul_8bit(t: Tape, x: Tensor, rows: int, columns: int) -> Tensor:
    """Bitsandbytes' ``MatMul8bitLt`` (LLM.int8) on x [tokens, columns] with a frozen weight.

    Source: bitsandbytes 0.50.2 ``autograd/_functions.py``.

    Known limitations:
        Outlier columns (threshold 6.0) depend on the data and are taken as none. The input kept on
        ``ctx`` is released with its node, where the real one stays until the whole graph goes.
    """
    tokens = x.numel // columns
    half = None if x.dtype.name == "fp16" else t.scratch(x.numel * 2)
    quantised = t.scratch(x.numel)
    row_scale = t.scratch(tokens * 4)
    del half
    product = t.scratch(tokens * rows * 4)
    out = t.new(tokens * rows, x.dtype)
    del quantised, row_scale, product
    t.flops += 2 * tokens * rows * columns
    if x.node is not None:
        # ctx.tensors keeps the input itself, out of reach of saved-tensor hooks
        out.node = t.node((x.node,), _matmul_8bit_backward, args=(tokens, rows, columns, x))
    return out


def _matmul_8bit_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    tokens, rows, columns, x = node.args
    weight = t.scratch(rows * columns * x.dtype.size)
    gx = t.new(tokens * columns, x.dtype)
    del weight
    t.flops += 2 * tokens * rows * columns
    return (gx,)


# -- attention -----------------------------------------------------------------------------------


def fused_attention(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: tuple[int, int, int, int, int],
    *,
    cudnn: bool,
) -> Tensor:
    """``scaled_dot_product_attention`` without a mask: cuDNN's kernel or FlashAttention-2.

    Both keep q, k, v, the output and one fp32 log-sum-exp per row. Backward accumulates dq in fp32
    and, with grouped queries, dk and dv per query head before summing them.

    Args:
        t: The tape.
        q: Queries.
        k: Keys.
        v: Values.
        shape: (batch, query heads, key heads, sequence, head dimension).
        cudnn: Whether PyTorch picks cuDNN (compute capability 9.0 and above).

    Source: torch 2.11 ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``,
    ``cuda/sdp_utils.cpp`` (choice of kernel); cuDNN's workspace from recorded histories.
    """
    if t.autocast is not None:
        v = to(t, v, t.autocast)
        k = to(t, k, t.autocast)
        q = to(t, q, t.autocast)
    batch, heads, _kv_heads, length, dim = shape
    edges = (q.node, k.node, v.node)
    node = None
    if edges != (None, None, None):
        node = t.node(edges, _fused_attention_backward, (q, k, v), (shape, cudnn))
    out = t.new(q.numel, q.dtype, node=node)
    lse = t.new(batch * heads * length, FP32)
    seed = t.new(1, INT64)
    offset = t.new(1, INT64)
    t.flops += 2 * batch * heads * length * length * dim  # causal: half of 4 L² d
    if node is not None:
        node.saved += t.save((out_alias(out), lse, seed, offset))
    return out


def _fused_attention_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    shape, cudnn = node.args
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
    del workspace
    t.flops += 5 * batch * heads * length * length * dim
    return dq, dk, dv


def efficient_attention(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int, int, int, int]
) -> Tensor:
    """``scaled_dot_product_attention`` with a mask: the memory-efficient kernel.

    The boolean mask becomes an additive one in the queries' dtype at every call and is kept.

    Source: torch 2.11 ``aten/src/ATen/native/transformers/attention.cpp``
    (``convert_boolean_attn_mask``), ``cuda/attention.cu``, ``cuda/attention_backward.cu``.
    """
    if t.autocast is not None:
        v = to(t, v, t.autocast)
        k = to(t, k, t.autocast)
        q = to(t, q, t.autocast)
    batch, heads, _kv_heads, length, dim = shape
    bias = t.new(batch * length * length, q.dtype)
    edges = (q.node, k.node, v.node)
    node = None
    if edges != (None, None, None):
        node = t.node(edges, _efficient_attention_backward, (q, k, v, bias), (shape,))
    out = t.new(q.numel, q.dtype, node=node)
    lse = t.new(batch * heads * (-(-length // 32) * 32), FP32)
    t.flops += 4 * batch * heads * length * length * dim
    if node is not None:
        node.saved += t.save((out_alias(out), lse))
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
    t.flops += 10 * batch * heads * length * length * dim
    return dq, dk, dv


def cross_entropy(t: Tape, logits: Tensor, labels: Tensor) -> Tensor:
    """``F.cross_entropy`` on fp32 logits: log_softmax, kept whole, then nll_loss.

    Backward fills a gradient of the logits' size for nll_loss, then one more for log_softmax.
    """
    log_probs = t.new(logits.numel, logits.dtype)
    if logits.node is not None:
        kept = (out_alias(log_probs),)
        log_probs.node = t.node((logits.node,), _softmax_backward, kept, (logits.dtype,))
    loss = t.new(1, logits.dtype)
    total_weight = t.new(1, logits.dtype)
    if log_probs.node is not None:
        saved = (log_probs, labels, total_weight)
        loss.node = t.node((log_probs.node,), _nll_loss_backward, saved)
    return loss


def _nll_loss_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    log_probs = t.unpack(node.saved[0])
    return (t.new(log_probs.numel, log_probs.dtype),)
