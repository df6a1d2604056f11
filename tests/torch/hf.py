"""The model as transformers, bitsandbytes and peft hold it, on the meta device."""

from __future__ import annotations

from typing import Any

from vramplan.trace.build import build, quant_tensors, quantise
from vramplan.units import round_block

__all__ = ["build", "held_bytes", "quantise"]


def held_bytes(model: Any) -> int:
    """Bytes of every distinct tensor the model holds, each rounded as the allocator does."""
    parameters = list(model.parameters())
    held = [*parameters, *model.buffers(), *(s for p in parameters for s in quant_tensors(p))]
    distinct = {id(tensor): tensor.numel() * tensor.element_size() for tensor in held}
    return sum(map(round_block, distinct.values()))
