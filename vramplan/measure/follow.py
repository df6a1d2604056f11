"""Following any program through its modules, backward passes and optimizer steps.

Torch's hooks for all modules and all optimizers tell where the program is; nothing of the user's
has to be changed or named. What they note goes beside the allocator's trace (see ``holdings``).
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from vramplan.measure import labels
from vramplan.measure.blocks import Mark
from vramplan.measure.holdings import Notes
from vramplan.measure.region import is_out_of_memory
from vramplan.names import HEADS, OUTSIDE, owner_of
from vramplan.timeline import Kind

_SEEN = "vramplan"  # in the metadata of an autograd node that is followed
# torch.compile, FSDP; DDP and DataParallel call the model "module"
_WRAPPERS = re.compile(r"(?:^module\.|\b_orig_mod\.|\b_fsdp_wrapped_module\.)")


class _Root:
    """An outermost module: the names of all that is in it. Does not keep it alive."""

    def __init__(self, module: Any, prefix: str, forget: Callable[[Any], None]) -> None:
        self.module = weakref.ref(module, forget)
        self.prefix = prefix
        self.owners = {id(m): self.name(name) for name, m in module.named_modules()}
        self.names = {id(p): self.name(name) for name, p in module.named_parameters()}

    def name(self, name: str) -> str:
        """What owners are called in measurements."""
        bare = _WRAPPERS.sub("", f"{name}.").removesuffix(".")
        if not self.prefix:
            return owner_of(bare)
        return f"{self.prefix}.{owner_of(bare)}" if bare else self.prefix

    def tensors(self) -> Iterator[labels.Owned]:
        """What it holds now."""
        module = self.module()
        if module is not None:
            for tensor, kind, name in (*labels.weights(module), *labels.gradients(module)):
                yield tensor, kind, self.name(name)


class Follower:
    """Marks and labels what happens until ``close``.

    Args:
        notes: Where they go.
        count: Tells the allocations made so far.
        allocated: Tells the bytes allocated.
        device: Type of the device whose memory is followed, such as "cuda".

    Known limitations:
        One thread runs modules at a time (backward's threads run while it waits). Inside a compiled
        module its parts are not told apart. A backward begun with ``torch.autograd.grad`` begins
        with the first module's output.
    """

    def __init__(
        self, notes: Notes, count: Callable[[], int], allocated: Callable[[], int], device: str
    ) -> None:
        self.notes, self._count, self._allocated, self._device = notes, count, allocated, device
        self.phase = OUTSIDE
        self._roots: list[_Root] = []
        self._optimizers: list[Any] = []  # weak references
        self._stack: list[str] = []
        self._backward_module = ""
        self._owners: dict[int, str] = {}  # id of a module -> its name
        self._names: dict[int, str] = {}  # id of a parameter -> its name
        self._open = True
        self._backward = torch.autograd.backward
        torch.autograd.backward = self._marked_backward
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        """Take every hook out again."""
        self._open = False
        for handle in self._handles:
            handle.remove()
        if torch.autograd.backward == self._marked_backward:  # nobody wrapped it meanwhile
            torch.autograd.backward = self._backward

    def relabel(self, *, discover: bool = False) -> None:
        """Name everything that is known, where it is now.

        Args:
            discover: Where no module has run, look for those that were made.
        """
        if discover and not self._roots:
            for module in _outermost_modules():
                self._adopt(module)
        for root in self._roots:
            self._label(root.tensors())
        for optimizer in filter(None, (known() for known in self._optimizers)):
            self._label(labels.optimizer_state(optimizer, self._names))

    # -- modules ---------------------------------------------------------------------------------

    def _enter(self, module: Any, _inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._stack and not _in_backward():
            self._begin(module)
        self._stack.append(self._owners.get(id(module)) or type(module).__name__)
        self._mark()

    def _leave(self, _module: Any, _inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._stack:
            return
        owner = self._stack.pop()
        if output is None and is_out_of_memory(sys.exc_info()[1]):
            return  # the failed allocation stays with the module that asked
        if self.phase != "loss":
            self._follow_back(output, owner)
        if self._ends_in_loss(owner, output):
            self.phase = "loss"
        elif not self._stack and self.phase == "evaluate":
            self.phase = OUTSIDE
        self._mark()

    def _follow_back(self, output: Any, owner: str) -> None:
        """Have it said when the backward comes to a module; its innermost part counts."""
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        node = getattr(first, "grad_fn", None)
        if node is not None and _SEEN not in node.metadata:
            node.metadata[_SEEN] = True
            node.register_prehook(lambda _gradients: self._enter_backward(owner))

    def _ends_in_loss(self, owner: str, output: Any) -> bool:
        """Whether what follows a module is the loss: after the head, or the whole model."""
        if self.phase != "forward" or output is None:  # None: it raised
            return False
        return owner.endswith(HEADS) if self._stack else _needs_backward(output)

    def _begin(self, module: Any) -> None:
        """An outermost module is about to run."""
        if id(module) not in self._owners:
            self._adopt(module)
        if self.phase == "loss" and next(module.parameters(), None) is None:
            return  # the loss as a module of its own
        self.phase = "forward" if torch.is_grad_enabled() else "evaluate"

    def _adopt(self, module: Any) -> None:
        root = _Root(module, self._prefix(type(module).__name__), self._forget)
        self._roots.append(root)
        self._index()
        self._label(root.tensors())

    def _prefix(self, name: str) -> str:
        """The first model goes without; later ones are told apart by their class."""
        if not self._roots:
            return ""
        taken = {root.prefix for root in self._roots}
        numbered = (f"{name}-{n}" if n > 1 else name for n in itertools.count(1))
        return next(prefix for prefix in numbered if prefix not in taken)

    def _forget(self, reference: Any) -> None:
        self._roots = [root for root in self._roots if root.module is not reference]
        self._index()

    def _index(self) -> None:
        newest_first = self._roots[::-1]  # a name once given stays
        self._owners = {k: name for root in newest_first for k, name in root.owners.items()}
        self._names = {k: name for root in newest_first for k, name in root.names.items()}

    # -- backward --------------------------------------------------------------------------------

    def _marked_backward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._open:  # somebody kept it
            return self._backward(*args, **kwargs)
        self._enter_phase("backward")
        result = self._backward(*args, **kwargs)
        for root in self._roots:
            self._label(root.tensors())
        self._enter_phase(OUTSIDE)
        return result

    def _enter_backward(self, owner: str) -> None:
        if self._open:
            self.phase = "backward"
            self._backward_module = owner
            self._mark()

    # -- optimizers ------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if all(known() is not optimizer for known in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        self._label_state(optimizer)
        self._enter_phase("step")

    def _after_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._label_state(optimizer)
        self.notes.steps.append((self._count(), self._allocated()))
        self._enter_phase(OUTSIDE)

    def _label_state(self, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._label(
            (parameter.grad, Kind.GRADIENTS, self._names.get(id(parameter), "optimizer"))
            for parameter in parameters
        )
        state = list(labels.optimizer_state(optimizer, self._names))
        self._label(state)
        for tensor, _, _ in state:
            if getattr(tensor, "is_paged", False):
                size = tensor.numel() * tensor.element_size()
                self.notes.paged[tensor.data_ptr()] = size

    # -- notes -----------------------------------------------------------------------------------

    def _enter_phase(self, phase: str) -> None:
        self.phase = phase
        self._backward_module = ""
        self._mark()

    def _mark(self) -> None:
        inside = bool(self._stack)
        owner = self._stack[-1] if inside else self._backward_module
        self.notes.marks.append(Mark(self._count(), self.phase, owner, inside))

    def _label(self, owned: Iterable[labels.Owned]) -> None:
        places = {
            tensor.untyped_storage().data_ptr(): (kind, owner_of(name))
            for tensor, kind, name in owned
            if tensor is not None and tensor.device.type == self._device
        }
        if places:
            self.notes.labels.append((self._count(), places))


def _outermost_modules() -> list[Any]:
    """Modules in no other module, the largest first."""
    # by type: asking an instance for its class can make lazy imports happen
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)]
    inner = {id(part) for module in found for part in module.__dict__.get("_modules", {}).values()}
    outermost = [module for module in found if id(module) not in inner]
    sizes = {id(m): sum(p.numel() for p in m.parameters()) for m in outermost}
    return sorted((m for m in outermost if sizes[id(m)]), key=lambda m: -sizes[id(m)])


def _in_backward() -> bool:
    """Whether autograd runs us: a checkpointed module that is computed again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _needs_backward(output: Any) -> bool:
    """Whether any tensor of a module's output has a backward to come."""
    parts = output.values() if isinstance(output, dict) else output
    several = parts if isinstance(output, (dict, tuple, list)) else (output,)
    return any(getattr(part, "grad_fn", None) is not None for part in several)
