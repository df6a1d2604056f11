"""Two training steps, as transformers' Trainer runs them, on fake tensors.

Source: transformers 5.17.0 ``trainer.py`` (``get_batch_samples``, ``training_step``,
``_run_epoch``, ``create_optimizer``); accelerate 1.15.0 ``accelerator.py`` (``prepare_model``),
``utils/operations.py`` (``convert_outputs_to_fp32``); torch ``nn/utils/clip_grad.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from vramplan.errors import ConfigError
from vramplan.estimate import (
    CUBLAS_WORKSPACE,
    CUBLAS_WORKSPACE_HOPPER,
    CUBLASLT_WORKSPACE,
    DEFAULT_CAPABILITY,
)
from vramplan.job import Job
from vramplan.names import holder_of, owner_of
from vramplan.replay import TRAINING_BEGINS
from vramplan.timeline import BEFORE_TRAINING, Kind, Peak, Phase, Timeline
from vramplan.trace.build import DTYPES, base_model, build, in_one_line, quant_tensors, quiet
from vramplan.trace.fold import WHOLE, Cut, find_cut, layers_of, timelines
from vramplan.trace.load import load
from vramplan.trace.optimizers import make_optimizer
from vramplan.trace.routing import EvenRouting
from vramplan.trace.rules import answers, corrected, hidden_bytes, sums_in_place
from vramplan.trace.tracker import Books, Tracker, watch_modules

NUM_STEPS = 2
MICRO_STEPS = 2  # the first makes gradients, the others add to them
DIMENSIONS = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Trace:
    """What a trace found.

    Attributes:
        timeline: Every allocation of two steps.
        steady: The same, all before the second step counted as preparation.
        ready_bytes: Allocated when training is about to start.
        peak_allocated_bytes: Largest allocated in the second step.
        load_peak_bytes: Largest allocated before training starts.
        optimizer_bytes: Optimizer state on the device.
        paged_bytes: Optimizer state in managed memory.
        num_trainable: Trainable parameters.
        num_parameters: Parameters of the base model, tied ones once.
        family: ``model_type`` of the config.
        attn_implementation: The attention that transformers chose.
        dimensions: Layers, hidden size, vocabulary and positions; None where the config has none.
        flops: Operations of a step; a trace does not count them.
    """

    timeline: Timeline
    steady: Timeline
    ready_bytes: int
    peak_allocated_bytes: int
    load_peak_bytes: int
    optimizer_bytes: int
    paged_bytes: int
    num_trainable: int
    num_parameters: int
    family: str
    attn_implementation: str
    dimensions: dict[str, int | None]
    flops: int | None = None

    def peak(self) -> Peak:
        """The fullest moment of a steady step."""
        return self.steady.peak()


def trace(
    config: Mapping[str, Any],
    job: Job,
    *,
    capability: tuple[int, int] = DEFAULT_CAPABILITY,
    workspace_bytes: int | None = None,
    where: str = "config",
    fold: bool = True,
) -> Trace:
    """Run two steps of a job on fake tensors.

    Args:
        config: Values of a config.json; code that it may name is never run.
        job: The job.
        capability: Compute capability of the card that it stands for.
        workspace_bytes: cuBLAS's workspaces of both threads as measured on the card; None for what
            PyTorch gives that generation.
        where: How to name the config in errors.
        fold: Trace equal layers once; otherwise every layer, which takes longer.

    Returns:
        Its timeline and numbers, in bytes.

    Raises:
        ConfigError: If transformers cannot make a model of the config, or its code does not run on
            fake tensors.
        UsageError: If peft cannot adapt it as asked.
    """
    cut = WHOLE
    if fold:
        with quiet():
            whole = base_model(config, job, where)
        cut = find_cut(whole, 1 if job.method == "full" or job.gradient_checkpointing else 2)
        del whole
    model = build(config, job, where, cut.config if cut is not WHOLE else lambda _config: None)
    try:
        return Run(model, job, capability, cut, workspace_bytes).perform()
    except Exception as error:  # the code of any architecture
        hint = "" if job.method == "full" else "; --target-modules can spare what peft cannot adapt"
        raise ConfigError(
            f"{where}: a training step of it does not run on fake tensors "
            f"({type(error).__name__}: {in_one_line(error)}){hint}"
        ) from error


class Run:
    """One trace.

    Args:
        model: The prepared model on meta.
        job: The job.
        capability: Compute capability of the card.
        cut: Which of its layers stand for others.
        workspace_bytes: cuBLAS's workspaces of both threads, None for the usual ones.
    """

    def __init__(
        self,
        model: Any,
        job: Job,
        capability: tuple[int, int],
        cut: Cut,
        workspace_bytes: int | None = None,
    ) -> None:
        self.model, self.job, self.capability, self.cut = model, job, capability, cut
        usual = CUBLAS_WORKSPACE_HOPPER if capability[0] == 9 else CUBLAS_WORKSPACE
        self.workspace_bytes = usual if workspace_bytes is None else workspace_bytes // 2
        self.books = Books()
        self.books.round_size = job.allocator_settings.round_size
        self.books.middle, self.books.repeats = cut.middle, cut.repeats
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.books.layers_path = layers_of(base)[0] + "."

    def perform(self) -> Trace:
        """Load, then two steps."""
        books, routing = self.books, EvenRouting()
        tracker = Tracker(books, hidden_bytes(books), answers(routing))
        tracker.in_place_sum = sums_in_place
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(tracker)
            paged = stack.enter_context(corrected(books, self.capability, routing))
            self._load()
            self._prepare()
            for _ in range(NUM_STEPS):
                books.step += 1
                self._step()
            books.recording = False
        whole, steady = timelines(books, NUM_STEPS)
        ready, load_peak = _before_training(whole)
        config = self.model.config
        dimensions = {name: getattr(config, name, None) for name in DIMENSIONS}
        dimensions["num_hidden_layers"] = self.num_layers
        return Trace(
            timeline=whole,
            steady=steady,
            ready_bytes=ready,
            load_peak_bytes=load_peak,
            optimizer_bytes=_held_bytes(whole, Kind.OPTIMIZER),
            peak_allocated_bytes=steady.peak().nbytes,
            paged_bytes=paged.nbytes,
            num_trainable=sum(self._count(n, p) for n, p in self.trained),
            num_parameters=self.num_parameters,
            family=config.model_type,
            attn_implementation=config._attn_implementation,
            dimensions=dimensions,
        )

    @property
    def num_layers(self) -> int | None:
        """Decoder layers of the real model."""
        count: int | None = getattr(self.model.config, "num_hidden_layers", None)
        return count + self.cut.num_left_out if count is not None else None

    def _count(self, name: str, parameter: Any) -> int:
        """Elements of a parameter in the real model."""
        state = getattr(parameter, "quant_state", None)
        numel: int = (state.shape if state is not None else parameter.shape).numel()
        middle = self.books.layer_of(owner_of(name)) in self.books.middle
        return numel * (self.cut.repeats if middle else 1)

    # -- before training -------------------------------------------------------------------------

    def _load(self) -> None:
        model = self.model
        load(model, self.job, self.books)
        trained = Kind.ADAPTERS if self.job.method != "full" else Kind.WEIGHTS
        named = list(model.named_parameters())
        self.books.leaves = {id(p): owner_of(n) for n, p in named}
        self.num_parameters = sum(
            self._count(n, p) for n, p in named if "lora_" not in n and "modules_to_save" not in n
        )
        label = self.books.label
        label((p, trained if p.requires_grad else Kind.WEIGHTS, owner_of(n)) for n, p in named)
        label((t, Kind.WEIGHTS, owner_of(n)) for n, p in named for t in quant_tensors(p))
        label((b, Kind.WEIGHTS, holder_of(n)) for n, b in model.named_buffers())

    def _prepare(self) -> None:
        books, job, model = self.books, self.job, self.model
        books.begin_training()
        self.total_loss = torch.zeros(())  # Trainer._tr_loss
        self.loss: Any = None
        self.grad_norm: Any = None
        self.trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._workspaces()
        if job.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                # no random numbers here: their state stays on the host
                gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
            )
        model.config.use_cache = False  # Trainer.train sets it to TrainingArguments.use_cache
        model.train()
        watch_modules(books, model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        loss_function = base.loss_function

        def loss(*args: Any, **kwargs: Any) -> Any:
            books.enter_phase(Phase.LOSS)
            return loss_function(*args, **kwargs)

        base.loss_function = loss
        if job.autocast_dtype is not None:
            autocast = torch.autocast("cpu", dtype=DTYPES[job.autocast_dtype.name])
            model.forward = convert_outputs_to_fp32(autocast(model.forward))
        self.optimizer = make_optimizer(model, job)

    def _workspaces(self) -> None:
        """CuBLAS's, one a thread; cuBLASLt's for threads that run a linear layer with a bias."""
        self.books.awaited = dict.fromkeys((False, True), self.workspace_bytes)
        for _ in range(self._num_cublaslt_threads()):
            self.books.allocate(CUBLASLT_WORKSPACE, Kind.WORKSPACE, "cublas")

    def _num_cublaslt_threads(self) -> int:
        biased = [
            self.books.layer_of(owner_of(name)) is not None
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
            and module.bias is not None
            and type(module).__name__ not in ("Linear8bitLt", "FalconLinear")
        ]
        return int(bool(biased)) + int(any(biased) and self.job.gradient_checkpointing)

    # -- a step ----------------------------------------------------------------------------------

    def _step(self) -> None:
        """Trainer's inner loop."""
        self.books.enter_phase(Phase.FORWARD)
        steps = self.job.gradient_accumulation_steps
        batches = [self._batch() for _ in range(steps)]
        num_items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in batches)
        for batch in batches[:MICRO_STEPS]:
            # Trainer's locals: the last micro-batch's loss and the last norm live on
            self.loss = self._training_step(batch, num_items)
            self.total_loss += self.loss
        self._update()

    def _batch(self) -> dict[str, Any]:
        shape = (self.job.batch_size, self.job.seq_len)
        names = ("input_ids", "attention_mask", "labels")
        return {name: torch.empty(shape, dtype=torch.int64) for name in names}

    def _training_step(self, inputs: dict[str, Any], num_items: Any) -> Any:
        """Trainer.training_step."""
        self.books.enter_phase(Phase.FORWARD)
        loss = self._compute_loss(inputs, num_items)
        self.books.enter_phase(Phase.BACKWARD)
        run_backward(loss)
        self.books.enter_phase(Phase.STEP)
        return loss.detach()

    def _compute_loss(self, inputs: dict[str, Any], num_items: Any) -> Any:
        """Trainer.compute_loss; the outputs go when it returns."""
        outputs = self.model(**inputs, num_items_in_batch=num_items)
        return outputs["loss"] if isinstance(outputs, dict) else outputs[0]

    def _update(self) -> None:
        """Clip, step, zero_grad."""
        books = self.books
        parameters = list(self.model.parameters())
        books.label((p.grad, Kind.GRADIENTS, owner_of(n)) for n, p in self.trained)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        self.optimizer.step()
        self._label_state()
        self.model.zero_grad()

    def _label_state(self) -> None:
        names = {id(p): owner_of(n) for n, p in self.trained}
        shared = self.job.optimizer
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                if not torch.is_tensor(value):
                    continue
                if key == "step" and not shared.step_on_device:
                    self.books.forget(value)
                    continue
                owner = "optimizer" if key.startswith("qmap") else names[id(p)]
                self.books.label([(value, Kind.OPTIMIZER, owner)])


def run_backward(loss: Any) -> None:
    """torch.autograd.backward, whose own wrapper would switch function modes off.

    Source: torch 2.13 ``autograd/__init__.py``.
    """
    ones = torch.ones_like(loss, memory_format=torch.preserve_format)
    torch.autograd.graph._engine_run_backward(
        (loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _before_training(timeline: Timeline) -> tuple[int, int]:
    """Bytes held when training begins, and the most before that."""
    live = top = 0
    for section in timeline.sections:
        for _ in range(section.repeats):
            for event in section.events:
                if event.phase not in BEFORE_TRAINING or event.block == TRAINING_BEGINS:
                    return live, top
                live += event.nbytes * event.copies
                top = max(top, live)
    return live, top


def _held_bytes(timeline: Timeline, kind: Kind) -> int:
    """Bytes of a kind that are never released."""
    return sum(
        event.nbytes * event.copies * section.repeats
        for section in timeline.sections
        for event in section.events
        if event.kind is kind
    )
