"""The second witness: the real libraries' code, run on fake tensors, without a GPU.

transformers, peft, bitsandbytes, accelerate and torch execute two training steps on tensors that
have a shape and no contents. Every storage they make and drop is written to the same Timeline as
the estimate's. Where a fake CPU tensor behaves otherwise than a CUDA one, a named rule
(``vramplan/trace/rules.py``) says how and why.
"""

from __future__ import annotations

from vramplan.trace.run import Trace, trace

__all__ = ["Trace", "trace"]
