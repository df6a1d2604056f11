"""Norms, softmax, embedding and the loss."""

from __future__ import annotations

from vramplan.formats import BOOL, FP16, FP32, INT64, Dtype
from vramplan.ops.base import Grads, leaf_grad, result_of, to
from vramplan.tape import Node, Param, Tape, Tensor
from vramplan.timeline import Kind


def layer_norm(
    t: Tape,
    x: Tensor,
    weight: Param,
    bias: Param | None,
    groups: int,
    *,
    contiguous: bool = True,
) -> Tensor:
    """``F.layer_norm``: autocast runs it, weights included, in fp32.

    Args:
        t: The tape.
        x: Input.
        weight: Scale.
        bias: Shift, if the norm has one.
        groups: Rows that are normalised, each over its own elements.
        contiguous: Whether x is contiguous; if not, each kernel copies it for its own use and the
            node keeps the original.

    Source: torch 2.11 ``aten/src/ATen/native/cuda/layer_norm_kernel.cu`` (``expect_contiguous``).
    """
    if t.autocast is not None:
        x = to(t, x, FP32)
    w = to(t, weight, FP32) if t.autocast is not None else weight
    b = bias if bias is None or t.autocast is None else to(t, bias, FP32)
    edges = (x.node, w.node, b.node if b is not None else None)
    node = None
    if edges != (None, None, None):
        node = t.node(edges, _layer_norm_backward, (x, w), (contiguous,))
    t.moved_bytes += x.numel * x.dtype.size * (1 if contiguous else 2)
    own = None if contiguous else t.new(x.numel, x.dtype)
    out = t.new(x.numel, x.dtype, node=node)
    mean_ = t.new(groups, FP32)
    rstd = t.new(groups, FP32)
    del own
    if node is not None:
        node.saved += t.save((mean_, rstd))
    return out


def _layer_norm_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    x, w, _mean, _rstd = [t.unpack(saved) for saved in node.saved]
    (contiguous,) = node.args
    passes = 1 + (node.edges[1] is not None)  # the weights' gradients in a kernel of their own
    t.moved_bytes += passes * (x.numel * x.dtype.size + grad.numel * grad.dtype.size)
    own = None if contiguous else t.new(x.numel, x.dtype)
    gx = t.new(x.numel, x.dtype) if node.edges[0] is not None else None
    gw = leaf_grad(t, w.numel, w.dtype, node.edges[1])
    gb = leaf_grad(t, w.numel, w.dtype, node.edges[2])
    del own
    return gx, gw, gb


def softmax(t: Tape, x: Tensor, dtype: Dtype | None = None) -> Tensor:
    """``F.softmax(x, dtype=...)``: keeps its result; in fp32 under autocast."""
    if dtype is None:
        dtype = x.dtype if t.autocast is None else FP32
        source = to(t, x, dtype)
    else:  # half to float alone is one kernel
        source = x if x.dtype is FP16 and dtype is FP32 else to(t, x, dtype)
    t.moved_bytes += source.numel * source.dtype.size
    args = (source.dtype,)
    node = t.node((source.node,), _softmax_backward, (), args) if source.node is not None else None
    out = t.new(x.numel, dtype, node=node)
    if node is not None:
        node.saved = t.save((result_of(out),))
    return out


def _softmax_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    result = t.unpack(node.saved[0])
    t.moved_bytes += 5 * result.numel * result.dtype.size
    gx = t.new(result.numel, node.args[0])
    t.scratch(result.numel * result.dtype.size, node.kind)  # softmax_backward_data: grad * result
    return (gx,)


def _log_softmax_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    result = t.unpack(node.saved[0])
    t.moved_bytes += 2 * result.numel * result.dtype.size
    return (t.new(result.numel, node.args[0]),)


def safe_softmax(t: Tape, x: Tensor) -> Tensor:
    """``_safe_softmax``: softmax, then zeros where a whole row is masked away.

    Source: torch 2.11 ``aten/src/ATen/native/transformers/attention.cpp``.
    """
    node = t.node((x.node,), _softmax_backward, (), (x.dtype,)) if x.node is not None else None
    t.moved_bytes += 3 * x.numel * x.dtype.size
    plain = t.new(x.numel, x.dtype)
    masked = t.new(x.numel, BOOL)
    out = t.new(x.numel, x.dtype, node=node)
    del plain, masked
    if node is not None:
        node.saved = t.save((result_of(out),))
    return out


def embedding(
    t: Tape, weight: Param, num_tokens: int, width: int, indices: Tensor | None = None
) -> Tensor:
    """``F.embedding``: rows gathered; the gradient of the table is dense.

    Args:
        t: The tape.
        weight: The table.
        num_tokens: Rows to gather.
        width: Elements of a row.
        indices: What the node keeps, where nobody else keeps it as the batch keeps input_ids.
    """
    node = None
    if weight.node is not None:
        kept = () if indices is None else (indices,)
        node = t.node((weight,), _embedding_backward, kept, (weight.numel, num_tokens, width))
    t.moved_bytes += num_tokens * width * weight.dtype.size
    return t.new(num_tokens * width, weight.dtype, node=node)


def _embedding_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    """``embedding_dense_backward``: above 3072 indices they are sorted and rows summed in parts.

    Source: torch 2.11 ``aten/src/ATen/native/cuda/Embedding.cu``,
    ``EmbeddingBackwardKernel.cu`` (NROWS_PER_THREAD = 10).
    """
    numel, num_tokens, width = node.args
    for saved in node.saved:
        t.unpack(saved)
    t.moved_bytes += 2 * grad.numel * grad.dtype.size
    gw = t.new(numel, grad.dtype, Kind.GRADIENTS)
    if num_tokens > 3072:
        segments = min(num_tokens, numel // width)
        parts = num_tokens // 10 + segments
        scratch = [t.new(num_tokens, INT64, Kind.WORKSPACE) for _ in range(3)]
        scratch += [t.new(segments, INT64, Kind.WORKSPACE) for _ in range(2)]
        scratch.append(t.new(parts, INT64, Kind.WORKSPACE))
        scratch.append(t.new(parts * width, FP32, Kind.WORKSPACE))
        del scratch
    return (gw,)


def cross_entropy(t: Tape, logits: Tensor, labels: Tensor) -> Tensor:
    """``F.cross_entropy`` on fp32 logits: log_softmax, kept whole, then nll_loss.

    Backward fills a gradient of the logits' size for nll_loss, then one more for log_softmax.
    """
    t.moved_bytes += logits.numel * logits.dtype.size
    log_probs = t.new(logits.numel, logits.dtype)
    if logits.node is not None:
        kept = (result_of(log_probs),)
        log_probs.node = t.node((logits.node,), _log_softmax_backward, kept, (logits.dtype,))
    loss = t.new(1, logits.dtype)
    total_weight = t.new(1, logits.dtype)
    if log_probs.node is not None:
        saved = (log_probs, labels, total_weight)
        loss.node = t.node((log_probs.node,), _nll_loss_backward, saved)
    return loss


def _nll_loss_backward(t: Tape, node: Node, grad: Tensor) -> Grads:
    log_probs = t.unpack(node.saved[0])
    return (t.new(log_probs.numel, log_probs.dtype),)
