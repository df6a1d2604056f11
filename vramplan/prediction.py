"""From a job to every number a user asks for: device, host, disk, and the verdict per card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from vramplan.estimate import DEFAULT_CAPABILITY, Estimate, estimate
from vramplan.evaluate import host_bytes
from vramplan.job import Job
from vramplan.loading import load_peak_bytes, load_requests
from vramplan.model import Model, TracedModel
from vramplan.phases import first_step_peak, phase_peaks, save_bytes
from vramplan.profile import Profile, profile_for
from vramplan.replay import Replay, replay
from vramplan.timeline import BEFORE_TRAINING, Kind, Peak, Phase, Timeline

if TYPE_CHECKING:
    from vramplan.gpus import Gpu


# Smallest limits that were really found lie at most so far above the replayed ones
# (reports/accuracy.md); a verdict keeps this distance.
LIMIT_MARGIN = 0.01
EXPANDABLE = "expandable_segments:True"


class Witness(Protocol):
    """What the estimate and the trace both tell of a job, in bytes."""

    @property
    def ready_bytes(self) -> int: ...  # noqa: D102
    @property
    def peak_allocated_bytes(self) -> int: ...  # noqa: D102
    @property
    def load_peak_bytes(self) -> int: ...  # noqa: D102
    @property
    def optimizer_bytes(self) -> int: ...  # noqa: D102
    @property
    def paged_bytes(self) -> int: ...  # noqa: D102
    @property
    def num_trainable(self) -> int: ...  # noqa: D102
    @property
    def flops(self) -> int | None: ...  # noqa: D102
    @property
    def timeline(self) -> Timeline: ...  # noqa: D102

    def peak(self) -> Peak: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Prediction:
    """All numbers of one job, in bytes.

    Attributes:
        estimate: The walk behind it, or the trace.
        profile: The measured constants it uses.
        cache: What the caching allocator makes of the walk.
        process_bytes: What the process holds beyond reserved memory.
        load_bytes: Largest allocated while ``from_pretrained`` loads the model.
        download_bytes: The checkpoint on disk.
        adapter_bytes: What training saves: the adapter, or the whole model.
    """

    job: Job
    model: Model | TracedModel
    estimate: Witness
    profile: Profile
    cache: ReplayedCache | SimilarCache
    process_bytes: int
    load_bytes: int
    download_bytes: int
    adapter_bytes: int

    @property
    def ready_bytes(self) -> int:
        """Allocated when training is about to start, unsplit blocks at their full size."""
        return self.estimate.ready_bytes + self.cache.ready_slack_bytes

    @property
    def load_peak_bytes(self) -> int:
        """Largest allocated while the model is loaded, quantised and prepared.

        Known limitations:
            Small parameters of repeated layers are taken as fp32 from the start of preparing.
        """
        return max(self.replayed_load()[0], self.estimate.load_peak_bytes)

    def replayed_load(self) -> tuple[int, int]:
        """Largest allocated and reserved while ``from_pretrained`` loads the model, in bytes.

        Unsplit blocks count at their full size. Of six recorded loads of real checkpoints five
        agree to a KiB in allocated bytes and all in reserved ones (``tests/unit/test_loading.py``).
        """
        if isinstance(self.model, TracedModel):  # a trace writes the load as it goes
            return self.load_bytes, self.load_bytes
        allocator = replay(load_requests(self.model, self.job))
        return allocator.peak_allocated, allocator.peak_reserved

    @property
    def before_training_bytes(self) -> int:
        """Most that loading and preparing need at once, whatever the allocator makes of it."""
        return max(self.load_bytes, self.estimate.load_peak_bytes)

    @property
    def first_step_peak_allocated_bytes(self) -> int | None:
        """Largest allocated in the first step: optimizer state and a workspace come during it.

        None from a trace, whose steps are told apart by nobody.
        """
        if not isinstance(self.estimate, Estimate):
            return None
        return first_step_peak(self.estimate.timeline) + self.cache.slack_bytes

    @property
    def evaluate_peak_allocated_bytes(self) -> int | None:
        """Largest allocated in an evaluation; None for a job without."""
        walked = self.estimate
        peak = walked.evaluate_peak_bytes if isinstance(walked, Estimate) else None
        return None if peak is None else peak + self.cache.slack_bytes

    @property
    def save_peak_allocated_bytes(self) -> int | None:
        """Largest allocated while a checkpoint is saved: nothing beside what is there already.

        None from a trace.
        """
        if not isinstance(self.estimate, Estimate) or not isinstance(self.model, Model):
            return None
        held = self.estimate.static_bytes + save_bytes(self.model, self.job)
        return held + self.cache.slack_bytes

    @property
    def peak_phase(self) -> str:
        """The phase that needs most: load, prepare, one of the step's, or evaluate."""
        if self.before_training_bytes > self.peak_allocated_bytes:
            loads = self.load_bytes >= self.estimate.load_peak_bytes
            return (Phase.LOAD if loads else Phase.PREPARE).value
        return self.peak().phase.value

    def phases(self) -> dict[str, int]:
        """Largest allocated in every phase, in bytes, in the order of a run."""
        walked = phase_peaks(self.estimate.timeline)
        slack = self.cache.slack_bytes
        saved = self.save_peak_allocated_bytes
        return (
            {
                Phase.LOAD.value: self.replayed_load()[0],
                Phase.PREPARE.value: max(self.estimate.load_peak_bytes, self.ready_bytes),
            }
            | {p.value: n + slack for p, n in walked.items() if p not in BEFORE_TRAINING}
            | ({} if saved is None else {Phase.SAVE.value: saved})
        )

    @property
    def peak_allocated_bytes(self) -> int:
        """Largest allocated from the second step on, evaluation included.

        Unsplit blocks count at their full size.
        """
        return self.estimate.peak_allocated_bytes + self.cache.slack_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """Largest reserved by the caching allocator on a roomy card."""
        peak = self.peak_allocated_bytes
        return max(self.cache.reserved_bytes, peak, self.before_training_bytes)

    @property
    def min_limit_bytes(self) -> int:
        """Smallest allocator limit at which the job still runs (costs a search)."""
        walked = self.estimate.peak_allocated_bytes
        return max(self.cache.min_limit_bytes(), walked, self.before_training_bytes)

    @property
    def context_bytes(self) -> int:
        """A CUDA context alone."""
        return self.profile.context_bytes

    @property
    def device_peak_bytes(self) -> int:
        """What the driver shows for the process on a roomy card, paged state included."""
        managed = self.profile.managed_bytes(self.paged_bytes)
        return self.peak_reserved_bytes + self.process_bytes + managed

    @property
    def paged_bytes(self) -> int:
        """Optimizer state in managed memory, which can leave the device."""
        return self.estimate.paged_bytes

    @property
    def host_ram_bytes(self) -> int:
        """Host memory of the process: all paged state evicted to it, evaluated logits kept."""
        kept = host_bytes(self.model, self.job) if isinstance(self.model, Model) else 0
        return self.profile.host_bytes + self.paged_bytes + kept

    @property
    def optimizer_file_bytes(self) -> int:
        """Optimizer state of one saved checkpoint."""
        return self.estimate.optimizer_bytes + self.paged_bytes

    @property
    def disk_bytes(self) -> int:
        """Checkpoint download, saved weights and one optimizer checkpoint."""
        return self.download_bytes + self.adapter_bytes + self.optimizer_file_bytes

    def breakdown(self) -> dict[Kind, int]:
        """Bytes by kind at the peak; they sum to ``peak_allocated_bytes``."""
        parts = self.estimate.peak().by_kind
        if self.cache.slack_bytes:
            parts[Kind.ROUNDING] = self.cache.slack_bytes
        return parts

    def peak(self) -> Peak:
        """The fullest moment and what is in it."""
        return self.estimate.peak()

    @property
    def witness(self) -> str:
        """Who told: ``estimate`` or ``trace``."""
        return "trace" if isinstance(self.model, TracedModel) else "estimate"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a job fits one card.

    Attributes:
        gpu: Slug or size asked for.
        usable_bytes: What a process can have of it.
        verdict: ``fits``, ``tight`` or ``no``.
        headroom_bytes: Usable minus what the job takes unhurried (minus its smallest need, safety
            margin included, when it does not fit unhurried). Negative exactly for ``no``.
    """

    gpu: str
    usable_bytes: int
    verdict: str
    headroom_bytes: int


def job_for(job: Job, gpu: Gpu | None) -> Job:
    """The job as this card would run it: without bf16 units it trains in fp16 with a scaler.

    The scaler refuses 16-bit gradients, so full fine-tuning then needs fp32 weights; adapters are
    fp32 anyway.

    Source: torch 2.11 ``amp/grad_scaler.py`` ("Attempting to unscale FP16 gradients").
    """
    if gpu is None or gpu.supports_bf16:
        return job
    precision = "fp16" if job.mixed_precision == "bf16" else job.mixed_precision
    dtype = "fp16" if job.dtype == "bf16" else job.dtype
    if job.method == "full" and precision == "fp16":
        dtype = "fp32"
    return replace(job, mixed_precision=precision, dtype=dtype)


def alike(gpu: Gpu | None) -> tuple[object, ...]:
    """What of a card a prediction depends on: cards with equal answers share predictions.

    Only the kernels change with the generation; constants are the card's own or borrowed.
    """
    major = (gpu.compute_capability if gpu else DEFAULT_CAPABILITY)[0]
    profile = profile_for(gpu.slug if gpu else None)
    return min(max(major, 7), 10), profile.name, profile.borrowed


def predict(
    model: Model,
    job: Job,
    gpu: Gpu | None = None,
    *,
    like: Prediction | None = None,
    random_weights: bool = False,
) -> Prediction:
    """Predict every number of a job on a card.

    Args:
        model: The model.
        job: The job; see ``job_for`` for cards without bf16.
        gpu: The card, None for any card.
        like: A prediction of a similar job. Its shares of cached memory are taken over instead of
            replaying the allocator, which makes the search for advice ten times faster; such
            numbers are estimates of what ``predict`` alone would say.
        random_weights: Whether the weights are made on the card, as the harness does unless it is
            given a checkpoint, and not loaded by ``from_pretrained``.

    Returns:
        The prediction.

    Raises:
        UsageError: If the job does not go with the model.
    """
    capability = gpu.compute_capability if gpu else DEFAULT_CAPABILITY
    profile = profile_for(gpu.slug if gpu else None)
    walked = estimate(
        model,
        job,
        capability=capability,
        workspace_bytes=profile.cublas_workspace_bytes,
        from_checkpoint=like is None and not random_weights,  # it shapes the cache alone
    )
    cache: ReplayedCache | SimilarCache
    if like is None:
        cache = ReplayedCache(Replay(walked.timeline, job.allocator_settings), walked)
    else:
        cache = SimilarCache(like, walked)
    return conclude(model, job, walked, profile, cache, _load_bytes(model, job, like))


def conclude(
    model: Model | TracedModel,
    job: Job,
    told: Witness,
    profile: Profile,
    cache: ReplayedCache | SimilarCache,
    load_bytes: int,
) -> Prediction:
    """The numbers that follow from what a witness tells and from a card's constants.

    Args:
        model: The model.
        job: The job.
        told: The estimate or the trace.
        profile: The card's constants.
        cache: What the caching allocator makes of it.
        load_bytes: Largest allocated while the model is loaded.
    """
    return Prediction(
        job=job,
        model=model,
        estimate=told,
        profile=profile,
        cache=cache,
        process_bytes=profile.process_bytes(bitsandbytes=job.uses_bitsandbytes),
        load_bytes=load_bytes,
        download_bytes=model.num_parameters * model.checkpoint_dtype.size,
        adapter_bytes=_saved_bytes(model, job, told),
    )


def with_expandable(job: Job) -> Job:
    """The job with ``expandable_segments:True`` beside its other settings."""
    conf = job.alloc_conf
    return job.but(alloc_conf=f"{conf},{EXPANDABLE}" if conf else EXPANDABLE)


def expandable(prediction: Prediction) -> Prediction:
    """The prediction of the same job with ``expandable_segments:True``, replayed.

    Args:
        prediction: One that was replayed itself.
    """
    assert isinstance(prediction.cache, ReplayedCache)
    job = with_expandable(prediction.job)
    replayed = prediction.cache.replayed.under(job.allocator_settings)
    return replace(prediction, job=job, cache=ReplayedCache(replayed, prediction.estimate))


class ReplayedCache:
    """What the caching allocator makes of a job, by replay."""

    def __init__(self, replayed: Replay, walked: Witness) -> None:
        self.replayed = replayed
        self.ready_slack_bytes = replayed.ready_slack_bytes()
        self.slack_bytes = replayed.slack_bytes()
        self.reserved_bytes = replayed.reserved_bytes()
        self._peak = walked.peak_allocated_bytes
        self._least: int | None = None

    def runs_within(self, limit: int) -> bool:
        """Whether the job runs when the allocator may reserve ``limit`` bytes."""
        return limit >= self._peak and self.replayed.runs_within(limit)

    def min_limit_bytes(self) -> int:
        """Smallest limit at which it runs (found by bisection at the first call)."""
        if self._least is None:
            self._least = self.replayed.min_limit_bytes()
        return self._least


class SimilarCache:
    """The same from the shares of a similar, replayed job."""

    def __init__(self, like: Prediction, walked: Estimate) -> None:
        peak = walked.peak_allocated_bytes
        moving = max(0, peak - walked.static_bytes)
        other = like.estimate
        assert isinstance(other, Estimate)
        other_moving = max(1, other.peak_allocated_bytes - other.static_bytes)
        idle = max(0, like.peak_reserved_bytes - other.peak_allocated_bytes)
        self.ready_slack_bytes = self.slack_bytes = 0
        self.reserved_bytes = peak + idle * moving // other_moving
        self._least = peak + moving // 10

    def runs_within(self, limit: int) -> bool:
        """Whether the job should run within ``limit`` reserved bytes."""
        return limit >= self._least

    def min_limit_bytes(self) -> int:
        """Roughly the smallest limit at which it runs."""
        return self._least


LOADED_BY = ("method", "dtype", "quant_type", "double_quant")  # fields that decide the load


def _load_bytes(model: Model, job: Job, like: Prediction | None) -> int:
    """The load peak; a similar job's where it is loaded alike."""
    if like is not None and all(getattr(job, n) == getattr(like.job, n) for n in LOADED_BY):
        return like.load_bytes
    return load_peak_bytes(model, job)


