"""Evaluation between two training steps: what ``Trainer.evaluate`` allocates.

The forward is the training one without a graph. What decides is what the loop keeps: with a
``compute_metrics`` function the logits of every batch, in fp32, stay on the card until
``eval_accumulation_steps`` batches are through, joined to one tensor after each batch. While they
are joined old, new and joined are there at once: with n batches twice all n. Without such a
function (or with ``prediction_loss_only``) nothing but the loss outlives a batch.

Source: transformers 5.17.0 ``trainer.py`` (``evaluation_loop``, ``prediction_step``),
``trainer_pt_utils.py`` (``EvalLoopContainer``, ``nested_concat``); accelerate 1.15.0
``data_loader.py`` (the next batch comes to the device before the loop lets go of the last).

Known limitations:
    Every sample is ``seq_len`` tokens long. Of more than ``MAX_BATCHES`` batches that stay on the
    card the middle ones are taken at once, which is exact for allocated memory and leaves out what
    joining them caches.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan.families import Family
from vramplan.families.common import Env
from vramplan.formats import BOOL, FP32, INT64, Dtype
from vramplan.forward import Forward
from vramplan.job import Job
from vramplan.layers import Built
from vramplan.model import Model
from vramplan.tape import Tape, Tensor
from vramplan.timeline import Kind, Phase

MAX_BATCHES = 64  # of those that stay on the card together, walked one by one
WHOLE = 2  # batches walked through the decoder; later ones differ in what is kept alone


class Container:
    """EvalLoopContainer: what it was given, joined to one tensor."""

    def __init__(self, t: Tape, kind: Kind) -> None:
        self.tape = t
        self.kind = kind
        self.tensor: Tensor | None = None

    def add(self, new: Tensor) -> None:
        """``torch.cat((tensors, new))``: the old ones go when the joined one is there."""
        if self.tensor is None:
            self.tensor = new
            return
        self.tensor = self.tape.new(self.tensor.numel + new.numel, new.dtype, self.kind)

    def skip(self, numel: int, dtype: Dtype) -> None:
        """As if so many elements had been added one batch after another."""
        before = 0 if self.tensor is None else self.tensor.numel
        self.tensor = None
        self.tensor = self.tape.new(before + numel, dtype, self.kind)

    def to_cpu(self) -> None:
        """``to_cpu_and_numpy``."""
        self.tensor = None


class EvaluationLoop:
    """Trainer's evaluation_loop over a job's evaluation data set.

    Args:
        t: The tape, after an optimizer step.
        family: The model's block programs.
        built: Its modules on the tape.
        job: The job.
        env: Training's shapes and attention.
    """

    def __init__(self, t: Tape, family: Family, built: Built, job: Job, env: Env) -> None:
        self.tape = t
        self.family = family
        self.built = built
        self.job = job
        dims = replace(  # model.eval(): nothing is dropped out
            env.dims, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0
        )
        self.env = replace(env, dims=dims, shared={})
        self.losses = Container(t, Kind.ACTIVATIONS)
        self.logits = Container(t, Kind.LOGITS)
        self.labels = Container(t, Kind.BATCH)

    def run(self) -> None:
        """Walk it, from the first batch to the arrays on the host."""
        t, job = self.tape, self.job
        t.phase = Phase.EVALUATE
        every = job.eval_accumulation_steps
        for adapter in self.built.adapters():
            adapter.dropout = 0.0
        inputs: list[Tensor] = []
        results: tuple[Tensor, ...] = ()
        trained = Forward(t, self.family, self.built, self.env).batch()  # training names it still
        with t.no_grad(self.built.trainable):
            for number, size in enumerate(batches_walked(job), 1):
                if size < 0:  # left out
                    self._skip(-size)
                    continue
                forward = self._forward(size)
                inputs = forward.batch()
                results = self._predict(forward, inputs, whole=number <= WHOLE)
                self._keep(results)
                if every is not None and number % every == 0:
                    self._to_cpu()
                    inputs, results = [], ()
                    t.empty_cache()
        self._to_cpu()
        t.kind = Kind.ACTIVATIONS
        del inputs, results, trained

    def _forward(self, size: int) -> Forward:
        tokens = size * self.job.seq_len
        env = replace(self.env, batch=size, tokens=tokens)
        return Forward(self.tape, self.family, self.built, env, training=False)

    def _predict(
        self, forward: Forward, inputs: list[Tensor], *, whole: bool
    ) -> tuple[Tensor, ...]:
        """prediction_step: losses, and logits and labels if they are kept."""
        t, job = self.tape, self.job
        t.kind = Kind.BATCH
        counted = t.new(forward.env.tokens, BOOL)  # _get_num_items_in_batch
        num_items = t.new(1, INT64)
        del counted
        t.kind = Kind.ACTIVATIONS
        logits = forward.run(whole=whole)[1]
        mean = t.new(1, FP32)
        del num_items
        if not job.eval_logits:
            del logits
        losses = t.new(job.eval_batch_size, FP32)  # losses.repeat(batch_size)
        del mean
        return (losses, logits, inputs[-1]) if job.eval_logits else (losses,)

    def _keep(self, results: tuple[Tensor, ...]) -> None:
        containers = (self.losses, self.logits, self.labels)
        for container, tensor in zip(containers, results, strict=False):
            container.add(tensor)

    def _skip(self, size: int) -> None:
        tokens = size * self.job.seq_len
        kept = self.logits.tensor
        assert kept is not None
        self.logits.skip(tokens * self.env.dims.vocab_size, kept.dtype)
        self.labels.skip(tokens, INT64)

    def _to_cpu(self) -> None:
        for container in (self.losses, self.logits, self.labels):
            container.to_cpu()


def num_samples(job: Job) -> int:
    """Sequences of the evaluation data set."""
    return 2 * job.eval_batch_size if job.eval_samples is None else job.eval_samples


def host_bytes(model: Model, job: Job) -> int:
    """What the logits take in host memory once they have left the card, in bytes.

    All of them become one fp32 array; arrays of several rounds are joined in turn, old and joined
    there at once.
    """
    if not job.eval_logits:
        return 0
    samples, every = num_samples(job), job.eval_accumulation_steps
    whole = samples * job.seq_len * model.dims.vocab_size * FP32.size
    rounds = 1 if every is None else -(-samples // (job.eval_batch_size * every))
    return whole * (2 if rounds > 1 else 1)


def batches_walked(job: Job) -> list[int]:
    """Sizes of the batches to walk, in order; a negative one stands for that many samples left out.

    Batches that leave nothing behind, and rounds between two moves to the host, are alike: two of
    them show all that more would.
    """
    full, rest = divmod(num_samples(job), job.eval_batch_size)
    size = job.eval_batch_size
    last = [rest] if rest else []
    every = job.eval_accumulation_steps
    if not job.eval_logits:
        return [size] * min(full, 2) + last
    if every is not None:
        full = min(full, 2 * every)
        last = last if full < 2 * every else []
    if every is None and full > MAX_BATCHES:
        half = [size] * (MAX_BATCHES // 2)
        return [*half, -size * (full - MAX_BATCHES), *half, *last]
    return [size] * full + last
