"""What a loop over experts asks of contents, answered as if tokens were spread evenly.

transformers before 5.0 runs a mixture expert by expert, on the tokens that ``nonzero`` finds in a
one-hot mask. Fake tensors have no contents: every expert is hit, by its equal share.

Source: transformers 4.57.6 ``models/mixtral/modeling_mixtral.py`` (``MixtralSparseMoeBlock``).

Known limitations:
    A real router is uneven, so the largest expert's activations are larger than these.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch


class EvenRouting:
    """Answers for the mixture at work."""

    def __init__(self) -> None:
        self.num_experts = 1
        self._hit: weakref.ref[Any] | None = None  # storage of the last list of experts

    def one_hot(self, args: Any, kwargs: Any) -> None:
        """Note how many experts a mask tells apart."""
        count = kwargs.get("num_classes", args[1] if len(args) > 1 else 1)
        self.num_experts = max(1, int(count))

    def nonzero(self, mask: Any) -> Any:
        """All experts of a list of them, else this expert's share of a mask of tokens."""
        if mask.dim() == 1:
            found = torch.empty((mask.numel(), 1), dtype=torch.int64)
            self._hit = weakref.ref(found.untyped_storage())
            return found
        share = -(-mask.numel() // self.num_experts)
        return torch.empty((share, mask.dim()), dtype=torch.int64)

    def scalar(self, tensor: Any) -> bool | int:
        """An expert's number is its place in the list; all else is as in a mask of ones."""
        if tensor.dtype is torch.bool:
            return True
        hit = self._hit() if self._hit is not None else None
        return int(tensor.storage_offset()) if hit is tensor.untyped_storage() else 1
