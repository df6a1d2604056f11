"""Following Trainer through the phases of training, without stopping the GPU."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from vramplan.measure.gauge import PhaseBook

EVALUATE, SAVE = "evaluate", "save"


class StepWatch(TrainerCallback):  # type: ignore[misc]
    """Follows Trainer from step to step and phase to phase.

    Args:
        book: Where peaks are booked.
        record: Receives ``ready_bytes``.
        evaluate_at: Step after which to evaluate, 0 for never.
        save_at: Step after which to save, 0 for never.
        progress: Called when something worth keeping is known.

    Attributes:
        on_ready: Called when training is about to begin.
        before_update: Called when an optimizer step's gradients are complete.
        after_step: Called with the number of each finished step.
        after_phase: Called with the name of each evaluation or save that is over.
    """

    def __init__(
        self,
        book: PhaseBook,
        record: dict[str, Any],
        *,
        evaluate_at: int = 0,
        save_at: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.book = book
        self.record = record
        self.evaluate_at, self.save_at = evaluate_at, save_at
        self.progress = progress
        self.on_ready: list[Callable[[], None]] = []
        self.before_update: list[Callable[[], None]] = []
        self.after_step: list[Callable[[int], None]] = []
        self.after_phase: list[Callable[[str], None]] = []
        self.steps: list[dict[str, Any]] = []
        self._events: list[tuple[Any, Any]] = []
        self._began = 0.0

    def attach(self, trainer: Any, model: Any) -> None:
        """Mark forward, loss, backward and step in a Trainer that is about to train."""
        model.register_forward_pre_hook(self._forward)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        loss_function = base.loss_function

        def loss(*args: Any, **kwargs: Any) -> Any:
            if model.training:
                self.book.enter("loss")
            return loss_function(*args, **kwargs)

        base.loss_function = loss
        backward = trainer.accelerator.backward

        def marked_backward(*args: Any, **kwargs: Any) -> None:
            self.book.enter("backward")
            backward(*args, **kwargs)
            self.book.enter("step")

        trainer.accelerator.backward = marked_backward

    def _forward(self, module: Any, _inputs: Any) -> None:
        if module.training:
            self.book.enter("forward")

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """The model is prepared, the optimizer has no state yet."""
        gc.collect()
        self.book.enter("train")
        self.record["ready_bytes"] = self.book.gauge.allocated()
        self.record["times"]["ready"] = time.monotonic()
        for listener in self.on_ready:
            listener()
        self.progress()

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Begin a step: its peaks, its clock."""
        self.book.enter("forward")
        self.book.step = {}
        self.book.first_step = not self.steps
        self._before = self.book.gauge.allocated()
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        if self.book.gauge.cuda:
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        """Gradients are complete and clipped."""
        for listener in self.before_update:
            listener()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> Any:
        """End a step; ask for an evaluation or a checkpoint where one is due."""
        if self.book.gauge.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._begin, end))
        wall = time.perf_counter() - self._began
        self.book.close()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - self._faults
        self.steps.append(
            {
                "begin_allocated_bytes": self._before,
                "time_s": None if self.book.gauge.cuda else wall,
                "major_faults": faults,
                **self.book.step,
            }
        )
        self.book.first_step = False
        number = state.global_step
        for listener in self.after_step:
            listener(number)
        if number == 1:
            self.progress()
        control.should_evaluate = number == self.evaluate_at
        control.should_save = number == self.save_at
        if control.should_evaluate:
            self.book.enter(EVALUATE)
        elif control.should_save:
            self.book.enter(SAVE)
        else:
            self.book.enter("between")
        return control

    def on_evaluate(self, _args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
        """The evaluation is over."""
        self.book.enter(SAVE if control.should_save else "between")
        self._tell(EVALUATE)

    def on_save(self, *_args: Any, **_kwargs: Any) -> None:
        """The checkpoint is on disk."""
        self.book.enter("between")
        self._tell(SAVE)

    def _tell(self, phase: str) -> None:
        for listener in self.after_phase:
            listener(phase)

    def finish(self) -> None:
        """Read the clocks of the steps; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
        for step, (begin, end) in zip(self.steps, self._events, strict=False):
            step["time_s"] = begin.elapsed_time(end) / 1000

    def phases(self) -> dict[str, dict[str, int | None]]:
        """The peak of each phase; null where there is no GPU."""
        left_out = ("start", "train", "between")
        return {
            name: {key: peaks.get(key) for key in ("peak_allocated_bytes", "peak_reserved_bytes")}
            for name, peaks in self.book.steady.items()
            if name not in left_out
        }
