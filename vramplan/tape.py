"""A sizes-only tensor runtime: PyTorch's memory behaviour without PyTorch.

A block program (``vramplan/families``) runs on these tensors as the modelling code runs on real
ones. A tensor here is a number of elements and a dtype over a storage; when the last reference to a
storage goes, its release is written to the timeline, exactly as reference counting frees CUDA
memory. Operations (``vramplan/ops.py``) build an autograd graph of nodes that hold what PyTorch's
nodes hold; ``Tape.run_backward`` executes it in the order and with the buffer rules of PyTorch's
engine. Non-reentrant checkpointing is modelled by its own mechanism: saved tensors become holders,
filled by running the block again when the first of them is needed.

Source: torch 2.11 ``csrc/autograd/engine.cpp`` (order, ``InputBuffer::accumulate``),
``csrc/autograd/functions/accumulate_grad.h`` (stealing a gradient), ``aten/src/ATen/
autocast_mode.cpp`` (what is cast and cached), ``torch/utils/checkpoint.py`` (holders, early stop),
``c10/core/AllocatorConfig.h`` (512-byte blocks).

Known limitations:
    Blocks have their rounded size; the slack of an unsplit cached block (below 1 MiB each) is the
    allocator's business, not the tape's.
"""

from __future__ import annotations

import heapq
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vramplan.formats import Dtype
from vramplan.timeline import Event, Kind, Phase, Section, Timeline
from vramplan.units import round_block
from vramplan.work import Product, Work

RawEvent = tuple[int, int, Kind, str, Phase, int]  # an Event's fields; cheaper to write
_getrefcount = sys.getrefcount


class Storage:
    """One block of device memory, released when the last tensor on it goes."""

    __slots__ = ("block", "copies", "kind", "nbytes", "owner", "tape")

    def __init__(self, tape: Tape, nbytes: int, kind: Kind, owner: str, copies: int = 1) -> None:
        if tape.round_size is not None:
            nbytes = tape.round_size(nbytes)
        self.tape = tape
        self.nbytes = nbytes
        self.kind = kind
        self.owner = owner
        self.copies = copies
        # written out here and in __del__: the innermost lines of every estimate
        tape.num_blocks = self.block = tape.num_blocks + 1
        tape.live_bytes = live = tape.live_bytes + nbytes * copies
        if live > tape.peak_bytes:  # noqa: PLR1730 - max() would be a call
            tape.peak_bytes = live
        tape.events.append((self.block, nbytes, kind, owner, tape.phase, copies))

    def __del__(self) -> None:
        tape, nbytes, copies = self.tape, self.nbytes, self.copies
        tape.live_bytes -= nbytes * copies
        tape.events.append((self.block, -nbytes, self.kind, self.owner, tape.phase, copies))


class Tensor:
    """Number of elements and dtype over a storage; ``node`` is its grad_fn, None if none.

    ``aliased`` marks a gradient that went through a view operation: its base keeps the storage
    shared, so the engine never adds to it in place.
    """

    __slots__ = ("aliased", "dtype", "node", "numel", "storage")

    def __init__(
        self, storage: Storage | None, numel: int, dtype: Dtype, node: Node | Param | None = None
    ) -> None:
        self.storage = storage
        self.numel = numel
        self.dtype = dtype
        self.node = node
        self.aliased = False


def alias(x: Tensor) -> Tensor:
    """Another tensor over the same storage, as view operations make."""
    out = Tensor(x.storage, x.numel, x.dtype)
    out.aliased = True
    return out


class Param(Tensor):
    """A leaf: a parameter. ``copies`` identical ones exist (one per folded layer).

    ``trainable`` is its requires_grad; ``node`` is None for a trainable one too under no_grad.
    """

    __slots__ = (
        "copies", "embedding", "grad", "matrices", "owner", "pending", "rows", "trainable",
        "waiting",
    )  # fmt: skip
    grad_kind = Kind.GRADIENTS

    def __init__(
        self, storage: Storage, numel: int, dtype: Dtype, trainable: bool, owner: str, copies: int
    ) -> None:
        super().__init__(storage, numel, dtype)
        self.trainable = trainable
        self.node = self if trainable else None
        self.grad: Tensor | None = None
        self.owner = owner
        self.copies = copies
        self.rows = 0
        self.matrices = 1
        self.embedding = False
        self.pending: Tensor | None = None  # AccumulateGrad's input buffer
        self.waiting = 0


