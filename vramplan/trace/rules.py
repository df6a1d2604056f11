"""Where a fake CPU tensor behaves otherwise than a CUDA one: one named rule each, with its source.

Everything else in a trace is what the libraries do of themselves. ``RULES`` lists the rules;
``corrected`` puts all of them in force.

Source: torch 2.11/2.13 (files named at each rule), bitsandbytes 0.50.2, transformers 5.17.0.

Known limitations:
    Shapes decide; what depends on contents is answered as in a run on full-length sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._meta_registrations as meta
import transformers.utils.import_utils as hf_imports
from bitsandbytes import functional as bnb_functional
from bitsandbytes.autograd import _functions as bnb_autograd
from bitsandbytes.optim import ademamix as bnb_ademamix
from bitsandbytes.optim import optimizer as bnb_optimizer
from torch.overrides import TorchFunctionMode

from vramplan.layers import FUSED_MAX_TOKENS
from vramplan.trace.attention import scaled_dot_product_attention
from vramplan.trace.routing import EvenRouting
from vramplan.trace.tracker import Books, Hidden

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
SORTED_EMBEDDING_TOKENS = 3072
SORTED_EMBEDDING_ROWS = 10  # NROWS_PER_THREAD
FOREACH_CHUNK = 65536

RULES = {
    "filled in place": "index's and topk's backward write into the zeros they made; for tensor "
    "subclasses into a copy (csrc/autograd/FunctionsManual.cpp, areAnyTensorSubclassLike)",
    "sum in place": "autograd's engine adds a second gradient into the first when nobody else "
    "holds it; for tensor subclasses it never does (csrc/autograd/input_buffer.cpp)",
    "fp32 list": "CUDA's autocast runs other operations in fp32 than the CPU's "
    "(aten/src/ATen/autocast_mode.h, AT_FORALL_FP32)",
    "opt dtype list": "softmax, sum and others get dtype=float32 from CUDA's autocast "
    "(aten/src/ATen/autocast_mode.h, AT_FORALL_FP32_SET_OPT_DTYPE)",
    "promote list": "the CPU's autocast promotes cat and stack with copies; CUDA's does not, "
    "and promotes index_put and others (aten/src/ATen/autocast_mode.h)",
    "autocast is on": "torch.is_autocast_enabled() without a device asks about CUDA "
    "(torch/csrc/autograd/init.cpp)",
    "half to float softmax": "softmax(half, dtype=float32) is one kernel on CUDA for fp16, not "
    "for bf16; a cast and a softmax on the CPU (aten/src/ATen/native/SoftMax.cpp)",
    "fused dropout": "native_dropout with a byte mask on CUDA (aten/src/ATen/native/Dropout.cpp)",
    "layers kept": "OPT skips a layer when torch.rand([]) < layerdrop; the number is on the host "
    "and taken as 1.0 (transformers/models/opt/modeling_opt.py)",
    "attention kernel": "which one CUDA picks and what it keeps (vramplan/trace/attention.py)",
    "full sequences": "tests on the attention mask are answered as for a mask of ones; "
    "transformers' masking_utils.py otherwise takes fake tensors for an export",
    "even routing": "a loop over experts finds every expert's equal share of the tokens "
    "(vramplan/trace/routing.py)",
    "safe softmax": "_safe_softmax looks for rows that are masked away with a softmax and a byte "
    "mask of its own (aten/src/ATen/native/transformers/attention.cpp)",
    "dequantised weight": "gemm_4bit dequantises scales and weight first "
    "(bitsandbytes/backends/cuda/ops.py, _dequant_linear_fallback)",
    "LLM.int8": "a CPU trains by dequantised weights, CUDA by int8 products; no outlier columns "
    "(bitsandbytes/autograd/_functions.py, backends/cuda/ops.py, backends/default/ops.py)",
    "sorted embedding": "embedding_dense_backward sorts its indices above 3072 of them and sums "
    "rows in parts, in fp32 (aten/src/ATen/native/cuda/Embedding.cu, EmbeddingBackwardKernel.cu)",
    "grouped product": "fp32 and fp16 operands fall back to a loop on CUDA; the meta kernel "
    "refuses them (aten/src/ATen/native/cuda/GroupedBlas.cpp, torch/_meta_registrations.py)",
    "softmax gradient": "the gradient of softmax begins with grad * result in a tensor of its own "
    "(aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out)",
    "foreach norm": "partial sums of the norms of all gradients "
    "(aten/src/ATen/native/cuda/ForeachReduceOp.cu)",
    "foreach by default": "torch's optimizers and clip_grad_norm_ pick foreach on CUDA, loops on "
    "the CPU (torch/optim/optimizer.py, _default_to_fused_or_foreach)",
    "paged state": "get_paged, fill and prefetch_tensor work in managed memory, outside the "
    "allocator (bitsandbytes/functional.py); optimizers page from 100,000 elements",
    "host step counter": "foreach optimizers keep their step counters on the host "
    "(torch/optim/adamw.py, _init_group)",
    "cuBLAS workspaces": "one a thread (vramplan/estimate.py, num_cublaslt_threads)",
}


# -- the engine ------------------------------------------------------------------------------------

# references to a gradient in the engine's input buffer, seen from a dispatch mode: the buffer, the
# call's argument, Python's object and its owner; to its storage: the tensor and Python's object
SOLE_TENSOR_REFERENCES = 4
SOLE_STORAGE_REFERENCES = 2


FILLING = (aten.index_put.default, aten.scatter.src, aten.scatter.value)


def sums_in_place(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether CUDA would do this in place.

    Either the engine adds a gradient to one that nobody else holds, or a node fills the zeros
    that it made.

    Source: torch ``csrc/autograd/input_buffer.cpp`` (``can_accumulate_inplace``),
    ``csrc/autograd/FunctionsManual.cpp`` (``index_backward``,
    ``value_selecting_reduction_backward_symint``).

    Known limitations:
        A sum of two tensors of the same size inside a node's C++ backward looks the same.
    """
    if func in FILLING:
        return torch._C._current_autograd_node() is not None
    if func is not aten.add.Tensor or len(args) != 2 or kwargs:
        return False
    old, new = args
    if not isinstance(new, torch.Tensor) or old.shape != new.shape or old.dtype != new.dtype:
        return False
    storage = old.untyped_storage()
    return (
        torch._C._current_autograd_node() is not None
        and old._base is None
        and old._use_count() <= SOLE_TENSOR_REFERENCES
        and torch._C._storage_Use_Count(storage._cdata) <= SOLE_STORAGE_REFERENCES
        and torch._prims_common.is_non_overlapping_and_dense_or_false(old)
    )


