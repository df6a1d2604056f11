"""The allocator's own history as a Timeline: every block with its module, phase and kind.

PyTorch's recorder knows address, size and Python stack of every allocation, but not the module.
Modules and phases are noted by hooks beside it, as counts of allocations made so far, which do not
allocate anything and leave the autograd graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vramplan.alloc_conf import DEFAULT_SETTINGS, AllocatorSettings
from vramplan.measure import labels
from vramplan.measure.blocks import Blocks, Label, Mark, Meaning
from vramplan.measure.gauge import Gauge, PhaseBook
from vramplan.names import HEADS, owner_of
from vramplan.timeline import Event, Kind, Phase, Section, Timeline

MAX_ENTRIES = 4_000_000
KEPT_STEPS = 2
SEGMENT_ACTIONS = {"segment_alloc": 1, "segment_free": -1, "segment_map": 1, "segment_unmap": -1}
PHASES = {phase.value for phase in Phase}
BATCH_FRAMES = ("accelerate/data_loader", "send_to_device", "_prepare_input")


class HistoryTap:
    """Records the allocator from now on and notes whose allocations they are."""

    def __init__(
        self, gauge: Gauge, book: PhaseBook, settings: AllocatorSettings = DEFAULT_SETTINGS
    ) -> None:
        self.gauge = gauge
        self.round_size = settings.round_size
        self.stack: list[str] = []
        self.backward_module = self.decoder = ""
        self.names: dict[int, str] = {}
        self.phase = "load"
        self.marks: list[Mark] = []
        self.labels: list[Label] = []
        self.ready_at = self.kept_to = self.stopped_at = 0
        book.on_enter.append(self._enter_phase)
        if gauge.cuda:
            torch.cuda.memory._record_memory_history(
                enabled="all", context="alloc", stacks="python", max_entries=MAX_ENTRIES
            )
        self.base = self._count()

    def _count(self) -> int:
        """Allocations made by this process so far."""
        if not self.gauge.cuda:
            return 0
        return int(torch.cuda.memory_stats_as_nested_dict()["allocation"]["all"]["allocated"])

    def _mark(self) -> None:
        inside = bool(self.stack)
        owner = self.stack[-1] if inside else self.backward_module
        self.marks.append(Mark(self._count(), self.phase, owner, inside))

    def _enter_phase(self, phase: str) -> None:
        self.phase = phase
        self.stack.clear()
        self.backward_module = ""
        self._mark()

    # -- hooks -----------------------------------------------------------------------------------

    def attach(self, watch: Any, trainer: Any, model: Any) -> None:
        """Follow a model's modules; label parameters, gradients and optimizer state by address."""
        for name, module in model.named_modules():
            owner = owner_of(name)
            module.register_forward_pre_hook(self._before(owner))
            module.register_forward_hook(self._after(owner), always_call=True)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        table = model.get_input_embeddings()
        self.decoder = next(
            owner_of(name).rpartition(".")[0] for name, m in model.named_modules() if m is table
        )

        def ready() -> None:
            self.ready_at = self._count()
            self._label(labels.weights(model))

        def update() -> None:
            self._label(labels.gradients(model))

        watch.on_ready.append(ready)
        watch.before_update.append(update)
        watch.after_step.append(lambda number: self._after_step(number, trainer))

    def _before(self, owner: str) -> Any:
        def hook(_module: Any, _inputs: Any) -> None:
            self.stack.append(owner)
            self._mark()

        return hook

    def _after(self, owner: str) -> Any:
        def enter_backward(_gradients: Any) -> None:
            self.backward_module = owner
            self._mark()

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if self.stack:
                self.stack.pop()
            self._mark()
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            node = getattr(first, "grad_fn", None)
            if node is not None:
                node.register_prehook(enter_backward)

        return hook

    def _label(self, owned: Iterable[tuple[Any, Kind, str]]) -> None:
        places = {
            tensor.untyped_storage().data_ptr(): (kind, owner_of(name))
            for tensor, kind, name in owned
            if tensor is not None and tensor.is_cuda
        }
        self.labels.append((self._count(), places))

    def _after_step(self, number: int, trainer: Any) -> None:
        if number <= KEPT_STEPS:
            self.kept_to = self._count()
            inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            self._label(labels.optimizer_state(inner, self.names))
        if number == KEPT_STEPS:
            self.phase = "over"

    # -- the result ------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the recording; what clearing cuBLAS' workspaces frees now is workspace."""
        if not self.gauge.cuda:
            self.trace: list[dict[str, Any]] = []
            return
        torch.cuda.synchronize()
        self.stopped_at = self._count()
        torch._C._cuda_clearCublasWorkspaces()
        device = torch.cuda.current_device()
        self.trace = torch.cuda.memory._snapshot()["device_traces"][device]
        torch.cuda.memory._record_memory_history(enabled=None)

    def timeline(self) -> tuple[Timeline, list[tuple[int, int]]]:
        """The run up to the end of its second step.

        Returns:
            A timeline of one section, its events in the order of the run, sizes rounded as the
            allocator does; and the segments it took from the driver (bytes) or gave back (minus
            bytes), each with the number of events before it. With expandable segments these are
            the pages mapped and unmapped.

        Known limitations:
            A block is booked to the module at work when it was made. Backward's blocks go to the
            module whose output's gradient was computed last; what autograd does between two modules
            may be booked to the earlier one.
        """
        blocks = _Blocks(self)
        for entry in self.trace:
            blocks.see(entry)
        return Timeline((Section(tuple(blocks.finish())),)), blocks.segments


