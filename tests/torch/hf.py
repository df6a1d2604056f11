"""The model as transformers, bitsandbytes and peft hold it, on the meta device."""

from __future__ import annotations

from vramplan.trace.build import build, held_bytes, quantise

__all__ = ["build", "held_bytes", "quantise"]