# -- autocast and kernels seen from Python ---------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FP32_LIST = _names("""
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__
    __rpow__ softplus layer_norm group_norm norm nuclear_norm cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss
    mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
""")
OPT_DTYPE_LIST = _names("""
    prod softmax log_softmax cumprod cumsum sum vector_norm
""")
PROMOTE_LIST = _names("""
    addcdiv addcmul atan2 bilinear cross dot grid_sample index_put index_put_ scatter_add
    scatter_add_ tensordot
""")
NATIVE_PROMOTION = frozenset(("cat", "concat", "concatenate", "stack"))


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in HALVES:
        return value.to(dtype)
    return value


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALVES


class CudaFunctions(TorchFunctionMode):  # type: ignore[misc]
    """Functions that run otherwise on CUDA.

    Args:
        books: Where attention writes its workspaces.
        capability: Compute capability of the card, which decides the attention kernel.
        routing: Told of every mask of experts.
    """

    def __init__(self, books: Books, capability: tuple[int, int], routing: EvenRouting) -> None:
        super().__init__()
        self.books, self.capability, self.routing = books, capability, routing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function as CUDA would."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        autocast = torch.is_autocast_enabled("cpu")
        if name == "scaled_dot_product_attention":
            return scaled_dot_product_attention(
                func, self.books, self.capability, autocast, *args, **kwargs
            )
        if autocast:
            if name in FP32_LIST:
                # the arguments of a C++ call are cast last to first
                kwargs = {key: _to(value, torch.float32) for key, value in kwargs.items()}
                args = tuple([_to(value, torch.float32) for value in args[::-1]][::-1])
            elif name in OPT_DTYPE_LIST and _is_half(args[0]) and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.float32}
            elif name in PROMOTE_LIST:
                widest = any(isinstance(a, torch.Tensor) and a.dtype is torch.float32 for a in args)
                args = tuple(_to(value, torch.float32) for value in args) if widest else args
            elif name in NATIVE_PROMOTION:
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
        if name in ("softmax", "log_softmax"):
            return _softmax(func, name, args, kwargs)
        if name == "one_hot":
            self.routing.one_hot(args, kwargs)
        if name == "rand" and args == ([],):
            return 1.0
        if name == "dropout":
            return _dropout(func, *args, **kwargs)
        return func(*args, **kwargs)


def _softmax(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """``softmax(half, dtype=float32)``: one kernel."""
    dtype = kwargs.get("dtype")
    if args[0].dtype is not torch.float16 or dtype is not torch.float32:
        return func(*args, **kwargs)
    dim = kwargs["dim"] if "dim" in kwargs else args[1]
    kernel = torch._softmax if name == "softmax" else torch._log_softmax
    return kernel(args[0], dim, True)


def _dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """``native_dropout``: result and a byte mask."""
    if not training or p in (0.0, 1.0) or inplace:
        return func(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


# -- inside kernels --------------------------------------------------------------------------------


def hidden_bytes(books: Books) -> dict[Any, Hidden]:
    """What CUDA kernels take for themselves while they run."""

    def gemm_4bit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        x, _packed, shape = args[:3]
        absmax_8bit = args[7] if len(args) > 7 else kwargs.get("absmax_8bit")
        if x.numel() // x.shape[-1] <= FUSED_MAX_TOKENS:
            return []
        blocks = -(-shape[0] * shape[1] // 64) * 4
        nested = [blocks, blocks] if absmax_8bit is not None else []
        return [*nested, shape[0] * shape[1] * x.element_size()]

    def embedding_backward(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
        count, width = args[1].numel(), args[0].shape[-1]
        if count <= SORTED_EMBEDDING_TOKENS:
            return []
        segments = min(count, args[2])
        parts = count // SORTED_EMBEDDING_ROWS + segments
        return [count * 8] * 3 + [segments * 8] * 2 + [parts * 8, parts * width * 4]

    def softmax_gradient(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
        return [args[0].numel() * args[0].element_size()]

    def foreach_norm(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
        chunks = max(-(-tensor.numel() // FOREACH_CHUNK) for tensor in args[0])
        return [sum(map(books.copies, args[0])) * chunks * 4]

    def safe_softmax(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
        return [args[0].numel() * args[0].element_size(), args[0].numel()]

    def int8_quant(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
        return [args[0].numel() * 2, args[0].numel()]  # absolute values, which are outliers

    def int8_product(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[int]:
        x, _, weight = args[:3]
        numel = x.numel() // x.shape[-1] * weight.shape[0]
        return [numel * 4, 0 if x.dtype is torch.float16 else numel * 2]

    return {
        aten._safe_softmax.default: safe_softmax,
        torch.ops.bitsandbytes.int8_vectorwise_quant.default: int8_quant,
        torch.ops.bitsandbytes.int8_mixed_scaled_mm.default: int8_product,
        torch.ops.bitsandbytes.gemm_4bit.default: gemm_4bit,
        aten.embedding_dense_backward.default: embedding_backward,
        aten._softmax_backward_data.default: softmax_gradient,
        aten._foreach_norm.Scalar: foreach_norm,
    }


def answers(routing: EvenRouting) -> dict[Any, Callable[..., Any]]:
    """What depends on contents: a mask of ones passes every test, no column is an outlier.

    Args:
        routing: Answers for a loop over experts.
    """

    def int8_quant(x: Any, threshold: float = 0.0) -> Any:
        rows = x.numel() // x.shape[-1]
        scales = torch.empty(rows, dtype=torch.float32)
        return torch.empty(x.shape, dtype=torch.int8), scales, torch.empty(0, dtype=torch.int64)

    def int8_product(x: Any, _quantised: Any, weight: Any, *_rest: Any) -> Any:
        out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
        return out, torch.empty(0, dtype=x.dtype)

    return {
        aten._local_scalar_dense.default: routing.scalar,
        aten.nonzero.default: routing.nonzero,
        torch.ops.bitsandbytes.int8_vectorwise_quant.default: int8_quant,
        torch.ops.bitsandbytes.int8_mixed_scaled_mm.default: int8_product,
    }


# -- managed memory --------------------------------------------------------------------------------


class PagedBooks:
    """Managed memory that optimizers take: bytes, not blocks of the device."""

    def __init__(self, books: Books) -> None:
        self.books, self.nbytes = books, 0

    def get_state_buffer(self, optimizer: Any, p: Any, dtype: torch.dtype = torch.float32) -> Any:
        """Optimizer8bit.get_state_buffer on a CUDA parameter."""
        buffer = torch.zeros_like(p, dtype=dtype)
        if optimizer.is_paged and p.numel() >= 1e5:
            self._page(buffer, p)
        return buffer

    def get_double_buffer(self, optimizer: Any, p: Any, dtype: torch.dtype = torch.float32) -> Any:
        """AdEMAMix._get_state_double_buffer on a CUDA parameter."""
        buffer = torch.zeros((2, *p.shape), dtype=dtype)
        if optimizer.is_paged and p.numel() >= 1e5:
            self._page(buffer, p)
        return buffer

    def _page(self, buffer: Any, p: Any) -> None:
        self.nbytes += buffer.numel() * buffer.element_size() * self.books.copies(p)
        self.books.forget(buffer)
        buffer.is_paged = True


@contextmanager
def corrected(
    books: Books, capability: tuple[int, int], routing: EvenRouting
) -> Iterator[PagedBooks]:
    """All rules that work from outside the dispatch mode, in force."""
    asked = torch.is_autocast_enabled
    paged = PagedBooks(books)

    def is_autocast_enabled(device_type: str = "cpu") -> bool:
        return bool(asked(device_type))

    def get_state_buffer(self: Any, p: Any, dtype: torch.dtype = torch.float32) -> Any:
        return paged.get_state_buffer(self, p, dtype)

    def get_double_buffer(self: Any, p: Any, dtype: torch.dtype = torch.float32) -> Any:
        return paged.get_double_buffer(self, p, dtype)

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    def grouped_mm(
        a: Any, b: Any, *, scale_a: Any, scale_b: Any, offs: Any, bias: Any, scale_result: Any,
        out_dtype: Any,
    ) -> Any:  # fmt: skip
        return meta._create_grouped_mm_output_tensor(a, b, offs, out_dtype)

    with ExitStack() as stack:
        for where, name, value in (
            (torch, "is_autocast_enabled", is_autocast_enabled),
            (meta, "_meta_grouped_mm_common", grouped_mm),
            (bnb_optimizer.Optimizer8bit, "get_state_buffer", get_state_buffer),
            (bnb_ademamix.AdEMAMix, "_get_state_double_buffer", get_double_buffer),
            # it remembers overrides by a parameter's place in its group, beyond one optimizer
            (bnb_optimizer.GlobalOptimManager, "_instance", None),
            (bnb_optimizer, "sync_gpu", nothing),
            (bnb_functional, "prefetch_tensor", nothing),
            (bnb_functional, "is_on_gpu", nothing),
            (bnb_autograd, "MatMul8bitFp", bnb_autograd.MatMul8bitLt),
        ):
            stack.enter_context(patch.object(where, name, value))
        if hasattr(hf_imports, "is_fake_tensor"):  # versions before 5.0 do not ask
            stack.enter_context(patch.object(hf_imports, "is_fake_tensor", lambda _x: False))
        stack.enter_context(CudaFunctions(books, capability, routing))
        yield paged
