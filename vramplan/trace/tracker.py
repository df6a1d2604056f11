"""Counts storages: every block that an operation makes, until its last reference goes.

Source: the technique of torch 2.13 ``distributed/_tools/mem_tracker.py`` (a dispatch mode sees the
outputs of every operation, weak references on their storages see them go). Owners come from module
hooks; in backward from the node at work, whose sequence number says in which module it was made.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes  # noqa: F401 - registers its operations
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vramplan.names import HEADS, owner_of
from vramplan.replay import EMPTY_CACHE, TRAINING_BEGINS
from vramplan.timeline import Kind, Phase
from vramplan.units import round_block

PRODUCTS = frozenset(
    (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
     torch.ops.aten.baddbmm.default, torch.ops.bitsandbytes.gemm_4bit.default)
)  # fmt: skip
Hidden = Callable[[tuple[Any, ...], dict[str, Any]], list[int]]


class Block:
    """One block of device memory; what it is for may become known only later.

    Attributes:
        layer: Decoder layer that it belongs to, None for none.
        together: Whether an operation on many tensors made it beside those of the other layers.
    """

    __slots__ = ("kind", "layer", "nbytes", "number", "owner", "together")

    def __init__(self, number: int, nbytes: int, kind: Kind, owner: str, layer: int | None) -> None:
        self.number, self.nbytes, self.kind, self.owner = number, nbytes, kind, owner
        self.layer, self.together = layer, False


class Books:
    """Blocks and where the run is.

    Attributes:
        phase: Where the run is.
        step: Number of the step, 0 before training.
        layer: Decoder layer at work in forward or backward, None outside of them.
        entries: (block, sign, phase, step, layer) in the order of the run.
        layers_path: Path of the decoder layers.
        middle: Layers of a cut model that stand for others.
        repeats: How many each of them stands for.
        round_size: What the allocator makes of a request, in bytes.
    """

    def __init__(self) -> None:
        self.phase = Phase.LOAD
        self.step = 0
        self.layer: int | None = None
        self.entries: list[tuple[Block, int, Phase, int, int | None]] = []
        self.layers_path = ""
        self.middle = range(0)
        self.repeats = 1
        self.leaves: dict[int, str] = {}  # id of a parameter -> its owner
        self.stack: list[str] = []
        self.decoder = ""
        self.recording = True
        self.round_size: Callable[[int], int] = round_block
        self.awaited: dict[bool, int] = {}  # backward's thread? -> its cuBLAS workspace, in bytes
        self._blocks: dict[int, tuple[weakref.ref[Any], Block]] = {}
        self._made_at: list[int] = []  # autograd sequence numbers at which the owner changed
        self._makers: list[tuple[str, Phase]] = []
        self._count = 0

    # -- blocks ----------------------------------------------------------------------------------

    def allocate(self, nbytes: int, kind: Kind, owner: str) -> Block:
        """Write an allocation."""
        self._count += 1
        block = Block(self._count, self.round_size(nbytes), kind, owner, self.layer)
        self.entries.append((block, 1, self.phase, self.step, self.layer))
        return block

    def release(self, block: Block) -> None:
        """Write a release."""
        if self.recording:
            self.entries.append((block, -1, self.phase, self.step, self.layer))

    def empty_cache(self) -> None:
        """Write a call of torch.cuda.empty_cache."""
        self._mark_at(EMPTY_CACHE)

    def begin_training(self) -> None:
        """Write where training begins."""
        self._mark_at(TRAINING_BEGINS)

    def _mark_at(self, number: int) -> None:
        self.layer = None
        block = Block(number, 0, Kind.WORKSPACE, "", None)
        self.entries.append((block, 1, self.phase, self.step, None))

    def first_product(self) -> None:
        """A thread's first matrix product makes cuBLAS's workspace of that thread."""
        nbytes = self.awaited.pop(self.phase is Phase.BACKWARD, 0)
        if nbytes:
            self.allocate(nbytes, Kind.WORKSPACE, "cublas")

    def follow(self, storage: Any, block: Block) -> None:
        """Release the block when the storage goes."""
        key = id(storage)

        def gone(_reference: Any) -> None:
            del self._blocks[key]
            self.release(block)

        self._blocks[key] = weakref.ref(storage, gone), block

    def block_of(self, tensor: Any) -> Block | None:
        """The block under a tensor, None if it was never counted."""
        entry = self._blocks.get(id(tensor.untyped_storage()))
        return entry[1] if entry else None

    def hand_over(self, old: Any, new: Any) -> None:
        """The result of an operation that CUDA runs in place: ``new`` takes old's block."""
        storage = old.untyped_storage()
        entry = self._blocks.pop(id(storage), None)
        if entry is not None:
            self.follow(new.untyped_storage(), entry[1])

    def forget(self, tensor: Any) -> None:
        """A tensor that lies outside the device: its allocation never happened."""
        storage = tensor.untyped_storage()
        entry = self._blocks.pop(id(storage), None)
        if entry is not None:
            block = entry[1]
            self.entries = [item for item in self.entries if item[0] is not block]

    def label(self, owned: Iterable[tuple[Any, Kind, str]]) -> None:
        """Say what the blocks under these tensors are for."""
        for tensor, kind, owner in owned:
            block = self.block_of(tensor) if tensor is not None else None
            if block is not None:
                block.kind, block.owner = kind, owner
                if block.layer is None:
                    block.layer = self.layer_of(owner)

    @contextmanager
    def scratch(self, sizes: list[int]) -> Iterator[None]:
        """Blocks that a kernel takes for itself."""
        owner = self.place()[1]
        held = [self.allocate(nbytes, Kind.WORKSPACE, owner) for nbytes in sizes if nbytes]
        yield
        for block in held:
            self.release(block)

    def layer_of(self, owner: str) -> int | None:
        """The decoder layer that a module is in."""
        if not self.layers_path or not owner.startswith(self.layers_path):
            return None
        number = owner[len(self.layers_path) :].partition(".")[0]
        return int(number) if number.isdigit() else None

    def copies(self, tensor: Any) -> int:
        """How many equal tensors of the real model this one stands for."""
        block = self.block_of(tensor)
        return self.repeats if block is not None and block.layer in self.middle else 1

    # -- whose it is -----------------------------------------------------------------------------

    def enter_module(self, owner: str) -> None:
        """A module's forward begins."""
        self.stack.append(owner)
        self.layer = self.layer_of(owner)
        self._mark()

    def leave_module(self) -> None:
        """It ends."""
        if self.stack:
            self.stack.pop()
        self._mark()

    def enter_phase(self, phase: Phase) -> None:
        """Another part of the run begins."""
        self.phase = phase
        self.layer = None
        if phase in (Phase.BACKWARD, Phase.STEP):
            self.stack.clear()
        self._mark()

    def _mark(self) -> None:
        """Autograd nodes made from now on belong to the module now at work."""
        owner = "loss" if self.phase is Phase.LOSS else self.stack[-1] if self.stack else ""
        self._made_at.append(torch._C._autograd._get_sequence_nr())
        self._makers.append((owner, self.phase))

    def _maker(self, node: Any) -> tuple[str, Phase]:
        """Module and phase in which an autograd node was made."""
        variable = getattr(node, "variable", None)  # of an AccumulateGrad node
        if variable is not None:
            return self.leaves.get(id(variable), "loss"), Phase.FORWARD
        index = bisect.bisect_right(self._made_at, node._sequence_nr()) - 1
        return self._makers[index] if index >= 0 else ("", Phase.BACKWARD)

    def place(self) -> tuple[Kind, str]:
        """What a block made now is for, and whose it is."""
        if self.phase is Phase.STEP:
            return Kind.WORKSPACE, "optimizer"
        if self.phase is Phase.LOSS:
            return Kind.LOGITS, "loss"
        if self.stack:
            return _in_module(self.stack[-1], self.decoder)
        if self.phase is not Phase.BACKWARD:
            return Kind.BATCH, "batch"
        node = torch._C._current_autograd_node()
        owner, phase = self._maker(node) if node is not None else ("loss", Phase.LOSS)
        self.layer = self.layer_of(owner)
        if phase is Phase.LOSS or not owner:
            return Kind.LOGITS, "loss"
        return (Kind.LOGITS if owner.endswith(HEADS) else Kind.ACTIVATION_GRADIENTS), owner


