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

from vramplan.ops.attention import efficient_attention, fused_attention
from vramplan.ops.base import (
    autocast_weight,
    cat,
    copy,
    expand,
    pick,
    promote,
    slice_,
    split,
    to,
    transpose,
    view,
)
from vramplan.ops.elementwise import (
    ACTIVATIONS,
    activation,
    add,
    add_,
    add_scalar,
    bloom_gelu,
    dropout,
    gelu_fast,
    gelu_new,
    keep_input,
    mean,
    mul,
    neg,
    pow_scalar,
    rsqrt,
    scale,
    scale_,
    sub,
    subtract_max,
    tanh,
)
from vramplan.ops.experts import (
    clamp,
    fold_adapter,
    grouped_mm,
    index,
    masked_fill,
    masked_fill_,
    normalise_,
    permuted,
    sigmoid,
    sum_rows,
    topk,
)
from vramplan.ops.matrix import (
    baddbmm,
    batched_matmul,
    conv1d,
    falcon_linear,
    linear,
    matmul_4bit,
    matmul_8bit,
)
from vramplan.ops.norms import cross_entropy, embedding, layer_norm, safe_softmax, softmax

__all__ = [
    "ACTIVATIONS",
    "activation",
    "add",
    "add_",
    "add_scalar",
    "autocast_weight",
    "baddbmm",
    "batched_matmul",
    "bloom_gelu",
    "cat",
    "clamp",
    "conv1d",
    "copy",
    "cross_entropy",
    "dropout",
    "efficient_attention",
    "embedding",
    "expand",
    "falcon_linear",
    "fold_adapter",
    "fused_attention",
    "gelu_fast",
    "gelu_new",
    "grouped_mm",
    "index",
    "keep_input",
    "layer_norm",
    "linear",
    "masked_fill",
    "masked_fill_",
    "matmul_4bit",
    "matmul_8bit",
    "mean",
    "mul",
    "neg",
    "normalise_",
    "permuted",
    "pick",
    "pow_scalar",
    "promote",
    "rsqrt",
    "safe_softmax",
    "scale",
    "scale_",
    "sigmoid",
    "slice_",
    "softmax",
    "split",
    "sub",
    "subtract_max",
    "sum_rows",
    "tanh",
    "to",
    "topk",
    "transpose",
    "view",
]
