"""Work: what a stretch of a training step asks of the host and of the card, before any rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vramplan.timeline import Phase

# One matrix product or fused attention kernel: what runs it (a dtype's name, "int8" or
# "attention"), its floating point operations, and the bytes of its operands; what it writes is in
# ``Work.moved_bytes``. A plain tuple, as every walk makes hundreds.
Product = tuple[str, int, int]


class Work(NamedTuple):
    """A stretch of the step between two points, done ``repeats`` times (identical layers).

    Attributes:
        phase: Phase at its end.
        repeats: How often it happens.
        products: Matrix products and attention.
        num_launches: Operations launched from Python, in forward and in recomputation: one for
            every tensor made.
        num_engine_launches: The same from autograd's C++ engine.
        num_layers: Calls of linear layers, a layer with an adapter counted once.
        num_frames: Checkpointed calls run again.
        num_quantised: Calls of bitsandbytes' autograd functions, forward or backward.
        moved_bytes: Bytes that kernels read and write, operands of ``products`` left out.
        dequantised: Quantised weights turned into 16-bit ones, in elements.
    """

    phase: Phase
    repeats: int
    products: tuple[Product, ...]
    num_launches: int
    num_engine_launches: int
    num_layers: int
    num_frames: int
    num_quantised: int
    moved_bytes: int
    dequantised: int


def total_flops(work: Iterable[Work]) -> int:
    """Floating point operations of all stretches."""
    return sum(w.repeats * sum(p[1] for p in w.products) for w in work)
