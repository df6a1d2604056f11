"""Number formats: one row is one new format.

Source: torch dtypes; bitsandbytes 0.50.2 ``functional.py`` (``quantize_4bit``: blocks of 64, the
16-entry code; nested statistics in blocks of 256 with a 256-entry code and an offset) and
``nn/modules.py`` (``Int8Params``: one fp32 scale per row).
"""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.errors import UnknownNameError


@dataclass(frozen=True, slots=True, eq=False)
class Dtype:
    """A floating point or integer format of tensors; ``size`` in bytes per element."""

    name: str
    size: int
    torch_name: str


FP32 = Dtype("fp32", 4, "float32")
BF16 = Dtype("bf16", 2, "bfloat16")
FP16 = Dtype("fp16", 2, "float16")
INT64 = Dtype("int64", 8, "int64")
INT32 = Dtype("int32", 4, "int32")
BOOL = Dtype("bool", 1, "bool")

DTYPES = {dtype.name: dtype for dtype in (BF16, FP16, FP32)}


def find_dtype(name: str) -> Dtype:
    """The dtype of that name ("bf16", "fp16", "fp32" or torch's name).

    Raises:
        UnknownNameError: If there is none.
    """
    for dtype in DTYPES.values():
        if name in (dtype.name, dtype.torch_name):
            return dtype
    raise UnknownNameError("dtype", name, DTYPES)


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How a quantised weight is stored.

    Attributes:
        name: Name for ``--quant-type``.
        bits: Bits per weight.
        block: Weights per scale; 0 means one scale per output row.
        nested: Whether the scales can be quantised again (double quantisation).
    """

    name: str
    bits: int
    block: int
    nested: bool

    def parts(self, rows: int, columns: int, double_quant: bool) -> tuple[tuple[str, int], ...]:
        """The device tensors that replace one weight.

        Args:
            rows: Output features of the layer.
            columns: Input features of the layer.
            double_quant: Whether scales are quantised again.

        Returns:
            Pairs of (name, bytes), one per allocation.
        """
        numel = rows * columns
        if self.block == 0:
            return (("weight", numel), ("SCB", rows * 4))
        packed = (numel * self.bits + 7) // 8
        blocks = -(-numel // self.block)
        code = ("code", 2**self.bits * 4)
        if not (double_quant and self.nested):
            return (("weight", packed), ("absmax", blocks * 4), code)
        return (
            ("weight", packed),
            ("absmax", blocks),
            code,
            ("nested_absmax", -(-blocks // 256) * 4),
            ("nested_code", 256 * 4),
            ("offset", 4),
        )


QUANT_FORMATS = {
    row.name: row
    for row in (
        QuantFormat("nf4", bits=4, block=64, nested=True),
        QuantFormat("fp4", bits=4, block=64, nested=True),
        QuantFormat("int8", bits=8, block=0, nested=False),
    )
}