class Leaf(Param):
    """An activation that is a leaf: its gradient stays with it until someone lets go of both."""

    __slots__ = ()
    grad_kind = Kind.ACTIVATION_GRADIENTS

    def release(self) -> None:
        """The graph goes; a leaf is its own node."""
        self.node = self.grad = None


class Holder:
    """Stands for a tensor that checkpointing did not keep; filled by recomputation."""

    __slots__ = ("frame", "value")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.value: Tensor | None = None


class Frame:
    """One checkpointed call: how to run it again and the holders it left in the graph."""

    __slots__ = ("cursor", "holders", "num_saved", "recompute")

    def __init__(self, recompute: Callable[[], object]) -> None:
        self.recompute = recompute
        self.holders: list[Holder] = []
        self.num_saved = 0
        self.cursor = 0


class StopRecomputation(Exception):
    """Everything the backward needs has been recomputed."""


Saved = Tensor | Holder
BackwardFn = Callable[["Tape", "Node", Tensor], Sequence[Tensor | None]]


class Node:
    """One autograd node with a single output gradient.

    ``edges`` lead to the producers of its inputs; ``backward(tape, node, grad)`` returns one
    gradient per edge (None where there is no edge). ``saved`` is what it keeps alive.
    """

    __slots__ = ("args", "backward", "edges", "grad", "kind", "owner", "saved", "seq", "waiting")

    def __init__(
        self,
        seq: int,
        edges: tuple[Node | Param | None, ...],
        backward: BackwardFn,
        saved: tuple[Saved, ...],
        owner: str,
        kind: Kind,
        args: tuple[Any, ...] = (),
    ) -> None:
        self.seq = seq
        self.edges = edges
        self.backward = backward
        self.saved: tuple[Saved, ...] = saved
        self.owner = owner
        self.kind = kind
        self.args = args
        self.grad: Tensor | None = None
        self.waiting = 0


