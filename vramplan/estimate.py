"""The first witness: Job -> block program -> Timeline -> numbers, without torch.

One steady training step of transformers' Trainer is walked on the tape: batch, forward, loss,
backward and optimizer step. Identical layers are walked once: the first, whose input may
need no gradient, and one that stands for all others, or one period where kinds of layers alternate.

Source: transformers 5.17.0 ``trainer.py`` (``training_step``), ``loss/loss_utils.py``; accelerate
1.15.0 ``utils/operations.py`` (``convert_outputs_to_fp32``); torch 2.11.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from vramplan.errors import UsageError
from vramplan.evaluate import EvaluationLoop
from vramplan.families import Family, find_family
from vramplan.families.common import Env
from vramplan.formats import FP32
from vramplan.forward import Forward
from vramplan.job import Job
from vramplan.layers import Built, num_lead_layers, runs_of
from vramplan.model import LinearSpec, Model
from vramplan.tape import Param, Storage, Tape, Tensor
from vramplan.timeline import CLIP, Kind, Peak, Phase, Timeline
from vramplan.units import BLOCK_BYTES, round_block
from vramplan.work import Work, total_flops

CUBLAS_WORKSPACE_HOPPER = 32 * 1024**2
CUBLAS_WORKSPACE = 8_519_680  # :4096:2:16:8
CUBLASLT_WORKSPACE = 1024**2
NORM_CHUNK = 65536  # elements
DEFAULT_CAPABILITY = (9, 0)  # the card of the recorded runs


@dataclass(frozen=True, slots=True)
class Estimate:
    """The numbers of one job.

    Attributes:
        ready_bytes: Allocated when training is about to start.
        peak_allocated_bytes: Largest allocated from the second step on, evaluation included.
        load_peak_bytes: Largest allocated while loading and preparing.
        evaluate_peak_bytes: Largest allocated in an evaluation; None for a job without.
        static_bytes: Everything that stays put during a step: model, optimizer, workspaces.
        optimizer_bytes: Optimizer state on the device.
        paged_bytes: Optimizer state in managed memory.
        work: One micro-batch's forward and backward, as asked of the host and the card.
        num_micro_steps: Micro-batches of one optimizer step.
        num_trainable: Trainable parameters.
        num_trainable_tensors: The tensors they are in.
        trainable_bytes: Their size.
        tape: The tape it was walked on; its timeline holds every allocation.
    """

    ready_bytes: int
    peak_allocated_bytes: int
    load_peak_bytes: int
    evaluate_peak_bytes: int | None
    static_bytes: int
    optimizer_bytes: int
    paged_bytes: int
    work: tuple[Work, ...]
    num_micro_steps: int
    num_trainable: int
    num_trainable_tensors: int
    trainable_bytes: int
    tape: Tape

    @property
    def timeline(self) -> Timeline:
        """Every allocation of the run."""
        return self.tape.timeline()

    @property
    def flops(self) -> int:
        """Floating point operations of one optimizer step."""
        return self.num_micro_steps * total_flops(self.work)

    def peak(self) -> Peak:
        """The fullest moment of the step."""
        return self.timeline.peak()


def num_cublaslt_threads(model: Model, job: Job) -> int:
    """How many threads hold a cuBLASLt workspace: those that run a linear layer with a bias.

    The backward thread runs one only when it recomputes a checkpointed layer. LLM.int8 adds its
    biases itself.

    Source:
        torch 2.11 ``aten/src/ATen/native/cuda/Blas.cpp`` (``addmm`` with a bias goes to cuBLASLt),
        ``aten/src/ATen/cuda/CUDABlas.cpp`` (1 MiB); 64, 65 or 66 MiB in all recorded runs.
    """
    arch = model.architecture
    in_block = not (job.quantised and job.quant_type == "int8") and any(
        isinstance(module, LinearSpec) and module.bias and module.cls != "FalconLinear"
        for module in arch.modules()
    )
    return int(in_block or arch.head.bias) + int(in_block and job.gradient_checkpointing)


def attention_of(family: Family, job: Job, model: Model) -> str:
    """The attention implementation transformers would use: the job's, the config's, the default.

    Some published files name one (``_attn_implementation``), and transformers 5.17 follows them.

    Raises:
        UsageError: If the family does not have the one asked for.
    """
    asked = job.attn_implementation
    if asked is None:
        named = model.config.get("_attn_implementation")
        return next((name for name in family.attentions if name == named), family.attentions[0])
    if asked not in family.attentions:
        raise UsageError(
            f"--attn-implementation {asked}: transformers has no {asked} attention for "
            f"{family.model_type}; it has " + ", ".join(family.attentions)
        )
    return asked


def estimate(
    model: Model,
    job: Job,
    *,
    capability: tuple[int, int] = DEFAULT_CAPABILITY,
    workspace_bytes: int | None = None,
    from_checkpoint: bool = False,
) -> Estimate:
    """Predict the memory of one job.

    Args:
        model: The model.
        job: The job.
        capability: Compute capability of the card, which decides cuBLAS's workspaces and the
            attention kernel.
        workspace_bytes: cuBLAS's workspaces of both threads as measured on the card, cuBLASLt's
            left out; None for what PyTorch gives that generation.
        from_checkpoint: Whether ``from_pretrained`` loads the weights, which decides the order in
            which they come and so what the allocator's cache looks like; otherwise they are made
            on the card, as random ones are.

    Returns:
        Its numbers, all in bytes as torch's allocator counts them.

    Raises:
        UsageError: If the job does not go with the model.
    """
    return Step(model, job, capability, workspace_bytes, from_checkpoint).run()


class Step:
    """Walks one steady step of a job."""

    def __init__(
        self,
        model: Model,
        job: Job,
        capability: tuple[int, int],
        workspace_bytes: int | None,
        from_checkpoint: bool,
    ) -> None:
        self.model = model
        self.job = job
        self.family = find_family(model.family)
        self.runs = runs_of(model.dims.kinds, num_lead_layers(model, job))
        settings = job.allocator_settings
        self.tape = Tape(job.autocast_dtype, settings.round_size if settings.rounds_up else None)
        self.tape.kind = Kind.WEIGHTS
        self.built = Built(self.tape, model, job, self.runs, from_checkpoint=from_checkpoint)
        self.env = Env(
            job,
            model.dims,
            attention_of(self.family, job, model),
            job.batch_size,
            job.seq_len,
            job.tokens,
            capability=capability,
        )
        self.forward = Forward(self.tape, self.family, self.built, self.env)
        self.workspace_bytes = (
            workspace_bytes // 2
            if workspace_bytes is not None
            else CUBLAS_WORKSPACE_HOPPER
            if capability[0] == 9
            else CUBLAS_WORKSPACE
        )

    def run(self) -> Estimate:
        """Load, then one steady step."""
        t = self.tape
        ready, load_peak = t.live_bytes, t.peak_bytes
        t.phase = Phase.PREPARE
        self.built.cast_biases()
        optimizer_bytes, paged, self.optimizer = self._optimizer_state()
        self.workspaces = self._workspaces()
        static = t.live_bytes
        before = t.peak_bytes
        t.peak_bytes = 0
        t.phase = Phase.FORWARD
        batches = self._batches()
        for _ in range(min(self.job.gradient_accumulation_steps, 2)):
            self._micro_step()
        work = tuple(t.work)
        del batches
        walk_peak = t.peak_bytes
        t.peak_bytes = 0
        self._optimizer_step()
        step_peak = t.peak_bytes
        t.peak_bytes = 0
        if self.job.evaluate:
            EvaluationLoop(t, self.family, self.built, self.job, self.env).run()
        evaluate_peak = t.peak_bytes
        t.peak_bytes = max(before, walk_peak, step_peak, evaluate_peak)
        t.finish()
        trainable = self.built.trainable
        return Estimate(
            ready_bytes=ready,
            peak_allocated_bytes=max(walk_peak, step_peak, evaluate_peak),
            load_peak_bytes=load_peak,
            evaluate_peak_bytes=evaluate_peak if self.job.evaluate else None,
            static_bytes=static,
            optimizer_bytes=optimizer_bytes,
            paged_bytes=paged,
            work=work,
            num_micro_steps=self.job.gradient_accumulation_steps,
            num_trainable=self.built.num_trainable,
            num_trainable_tensors=sum(p.copies for p in trainable),
            trainable_bytes=sum(p.copies * p.numel * p.dtype.size for p in trainable),
            tape=t,
        )

    # -- parts of a step -----------------------------------------------------------------------

    def _optimizer_state(self) -> tuple[int, int, list[Storage]]:
        """Allocate the optimizer's state; returns device bytes, managed bytes and the storages."""
        optimizer = self.job.optimizer
        t = self.tape
        start, paged = t.live_bytes, 0
        held = [
            Storage(t, round_block(nbytes), Kind.OPTIMIZER, "optimizer")
            for nbytes in (optimizer.shared_parts() if self.built.trainable else ())
        ]
        for copies, params in groupby(self.built.trainable, key=lambda p: p.copies):
            with t.repeated(copies):
                for param in params:
                    parts, managed = optimizer.state_parts(
                        param.numel,
                        param.rows,
                        param.dtype,
                        embedding=param.embedding,
                        matrices=param.matrices,
                    )
                    paged += managed * copies
                    held += [
                        Storage(t, round_block(n), Kind.OPTIMIZER, param.owner) for n in parts if n
                    ]
        return t.live_bytes - start, paged, held

    def _workspaces(self) -> list[Storage]:
        """What cuBLAS and cuBLASLt hold for the thread of the forward and that of the backward."""
        held = []
        threads = num_cublaslt_threads(self.model, self.job)
        for library, nbytes, count in (
            ("cublas", self.workspace_bytes, 2),
            ("cublaslt", CUBLASLT_WORKSPACE, threads),
        ):
            for backward in (False, True)[:count]:
                storage = Storage(self.tape, nbytes, Kind.WORKSPACE, "cublas")
                self.tape.await_use(library, backward=backward, block=storage.block)
                held.append(storage)
        return held

    def _batches(self) -> list[Storage]:
        """input_ids, attention_mask and labels, as the data loader moves them to the device.

        Trainer fetches those of all micro-batches first, to count their labels.

        Source: transformers 5.17.0 ``trainer.py`` (``get_batch_samples``).
        """
        nbytes, steps = round_block(self.job.tokens * 8), self.job.gradient_accumulation_steps
        return [Storage(self.tape, nbytes, Kind.BATCH, "batch", steps) for _ in range(3)]

    def _micro_step(self) -> None:
        t, forward = self.tape, self.forward
        t.phase = Phase.FORWARD
        t.close_work(1)
        t.work = []
        t.kind = Kind.ACTIVATIONS
        loss = forward.run()[0]
        t.phase = Phase.BACKWARD
        with t.no_autocast():
            self._backward(loss)
        del loss
        t.drop_graph()
        self.env.kept = None
        if forward.leaf is not None:
            forward.leaf.release()
            forward.leaf = None
        t.close_work(1)

    def _backward(self, loss: Tensor) -> None:
        """Layer by layer, so that folded layers are folded here too."""
        t = self.tape
        t.start_backward(loss)
        marks = self.forward.marks
        for index in reversed(range(len(self.runs))):
            t.run_backward(marks[index + 1])
            with t.repeated(self.runs[index].repeats):
                t.run_backward(marks[index])
            # the checkpoints of the layers still to come hold theirs
            self.env.keep([kind for run in self.runs[:index] for kind in run.kinds])
        t.run_backward()

    def _optimizer_step(self) -> None:
        """Clipping, the optimizer and zero_grad."""
        t = self.tape
        t.phase = Phase.STEP
        t.owner = "optimizer"
        trainable = self.built.trainable
        self._clip(trainable)
        self._update(trainable)
        t.zero_grad(self.built.trainable)

    def _clip(self, trainable: list[Param]) -> None:
        """clip_grad_norm_: a norm a gradient, from partial sums for each of its chunks.

        Source: torch 2.11 ``native/cuda/ForeachReduceOp.cu`` (``foreach_tensor_norm_cuda``: as many
        chunks for every tensor as the largest has).
        """
        count = sum(param.copies for param in trainable)
        chunks = max((-(-param.numel // NORM_CHUNK) for param in trainable), default=0)
        sums = Storage(self.tape, round_block(count * chunks * 4), Kind.WORKSPACE, CLIP)
        norms = Storage(self.tape, BLOCK_BYTES * count, Kind.WORKSPACE, CLIP)
        del sums, norms

    def _update(self, trainable: list[Param]) -> None:
        """The temporaries of the optimizer's step."""
        t, optimizer = self.tape, self.job.optimizer
        if optimizer.factored:
            self._adafactor_update(trainable)
            return
        made: list[tuple[int, Storage]] = []
        for copies, params in groupby(trainable, key=lambda p: p.copies):
            with t.repeated(copies):  # in the order of the parameters, layer after layer
                made += [
                    (copies, Storage(t, nbytes, Kind.WORKSPACE, "optimizer"))
                    for param in params
                    for nbytes in optimizer.step_temporaries(param.numel, param.dtype)
                ]
        for copies, storage in made:  # all live until the last
            storage.copies = copies

    def _adafactor_update(self, trainable: list[Param]) -> None:
        """Adafactor.step: one parameter after another, first all that decay, in fp32.

        Locals of its loop still hold the last parameter's tensors while the next one's are made.

        Source: transformers 5.17.0 ``optimization.py`` (``Adafactor.step``).

        Known limitations:
            The buffer of a mean over many rows is left out; it is smaller than what goes before it.
        """
        decayed = [param for param in trainable if param.rows]
        grad = weights = update = None
        for param in (*decayed, *(param for param in trainable if not param.rows)):
            nbytes = round_block(param.numel * FP32.size)

            def new(nbytes: int = nbytes) -> Storage:
                return Storage(self.tape, nbytes, Kind.WORKSPACE, "optimizer")

            cast = param.dtype is not FP32
            grad = None
            grad = new() if cast else None
            weights = None
            weights = new() if cast else None
            squared = new()
            raised = new()  # grad ** 2 + eps
            del squared
            update = raised
            del raised
            update = new()  # grad / sqrt(averages)
            negative = new()
            del negative
        del grad, weights, update