class _Blocks(Blocks):
    """Turns trace entries into events; kinds become known only later, so events come last."""

    def __init__(self, tap: HistoryTap) -> None:
        super().__init__(tap.base, tap.marks, tap.labels, tap.round_size)
        self.tap = tap
        self.cut: int | None = None
        self.segments: list[tuple[int, int]] = []  # (events before it, + or - its bytes)

    def see(self, entry: Mapping[str, Any]) -> int:
        """One entry of the allocator's trace."""
        action = entry["action"]
        if action == "alloc" and self.cut is None and self.count >= self.tap.kept_to:
            self.cut = len(self.order)
        if action in SEGMENT_ACTIONS and self.cut is None:
            self.segments.append((len(self.order), SEGMENT_ACTIONS[action] * entry["size"]))
        block = super().see(entry)
        if block in self.gone and self.count >= self.tap.stopped_at and block < self.tap.kept_to:
            self.known[block] = (Kind.WORKSPACE, "cublas")
        return block

    def finish(self) -> Iterable[Event]:
        """Every event up to the cut."""
        self.settle()
        meanings = {block: self._meaning(block) for block in self.made}
        kept = self.order[: self.cut]
        for block, nbytes in kept:
            kind, owner, phase, end_phase = meanings[block]
            yield Event(block, nbytes, kind, owner, phase if nbytes > 0 else end_phase)

    def _meaning(self, block: int) -> tuple[Kind, str, Phase, Phase]:
        mark = self.mark(block) or Mark(0, "load", "", inside=False)
        end = self.mark(self.gone[block]) if block in self.gone else mark
        found = self.known.get(block)
        if found is None and block <= self.tap.ready_at:
            found = (Kind.WEIGHTS, mark.owner or "load")
        if found is None:
            found = self._kind(block, mark)
        return (*found, _phase(mark.phase), _phase(end.phase if end else "load"))

    def _kind(self, block: int, mark: Mark) -> Meaning:
        _, phase, owner, inside = mark
        if phase == "step":
            return Kind.WORKSPACE, "optimizer"
        if phase == "loss" or (phase == "backward" and not owner):
            return Kind.LOGITS, "loss"
        if owner.endswith(HEADS):
            return Kind.LOGITS, owner
        frames = [f["filename"] + ":" + f["name"] for f in self.made[block].get("frames") or ()]
        if any(part in frame for frame in frames[:12] for part in BATCH_FRAMES):
            return Kind.BATCH, "batch"
        if inside and owner == self.tap.decoder:  # positions and masks
            return Kind.BATCH, owner
        kind = Kind.ACTIVATIONS
        if self._is_scratch(block, frames):
            kind = Kind.WORKSPACE
        elif phase == "backward" and not inside:
            kind = Kind.ACTIVATION_GRADIENTS
        return kind, owner

    def _is_scratch(self, block: int, frames: list[str]) -> bool:
        """A weight that bitsandbytes dequantised and let go before the module was through."""
        if not frames or "bitsandbytes" not in frames[0]:
            return False
        gone = self.gone.get(block)
        return gone is not None and self.between_marks(block, gone)


def _phase(name: str) -> Phase:
    if name in PHASES:
        return Phase(name)
    return Phase.PREPARE if name in ("start", "train") else Phase.STEP