class Tape:
    """Runs one training step and writes its Timeline.

    Args:
        autocast: Low-precision dtype of the autocast context, None when there is none.
        round_size: What the allocator makes of a size that is rounded to 512 bytes, None when it
            leaves it as it is.
    """

    def __init__(
        self,
        autocast: Dtype | None = None,
        round_size: Callable[[int], int] | None = None,
    ) -> None:
        self.autocast = autocast
        self.round_size = round_size
        self.low_precision = autocast
        self.phase = Phase.LOAD
        self.owner = ""
        self.kind = Kind.ACTIVATIONS
        self.two_dimensional = False  # inside ``flattened``
        self.live_bytes = 0
        self.peak_bytes = 0
        self.moved_bytes = 0
        self.dequantised = 0
        self.num_layers = 0
        self.num_quantised = 0
        self.work: list[Work] = []
        self._products: list[Product] = []
        self._num_frames = 0
        self._num_recomputed = 0  # blocks made while recomputing, those by the engine
        self._num_engine = 0
        self._counted = (0,) * 7
        self.events: list[RawEvent] = []
        self._sections: list[tuple[list[RawEvent], int]] = []
        self.num_blocks = 0
        self._seq = 0
        self._frame: Frame | None = None
        self._refilling: Frame | None = None
        self._cast_cache: dict[int, tuple[Param, Tensor, int]] = {}
        self._in_autocast = False
        self._ready: list[tuple[int, int, Node]] = []
        self._awaited: dict[tuple[str, bool], int] = {}
        self._repeats = 1
        self._section_start = 0  # blocks made before the section now open
        self._kept: list[tuple[Storage, int]] = []
        self._keeps_input = False

    @property
    def position(self) -> int:
        """Sequence number of the latest graph node; a mark for ``run_backward``."""
        return self._seq

    # -- memory ---------------------------------------------------------------------------------

    def new(
        self, numel: int, dtype: Dtype, kind: Kind | None = None, node: Node | None = None
    ) -> Tensor:
        """A fresh tensor of ``numel`` elements: the output of an operation.

        ``node`` is made before: PyTorch saves an operation's inputs before running it, which is
        where recomputation stops early.
        """
        nbytes = numel * dtype.size
        self.moved_bytes += nbytes
        storage = Storage(self, (nbytes + 511) & -512, kind or self.kind, self.owner)
        return Tensor(storage, numel, dtype, node)

    def scratch(self, nbytes: int, kind: Kind = Kind.WORKSPACE) -> Storage:
        """Bytes a kernel takes and gives back itself; released when the caller drops it."""
        return Storage(self, round_block(nbytes), kind, self.owner)

    @contextmanager
    def repeated(self, repeats: int) -> Iterator[None]:
        """What happens inside happens ``repeats`` times in the run (identical layers)."""
        self._close_section(1)
        self.close_work(1)
        start, before = self.live_bytes, self.peak_bytes
        self.peak_bytes = start
        self._repeats, self._section_start = repeats, self.num_blocks
        self._keeps_input = False
        yield
        self._repeats = 1
        more = repeats - 1
        change = self.live_bytes - start
        self.peak_bytes = max(before, self.peak_bytes + max(0, change) * more)
        self.live_bytes += change * more
        self._close_section(repeats)
        self.close_work(repeats)

    def close_work(self, repeats: int) -> None:
        """End a stretch of work that happens ``repeats`` times."""
        engine = self._num_engine
        now = (
            self.num_blocks - engine, engine, self.num_layers, self._num_frames,
            self.num_quantised, self.moved_bytes, self.dequantised,
        )  # fmt: skip
        if now != self._counted:
            counts = map(operator.sub, now, self._counted)
            self.work.append(Work(self.phase, repeats, tuple(self._products), *counts))
            self._products = []
            self._counted = now

    def multiply(self, unit: str, flops: int, read_bytes: int) -> None:
        """A matrix product or attention kernel runs (see ``vramplan.work.Product``)."""
        self._products.append((unit, flops, read_bytes))

    def _close_section(self, repeats: int) -> None:
        if self.events:
            self._sections.append((self.events, repeats))
            self.events = []

    def empty_cache(self) -> None:
        """Write a call of torch.cuda.empty_cache (a block 0 of no bytes)."""
        self.events.append((0, 0, Kind.WORKSPACE, "empty_cache", self.phase, 1))

    def await_use(self, library: str, *, backward: bool, block: int) -> None:
        """Write where a thread first uses a library, whose workspace that block is.

        Steady steps find the workspace there; in the first step it is allocated at that moment,
        between other blocks, which decides how the cache is cut from then on.
        """
        self._awaited[library, backward] = block

    def use(self, library: str) -> None:
        """The thread at work calls ``cublas`` or ``cublaslt``, whose handle is cuBLAS's own.

        Source: torch 2.11 ``cuda/CublasHandlePool.cpp`` (``getCurrentCUDABlasLtHandle``).
        """
        if library == "cublaslt":
            self.use("cublas")
        block = self._awaited.pop((library, self.phase is Phase.BACKWARD), None)
        if block is not None:
            self.events.append((block, 0, Kind.WORKSPACE, library, self.phase, 1))

    def finish(self) -> None:
        """End the run: what is released after it (by dropping the model) is not part of it."""
        self._close_section(1)

    def timeline(self) -> Timeline:
        """Everything written until ``finish``."""
        return Timeline(
            tuple(
                Section(tuple(map(Event._make, events)), repeats)
                for events, repeats in self._sections
            )
        )

    # -- autograd: forward ------------------------------------------------------------------------

    def node(
        self,
        edges: tuple[Node | Param | None, ...],
        backward: BackwardFn,
        saved: tuple[Tensor, ...] = (),
        args: tuple[Any, ...] = (),
    ) -> Node:
        """A new graph node that keeps ``saved`` alive (or leaves holders under checkpointing)."""
        self._seq = seq = self._seq + 1
        kept = self.save(saved) if saved else ()
        return Node(seq, edges, backward, kept, self.owner, self.kind, args)

    def save(self, tensors: tuple[Tensor, ...]) -> tuple[Saved, ...]:
        """Apply the active saved-tensor hook to what a node keeps.

        Raises:
            StopRecomputation: While recomputing, once the last needed tensor has been seen.
        """
        frame = self._refilling
        if frame is not None:
            for tensor in tensors:  # detached: nothing of the graph of the recomputation stays
                frame.holders[frame.cursor].value = Tensor(
                    tensor.storage, tensor.numel, tensor.dtype
                )
                frame.cursor += 1
            if frame.cursor == frame.num_saved:
                raise StopRecomputation
            return tensors
        frame = self._frame
        if frame is not None:
            held = tuple(Holder(frame) for _ in tensors)
            frame.holders.extend(held)
            frame.num_saved += len(held)
            return held
        return tensors

    def checkpoint(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a block without keeping what its backward needs.

        Source: torch.utils.checkpoint, use_reentrant=False.
        """
        assert self._frame is None, "checkpointed blocks do not nest"
        frame = Frame(run)
        self._frame = frame
        try:
            return run()
        finally:
            self._frame = None

    def unpack(self, saved: Saved) -> Tensor:
        """The saved tensor, recomputing its block if it was checkpointed away."""
        if isinstance(saved, Tensor):
            return saved
        if saved.value is None:
            self._recompute(saved.frame)
        value = saved.value
        assert value is not None, "a saved tensor was not recomputed"
        return value

    def drop_recomputed(self, node: Node) -> None:
        """A node's formula is through; what checkpointing recomputed for it goes.

        Checkpointing's unpack hook hands a tensor over and keeps nothing, so it goes before the
        engine casts and sums the gradients (validate_outputs). What was saved without checkpointing
        stays until after that.

        Source: torch 2.11 ``torch/utils/checkpoint.py`` (``unpack_hook``).
        """
        for saved in node.saved:
            if type(saved) is Holder:
                saved.value = None

    def _recompute(self, frame: Frame) -> None:
        outer = self.owner, self.kind, self._in_autocast
        self.kind = Kind.ACTIVATIONS
        self._refilling = frame
        self._num_frames += 1
        before = self.num_blocks
        try:
            with self.autocasting():
                frame.recompute()
        except StopRecomputation:
            pass
        finally:
            self._refilling = None
            self._num_recomputed += self.num_blocks - before
            self.owner, self.kind, self._in_autocast = outer
        # the frame, and with it the block's input, lives until its last holder goes
        frame.holders = []

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """An autocast context; its weight-cast cache is dropped at the end."""
        outer, self._in_autocast = self._in_autocast, self.low_precision is not None
        self.autocast = self.low_precision
        try:
            yield
        finally:
            self._in_autocast = outer
            if not outer:
                self._drop_casts()

    @contextmanager
    def no_autocast(self) -> Iterator[None]:
        """Outside any autocast context (backward, the optimizer, converting outputs)."""
        outer, self.autocast = self.autocast, None
        try:
            yield
        finally:
            self.autocast = outer

    @contextmanager
    def flattened(self) -> Iterator[None]:
        """Where activations are [tokens, features]: products need no reshape around them."""
        self.two_dimensional = True
        try:
            yield
        finally:
            self.two_dimensional = False

    @contextmanager
    def no_grad(self, params: Sequence[Param]) -> Iterator[None]:
        """torch.no_grad: with leaves that ask for no gradient nothing records a node.

        Args:
            params: Every trainable parameter.
        """
        for param in params:
            param.node = None
        yield
        for param in params:
            param.node = param

    def cached_cast(self, param: Param) -> Tensor | None:
        """The low-precision copy that autocast made of this weight earlier in the context."""
        entry = self._cast_cache.get(id(param))
        return entry[1] if entry else None

    def cache_cast(self, param: Param, cast: Tensor) -> None:
        """Keep a weight's low-precision copy until the autocast context ends."""
        if self._in_autocast:
            self._cast_cache[id(param)] = (param, cast, len(self._sections))

    def _drop_casts(self) -> None:
        cache, self._cast_cache = self._cast_cache, {}
        for param, cast, section in cache.values():
            storage = cast.storage
            assert storage is not None
            if section == len(self._sections):  # goes in the stretch that made it
                continue
            # cache, local, argument: nobody else keeps the copy, so the copies of the folded
            # layers go now too
            if _getrefcount(cast) <= 3 and _getrefcount(storage) <= 3:
                storage.copies = param.copies

    def keep_with_graph(self, x: Tensor) -> None:
        """Hold a tensor until the whole graph goes, as an attribute of a node's ``ctx`` does.

        The graph of a recomputation goes at its end, with its last holder.
        """
        storage = x.storage
        if self._refilling is None and storage is not None:
            own = storage.block > self._section_start
            self._kept.append((storage, self._repeats if own else 1))
            self._keeps_input |= not own

    def keep_output(self, out: Tensor) -> None:
        """Hold what a repeated section hands on if it kept what it was handed itself.

        Known limitations:
            The last repetition's is held as well, whether the next section keeps it or not.
        """
        if self._keeps_input and self._repeats > 1:
            self.keep_with_graph(out)

    def drop_graph(self) -> None:
        """The loss goes, and with it every node; folded layers let go of theirs all at once."""
        kept, self._kept = self._kept, []
        for storage, copies in kept:
            storage.copies = max(storage.copies, copies)

    # -- autograd: backward -----------------------------------------------------------------------

    def start_backward(self, root: Tensor) -> None:
        """Prepare the graph behind ``root`` (the loss) for ``run_backward``."""
        node = root.node
        assert isinstance(node, Node)
        node.grad = self.new(root.numel, root.dtype, Kind.ACTIVATION_GRADIENTS)
        _count_uses(node)
        self._ready = [(-node.seq, id(node), node)]

    def run_backward(self, until_seq: int = 0) -> None:
        """Execute ready nodes, latest first, while their number is above ``until_seq``.

        Args:
            until_seq: A ``position``; what was recorded before it stays for a later call.
        """
        before = self.num_blocks - self._num_recomputed
        ready = self._ready
        while ready and -ready[0][0] > until_seq:
            node = heapq.heappop(ready)[2]
            self._execute(node, ready)
        self._num_engine += self.num_blocks - self._num_recomputed - before

    def _execute(self, node: Node, ready: list[tuple[int, int, Node]]) -> None:
        grad = node.grad
        node.grad = None
        self.owner = node.owner
        self.kind = Kind.LOGITS if node.kind is Kind.LOGITS else Kind.ACTIVATION_GRADIENTS
        assert grad is not None
        grads = node.backward(self, node, grad)
        del grad
        node.saved = ()
        edges = node.edges
        node.edges = ()
        passed = list(grads)
        del grads, node
        for index, edge in enumerate(edges):
            if edge is None:
                continue
            value = passed[index]
            passed[index] = None
            if type(edge) is Node:
                if value is not None:
                    if edge.grad is None:
                        edge.grad = value
                    else:
                        self._accumulate(edge, value)
                edge.waiting -= 1
                if edge.waiting == 0:
                    if edge.grad is not None:
                        heapq.heappush(ready, (-edge.seq, id(edge), edge))
                    else:  # no gradient came: pass nothing on
                        edge.edges = ()
                        edge.saved = ()
            elif value is not None:
                assert isinstance(edge, Param)
                self._arrive_at_leaf(edge, value)

    def _accumulate(self, node: Node, value: Tensor) -> None:
        """InputBuffer::accumulate: in place when nobody else holds the first gradient."""
        old = node.grad
        assert old is not None
        if old.storage is None:  # a part of a split: the node gathers its parts itself
            return
        # references to `old`: the slot, the local, getrefcount's argument
        if not old.aliased and _getrefcount(old) <= 3 and _getrefcount(old.storage) <= 2:
            self.moved_bytes += value.numel * value.dtype.size * 3
            return
        self.moved_bytes += old.numel * old.dtype.size * 2
        node.grad = self.new(old.numel, old.dtype, old.storage.kind)

    def _arrive_at_leaf(self, param: Param, value: Tensor) -> None:
        """A parameter used twice (a tied head) waits for both gradients and adds them up."""
        param.waiting -= 1
        if param.pending is not None:
            self.moved_bytes += value.numel * value.dtype.size * 2
            if param.pending.aliased:
                value = self.new(param.numel, param.pending.dtype, param.grad_kind)
            else:
                value = param.pending
            param.pending = None
        if param.waiting > 0:
            param.pending = value
        else:
            self._accumulate_leaf(param, value)

    def _accumulate_leaf(self, param: Param, value: Tensor) -> None:
        """AccumulateGrad: take the first gradient over, add later ones in place."""
        if param.grad is not None:
            self.moved_bytes += value.numel * value.dtype.size * 3
            return
        storage = value.storage
        assert storage is not None
        # two callers' locals, this one, getrefcount's argument
        if _getrefcount(value) <= 4 and _getrefcount(storage) <= 3:
            if storage.kind is not param.grad_kind:
                self._relabel(storage, param.grad_kind, param.owner)
            param.grad = value
        else:
            self.owner = param.owner
            param.grad = self.new(param.numel, param.dtype, param.grad_kind)

    def _relabel(self, storage: Storage, kind: Kind, owner: str) -> None:
        """A block changes its purpose without moving."""
        phase = self.phase
        self.events.append((storage.block, -storage.nbytes, storage.kind, storage.owner, phase, 1))
        storage.kind = kind
        storage.owner = owner
        self.events.append((storage.block, storage.nbytes, kind, owner, phase, 1))

    def zero_grad(self, params: Sequence[Param]) -> None:
        """Drop gradients (set_to_none=True), those of folded layers with them."""
        for param in params:
            if param.grad is not None:
                assert param.grad.storage is not None
                param.grad.storage.copies = param.copies
                param.grad = None


def _count_uses(root: Node) -> None:
    """How many gradients each node of the graph waits for (engine: compute_dependencies)."""
    seen = {id(root)}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            edge.waiting += 1
            if type(edge) is Node and id(edge) not in seen:
                seen.add(id(edge))
                stack.append(edge)
