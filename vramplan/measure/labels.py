"""Which tensors a model, its gradients and its optimizer keep, and under what name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from vramplan.names import holder_of
from vramplan.timeline import Kind

Owned = tuple[Any, Kind, str]  # tensor, what it is for, name of its parameter or module


def weights(model: Any) -> Iterator[Owned]:
    """Parameters, what quantisation keeps beside them, and buffers."""
    trained = Kind.ADAPTERS if hasattr(model, "get_base_model") else Kind.WEIGHTS
    for name, parameter in model.named_parameters():
        yield parameter, trained if parameter.requires_grad else Kind.WEIGHTS, name
    for name, parameter in model.named_parameters():
        for tensor in _quant_tensors(parameter):
            yield tensor, Kind.WEIGHTS, name
    for name, buffer in model.named_buffers():
        yield buffer, Kind.WEIGHTS, holder_of(name)


def gradients(model: Any) -> Iterator[Owned]:
    """What parameters have as ``grad``."""
    for name, parameter in model.named_parameters():
        yield parameter.grad, Kind.GRADIENTS, name


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> Iterator[Owned]:
    """The state of every parameter.

    Args:
        optimizer: The innermost one, whose ``state`` is keyed by parameter.
        names: Name of each parameter by its id.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value) and not str(key).startswith("qmap"):  # shared by all
                yield value, Kind.OPTIMIZER, names.get(id(parameter), "optimizer")


def _quant_tensors(parameter: Any) -> Iterable[Any]:
    """The scales of a weight that bitsandbytes quantised."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [value for value in (getattr(parameter, "SCB", None),) if torch.is_tensor(value)]
    nested = state.state2 if state.nested else None
    parts = [
        state.absmax,
        state.code,
        state.offset,
        *((nested.absmax, nested.code) if nested else ()),
    ]
    return [part for part in parts if torch.is_tensor(part)]
