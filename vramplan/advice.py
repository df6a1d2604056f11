"""What would make a job fit, and what there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from vramplan.errors import UsageError
from vramplan.estimate import Estimate
from vramplan.job import EVALUATION, Job
from vramplan.model import Model
from vramplan.prediction import (
    Prediction,
    SimilarCache,
    Verdict,
    expandable,
    judge,
    predict,
    with_expandable,
)

if TYPE_CHECKING:
    from vramplan.gpus import Gpu

SEQ_STEP = 64
MAX_BATCH = 1024
MAX_RANK = 1024
MAX_CHANGES = 3
# A variant takes over the share of cached memory; its own replay can come out so much higher.
APPROXIMATION = 0.05
NOTICEABLE = 0.01
VERDICTS = ("no", "tight", "fits")


@dataclass(frozen=True, slots=True)
class Advice:
    """One change to a job.

    Attributes:
        change: The options to change, as typed.
        why: What it does, in words.
        kind: ``largest`` (room for), ``switch`` (the price of one switch) or ``fix`` (makes it
            fit).
        device_peak_bytes: What the changed job would take on a roomy card.
        verdict: Verdict on the card asked about.
        approximate: Whether the allocator was not replayed for it: ``fit`` with these options says
            it exactly.
    """

    change: str
    why: str
    kind: str
    device_peak_bytes: int
    verdict: str
    approximate: bool = False


class Switch(NamedTuple):
    """A change that can be tried: fields to replace and how to say it."""

    change: str
    why: str
    fields: tuple[tuple[str, object], ...]


class Adviser:
    """Answers for one job on one card; remembers what it has already worked out.

    Args:
        model: The model.
        job: The job asked about.
        headline: Its prediction; the variants take the allocator's share from it.
        name: How the card was named.
        usable_bytes: What the card offers.
        gpu: The card, None for a plain memory size.
    """

    def __init__(
        self,
        model: Model,
        job: Job,
        headline: Prediction,
        name: str,
        usable_bytes: int,
        gpu: Gpu | None,
    ) -> None:
        self.model = model
        self.job = job
        self.headline = headline
        self.name = name
        self.usable_bytes = usable_bytes
        self.gpu = gpu
        own = judge(headline, name, usable_bytes)
        self._known: dict[Job, tuple[Prediction, Verdict]] = {job: (headline, own)}
        self._bases = {(job.alloc_conf, *_evaluation(job)): headline}

    def try_job(self, job: Job) -> tuple[Prediction, Verdict]:
        """Prediction and verdict of a variant.

        Its share of cached memory is the headline's; with other segments, that of the headline
        replayed with them. What is not replayed fits only with ``APPROXIMATION`` to spare.
        """
        if job not in self._known:
            base = self._base(job)
            same = base.job == job
            prediction = base if same else predict(self.model, job, self.gpu, like=base)
            verdict = judge(prediction, self.name, self.usable_bytes)
            spare = verdict.headroom_bytes
            if not same and verdict.verdict == "fits" and spare < self._doubt:
                verdict = replace(verdict, verdict="tight")
            self._known[job] = prediction, verdict
        return self._known[job]

    @property
    def _doubt(self) -> int:
        return int(APPROXIMATION * self.usable_bytes)

    def _advice(self, change: str, why: str, kind: str, job: Job) -> Advice:
        prediction, verdict = self.try_job(job)
        return Advice(
            change,
            why,
            kind,
            prediction.device_peak_bytes,
            verdict.verdict,
            approximate=isinstance(prediction.cache, SimilarCache),
        )

    def _base(self, job: Job) -> Prediction:
        """The job asked about with another's evaluation and segments, replayed.

        These cache quite other memory.
        """
        key = job.alloc_conf, *_evaluation(job)
        if key not in self._bases:
            fields = dict(zip(EVALUATION, _evaluation(job), strict=True))
            if job.alloc_conf == self.job.alloc_conf:
                self._bases[key] = predict(self.model, self.job.but(**fields), self.gpu)
            else:
                self._bases[key] = expandable(self._base(self.job.but(**fields)))
        return self._bases[key]

    def _may_gain_from_segments(self) -> bool:
        """Whether expandable segments are worth a replay of their own, as long as all the rest.

        They save at most what lies idle at the peak; a job that fits with more than that to spare
        has no use for it.
        """
        if self.job.allocator_settings.expandable_segments:
            return False
        idle = self.headline.peak_reserved_bytes - self.headline.peak_allocated_bytes
        own = self._known[self.job][1]
        return own.verdict != VERDICTS[-1] or idle > own.headroom_bytes

    # -- what there is room for ----------------------------------------------------------------

    def largest(self) -> list[Advice]:
        """The largest batch, sequence and rank that fit, everything else unchanged.

        Only for a job that fits as it is.
        """
        job = self.job
        top = self.model.dims.max_positions
        found = [
            self._largest("batch_size", "--batch-size", "largest batch", MAX_BATCH, 1),
            self._largest("seq_len", "--seq-len", "longest sequence", top, SEQ_STEP),
        ]
        if job.method != "full":
            found.append(self._largest("lora_r", "--lora-r", "largest rank", MAX_RANK, 8))
        return found

    def _largest(self, field: str, option: str, what: str, top: int, step: int) -> Advice:
        start = getattr(self.job, field)

        def variant(value: int) -> Job:
            return self.job.but(**{field: value})

        def peak(value: int) -> int:
            return self.try_job(variant(value))[0].device_peak_bytes

        walked = self.headline.estimate
        assert isinstance(walked, Estimate)
        if field == "lora_r":
            growing = 8 * walked.num_trainable  # fp32 adapters and their gradients
        else:
            growing = walked.peak_allocated_bytes - walked.static_bytes
        limit = self.usable_bytes - self._doubt
        value = search_largest(peak, limit, start, max(top, start), step, growing / start)
        return self._advice(f"{option} {value}", f"{what} that fits", "largest", variant(value))

    # -- the price of each switch ----------------------------------------------------------------

    def switches(self) -> list[Advice]:
        """What each single switch costs or saves, cheapest result first."""
        found = []
        for switch in self._candidates():
            tried = self._try(switch)
            if tried is not None and self._matters(switch, *tried):
                job = self._changed(switch)
                found.append(self._advice(switch.change, switch.why, "switch", job))
        return sorted(found, key=lambda advice: advice.device_peak_bytes)

    def _changed(self, *switches: Switch) -> Job:
        changes: dict[str, object] = {}
        for switch in switches:
            changes.update(switch.fields)
        return self.job.but(**changes)

    def _try(self, *switches: Switch) -> tuple[Prediction, Verdict] | None:
        try:
            return self.try_job(self._changed(*switches))
        except UsageError:  # the model does not have it
            return None

    def _settle(self, switch: Switch) -> None:
        """Replay a change that is too close to the card's edge to be judged by its likes."""
        job = self._changed(switch)
        prediction, _ = self.try_job(job)
        close = abs(self.usable_bytes - prediction.device_peak_bytes) <= self._doubt
        if close and isinstance(prediction.cache, SimilarCache):
            exact = predict(self.model, job, self.gpu)
            self._known[job] = exact, judge(exact, self.name, self.usable_bytes)

    def _candidates(self) -> Iterator[Switch]:
        """Switches that change this job, the gentlest first."""
        job = self.job
        if self._may_gain_from_segments():
            conf = with_expandable(job).alloc_conf
            yield Switch(
                f"--alloc-conf {conf}",
                "PYTORCH_ALLOC_CONF: segments that grow",
                (("alloc_conf", conf),),
            )
        yield from evaluation_switches(job)
        if not job.gradient_checkpointing:
            yield Switch(
                "--gradient-checkpointing",
                "recompute activations",
                (("gradient_checkpointing", True),),
            )
        if job.attn_implementation == "eager":
            yield Switch(
                "--attn-implementation sdpa",
                "no score matrix",
                (("attn_implementation", "sdpa"),),
            )
        if job.method == "full" and job.optimizer_name != "adamw_8bit":
            yield Switch("--optim adamw_8bit", "8-bit optimizer state", (("optim", "adamw_8bit"),))
        if job.method != "full" and not job.optimizer.paged:
            yield Switch(
                "--optim paged_adamw_8bit",
                "paged 8-bit optimizer state",
                (("optim", "paged_adamw_8bit"),),
            )
        if job.quantised and not job.double_quant:
            yield Switch("--double-quant", "quantise the scales too", (("double_quant", True),))
        if job.batch_size > 1:
            half = max(1, job.batch_size // 2)
            steps = job.gradient_accumulation_steps * job.batch_size // half
            yield Switch(
                f"--batch-size {half} --gradient-accumulation-steps {steps}",
                "half the batch, accumulated",
                (("batch_size", half), ("gradient_accumulation_steps", steps)),
            )
        if job.seq_len >= 2 * SEQ_STEP:
            yield Switch(
                f"--seq-len {job.seq_len // 2}",
                "half the sequence",
                (("seq_len", job.seq_len // 2),),
            )
        if job.quantised and job.prepare_kbit:
            yield Switch(
                "--no-prepare-kbit",
                "unquantised layers stay in 16 bit",
                (("prepare_kbit", False),),
            )
        if job.method == "full":
            yield Switch("--method lora", "train adapters only", (("method", "lora"),))
        if job.method != "qlora":
            yield Switch("--method qlora", "4-bit weights", (("method", "qlora"), ("optim", None)))
        if job.gradient_checkpointing:
            yield Switch(
                "--no-gradient-checkpointing",
                "faster, keeps all activations",
                (("gradient_checkpointing", False),),
            )

    def _matters(self, switch: Switch, prediction: Prediction, verdict: Verdict) -> bool:
        """Whether a switch is worth a line: the allocator's settings only where they help."""
        if switch.fields[0][0] != "alloc_conf":
            return True
        own = self._known[self.job][1]
        saved = self.headline.device_peak_bytes - prediction.device_peak_bytes
        better = VERDICTS.index(verdict.verdict) > VERDICTS.index(own.verdict)
        return better or saved > NOTICEABLE * self.headline.device_peak_bytes

    # -- what makes it fit -----------------------------------------------------------------------

    def fixes(self) -> list[Advice]:
        """The smallest single change that makes it fit, or else the smallest combination."""
        savers = [
            switch
            for switch in self._candidates()
            if (tried := self._try(switch)) is not None
            and tried[0].device_peak_bytes < self.headline.device_peak_bytes
            and self._matters(switch, *tried)
        ]
        for switch in savers:
            self._settle(switch)
        for count in range(1, MAX_CHANGES + 1):
            found = []
            for chosen in combinations(savers, count):
                tried = self._try(*chosen)
                if tried is not None and tried[1].verdict == "fits":
                    change = " ".join(switch.change for switch in chosen)
                    why = ", ".join(switch.why for switch in chosen)
                    found.append(self._advice(change, why, "fix", self._changed(*chosen)))
            if found:
                # the least saving that suffices is the smallest change
                return sorted(found, key=lambda advice: -advice.device_peak_bytes)[:3]
        return []


def _evaluation(job: Job) -> tuple[object, ...]:
    return tuple(getattr(job, name) for name in EVALUATION)


def evaluation_switches(job: Job) -> Iterator[Switch]:
    """What makes an evaluation smaller."""
    if job.eval_logits and job.eval_accumulation_steps != 1:
        yield Switch(
            "--eval-accumulation-steps 1",
            "logits go to host RAM after every batch",
            (("eval_accumulation_steps", 1),),
        )
        yield Switch(
            "without --eval-logits",
            "the loss alone; preprocess_logits_for_metrics keeps little more",
            (("eval_logits", False), ("eval_accumulation_steps", None)),
        )
    if job.evaluate and job.eval_batch_size > 1:
        yield Switch("--eval-batch-size 1", "evaluate one by one", (("eval_batch_size", 1),))


def search_largest(
    peak: Callable[[int], int], limit: int, start: int, top: int, step: int, slope: float
) -> int:
    """The largest value, ``start`` plus a multiple of ``step``, whose peak is within ``limit``.

    Memory grows with every one of these numbers, nearly linearly, so lines through known points
    find the place in a few steps where halving would take ten.

    Args:
        peak: Bytes at a value; must not fall as the value grows.
        limit: Bytes there are.
        start: A value that fits.
        top: Largest value.
        step: Distance between values.
        slope: First guess of the bytes per unit.

    Returns:
        The value.
    """
    low, low_peak = start, peak(start)
    high, high_peak = top + step, 0  # the first value known not to fit; peak 0: not tried
    while high - low > step:
        reach = (limit - low_peak) / max(slope, 1.0)
        guess = low + max(step, int(min(reach, float(high))) // step * step)
        guess = min(guess, low + (high - low - 1) // step * step)
        guess_peak = peak(guess)
        if guess_peak <= limit:
            slope = (guess_peak - low_peak) / (guess - low)
            low, low_peak = guess, guess_peak
        else:
            high, high_peak = guess, guess_peak
        if high_peak:
            slope = (high_peak - low_peak) / (high - low)
    return low


def least_number_of_cards(prediction: Prediction, usable_bytes: int) -> int | None:
    """Least cards of that size if all model, gradient and optimizer state were sharded evenly.

    Every card still needs its own process, activations and logits. A lower bound: communication
    buffers and gathered layers come on top.

    Returns:
        The number, or None if even the unsharded part does not fit one card.
    """
    parts = prediction.breakdown()
    sharded = sum(
        parts.get(kind, 0)
        for kind in parts
        if kind.value in ("weights", "adapters", "gradients", "optimizer")
    )
    sharded += prediction.paged_bytes
    own = prediction.peak_allocated_bytes + prediction.paged_bytes - sharded
    room = usable_bytes - prediction.process_bytes - own
    return None if room <= 0 else -(-sharded // room)