def _in_module(owner: str, decoder: str) -> tuple[Kind, str]:
    """What a module's forward makes."""
    if owner.endswith(HEADS):
        return Kind.LOGITS, owner
    if owner == decoder:  # positions and masks
        return Kind.BATCH, owner
    return Kind.ACTIVATIONS, owner


class Tracker(TorchDispatchMode):  # type: ignore[misc]
    """Sees every operation's outputs.

    Args:
        books: Where blocks are written.
        hidden: Operation -> what its CUDA kernel takes for itself while it runs, in bytes.
        answers: Operation -> an answer that depends on contents, which fake tensors lack.
    """

    def __init__(
        self, books: Books, hidden: dict[Any, Hidden], answers: dict[Any, Callable[..., Any]]
    ) -> None:
        super().__init__()
        self.books, self.hidden, self.answers = books, hidden, answers
        self.in_place_sum: Callable[..., bool] = lambda *_: False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and write what it allocates."""
        kwargs = kwargs or {}
        if self.books.awaited and func in PRODUCTS:
            self.books.first_product()
        run = self.answers.get(func, func)
        hidden = self.hidden.get(func)
        if hidden is not None:
            with self.books.scratch(hidden(args, kwargs)):
                return self._count(func, args, run(*args, **kwargs))
        # a module at work in backward is being recomputed: its sums are its own
        engine = self.books.phase is Phase.BACKWARD and not self.books.stack
        if engine and self.in_place_sum(func, args, kwargs):
            out = func(*args, **kwargs)
            self.books.hand_over(args[0], out)
            return out
        return self._count(func, args, run(*args, **kwargs))

    def _count(self, func: Any, args: Any, out: Any) -> Any:
        books = self.books
        for index, tensor in enumerate(
            (out,) if isinstance(out, torch.Tensor) else tree_leaves(out)
        ):
            if not isinstance(tensor, torch.Tensor) or books.block_of(tensor) is not None:
                continue
            storage = tensor.untyped_storage()
            nbytes = storage.nbytes()
            if nbytes and books.recording:
                kind, owner = self._meaning(func, args)
                block = books.allocate(nbytes, kind, owner)
                if books.phase is Phase.STEP:
                    self._belongs(block, args, index)
                books.follow(storage, block)
        return out

    def _belongs(self, block: Block, args: Any, index: int) -> None:
        """In an optimizer's step a block belongs to the layer of the tensor it was made from."""
        first = args[0] if args else None
        if isinstance(first, (list, tuple)):
            block.together = len(first) > 1
            first = first[index] if index < len(first) else None
        source = self.books.block_of(first) if isinstance(first, torch.Tensor) else None
        if source is not None:
            block.layer = source.layer

    def _meaning(self, func: Any, args: Any) -> tuple[Kind, str]:
        """Dequantised weights are workspace, whatever they are cast to."""
        kind, owner = self.books.place()
        if func.namespace == "bitsandbytes" and "dequantize" in func._schema.name:
            return Kind.WORKSPACE, owner
        if func is torch.ops.aten._to_copy.default:
            source = self.books.block_of(args[0])
            if source is not None and source.kind is Kind.WORKSPACE:
                return Kind.WORKSPACE, owner
        return kind, owner


def watch_modules(books: Books, model: Any) -> None:
    """Note which module is at work, as ``vramplan measure --history`` does."""
    for name, module in model.named_modules():
        owner = owner_of(name)
        module.register_forward_pre_hook(lambda *_, owner=owner: books.enter_module(owner))
        module.register_forward_hook(lambda *_: books.leave_module(), always_call=True)
    table = model.get_input_embeddings()
    books.decoder = next(
        owner_of(name).rpartition(".")[0] for name, m in model.named_modules() if m is table
    )
