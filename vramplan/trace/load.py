"""How a model's tensors come to the device: loaded, prepared, adapted, in that order.

The order and what passes through decide what the caching allocator holds when training begins.

Source: transformers 5.17.0 ``core_model_loading.py`` (tensor by tensor, quantised as they come),
bitsandbytes 0.50.2 ``functional.py`` (``quantize_4bit``), peft 0.21.0 ``utils/other.py``
(``prepare_model_for_kbit_training``), ``tuners/tuners_utils.py`` (``cast_adapter_dtype``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from vramplan.job import Job
from vramplan.names import owner_of
from vramplan.timeline import Phase
from vramplan.trace.build import DTYPES
from vramplan.trace.tracker import Block, Books


class Held(NamedTuple):
    """A tensor of a module on meta: one of its parameters or buffers."""

    module: Any
    key: str
    tensor: Any
    is_parameter: bool
    owner: str
    added: bool


def load(model: Any, job: Job, books: Books) -> None:
    """Replace a model's tensors on meta by fake CPU tensors; call it under FakeTensorMode.

    Quantised weights become plain Parameters that carry their quantisation state.

    Args:
        model: The prepared model on meta.
        job: Its job.
        books: Where the allocations are written, those of equal layers layer by layer.
    """
    maker = _Maker(job, books)
    held = list(_held(model))
    base, added = [x for x in held if not x.added], [x for x in held if x.added]
    cast = job.quantised and job.prepare_kbit
    later = [x for x in base if maker.bring(x, cast=cast and x.is_parameter)]
    books.phase = Phase.PREPARE
    maker.cast(later)
    if cast:
        books.empty_cache()
    # adapters come in the base layer's dtype where that is a 16-bit one
    maker.cast([x for x in added if maker.bring(x, cast=not job.quantised and "lora_" in x.key)])
    _bring_scalars(model, books)
    books.layer = None


def _bring_scalars(model: Any, books: Books) -> None:
    """Numbers that a module keeps as plain tensors stay on the host, as GPT-J's ``scale_attn``."""
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.is_meta and value.dim() == 0:
                scalar = torch.empty((), dtype=value.dtype)
                books.forget(scalar)
                setattr(module, key, scalar)


def _held(model: Any) -> Iterator[Held]:
    for name, module in model.named_modules():
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for key, tensor in list(tensors.items()):
                if tensor is not None:
                    path = f"{name}.{key}"
                    added = "lora_" in path or ".modules_to_save." in path
                    yield Held(module, key, tensor, is_parameter, owner_of(path), added)


class _Maker:
    def __init__(self, job: Job, books: Books) -> None:
        self.job, self.books = job, books
        self.loaded = DTYPES[job.dtype]
        # the meta tensor is kept, or its id could come again
        self.made: dict[int, tuple[Any, Any]] = {}
        self.parameters: dict[int, Any] = {}
        self.waiting: dict[int, Block] = {}

    def bring(self, held: Held, *, cast: bool) -> bool:
        """Make a tensor, or only write its size as loaded if it is cast later on.

        Returns:
            Whether ``cast`` has to see it again.
        """
        old = held.tensor
        self.books.layer = self.books.layer_of(held.owner)
        if id(old) in self.waiting:
            return True
        if cast and id(old) not in self.made and old.dtype is torch.float32 is not self.loaded:
            kind, owner = self.books.place()
            self.waiting[id(old)] = self.books.allocate(
                old.numel() * self.loaded.itemsize, kind, owner
            )
            return True
        with self.books.scratch(self._passing(held)):
            self._replace(held)
        return False

    def cast(self, held: list[Held]) -> None:
        """What was loaded in 16 bits becomes fp32, one after another."""
        for each in held:
            self.books.layer = self.books.layer_of(each.owner)
            self._replace(each)
            block = self.waiting.pop(id(each.tensor), None)
            if block is not None:
                self.books.release(block)

    def _passing(self, held: Held) -> list[int]:
        """What quantising a weight needs: the weight as loaded, and scales before their own."""
        module, state = held.module, getattr(held.tensor, "quant_state", None)
        if state is None and getattr(held.tensor, "SCB", None) is None:
            return []
        whole = module.out_features * module.in_features * self.loaded.itemsize
        scales = state.absmax.numel() * 4 if state is not None and state.nested else 0
        return [whole, scales, scales]

    def _replace(self, held: Held) -> None:
        old = held.tensor
        if not held.is_parameter:
            held.module._buffers[held.key] = self._fake(old)
            return
        if id(old) not in self.parameters:
            new = torch.nn.Parameter(self._fake(old), requires_grad=old.requires_grad)
            self._carry_quantisation(held.module, old, new)
            self.parameters[id(old)] = new
        held.module._parameters[held.key] = self.parameters[id(old)]

    def _fake(self, tensor: Any) -> Any:
        if id(tensor) not in self.made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self.made[id(tensor)] = tensor, new
        return self.made[id(tensor)][1]

    def _carry_quantisation(self, module: Any, old: Any, new: Any) -> None:
        state = getattr(old, "quant_state", None)
        if state is not None:
            state = copy.copy(state)
            state.absmax, state.code = self._fake(state.absmax), self._fake(state.code)
            if state.nested:
                state.offset = self._fake(state.offset)
                state.state2 = copy.copy(state.state2)
                state.state2.absmax = self._fake(state.state2.absmax)
                state.state2.code = self._fake(state.state2.code)
            new.quant_state = state
            new.bnb_quantized = True
            module.quant_state = state
        elif getattr(old, "SCB", None) is not None:
            new.SCB = self._fake(old.SCB)
            new.CB = new.data