def _saved_bytes(model: Model | TracedModel, job: Job, told: Witness) -> int:
    """The saved adapter (fp32), or the whole model in its dtype."""
    if job.method == "full":
        return model.num_parameters * job.weight_dtype.size
    return told.num_trainable * 4


def usable_bytes(gpu: Gpu) -> int | None:
    """What a process can have of a card nobody else uses, in bytes; None if not known."""
    if gpu.memory_bytes is None:
        return None
    return gpu.memory_bytes - profile_for(gpu.slug).driver_reserved_bytes


def judge(prediction: Prediction, name: str, usable_bytes: int) -> Verdict:
    """Compare a prediction with what a card offers.

    ``fits``: all it would reserve, unhurried, is within the usable memory. ``tight``: it only runs
    with the allocator held to what the card has, with ``LIMIT_MARGIN`` to spare; expect retries and
    slower steps.

    Args:
        prediction: The job.
        name: How to name the card.
        usable_bytes: What a process can have of it.
    """
    room = usable_bytes - prediction.device_peak_bytes
    if room >= 0:
        return Verdict(name, usable_bytes, "fits", room)
    limit = int((usable_bytes - prediction.process_bytes) / (1 + LIMIT_MARGIN))
    spare = limit - prediction.min_limit_bytes
    return Verdict(name, usable_bytes, "tight" if spare >= 0 else "no", spare)


def least_bytes(prediction: Prediction) -> int:
    """What a card must offer for anything but ``no``: the smallest need with its safety margin."""
    needed = int(prediction.min_limit_bytes * (1 + LIMIT_MARGIN))
    return needed + prediction.process_bytes
