"""From a job to every number a user asks for: device, host, disk, and the verdict per card."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vramplan.calibration import Calibration, calibration_for
from vramplan.estimate import Estimate, estimate
from vramplan.gpus import Gpu
from vramplan.job import Job
from vramplan.model import LinearSpec, Model
from vramplan.tape import round_block
from vramplan.timeline import Peak


@dataclass(frozen=True, slots=True)
class Prediction:
    """All numbers of one job, in bytes; None where vramplan does not know.

    Attributes:
        estimate: The walk behind it.
        ready_bytes: Allocated when training is about to start.
        peak_allocated_bytes: Largest allocated from the second step on.
        peak_reserved_bytes: Largest reserved by the caching allocator on a roomy card.
        min_limit_bytes: Smallest allocator limit at which the job still runs.
        context_bytes: A CUDA context alone.
        process_bytes: What the process holds beyond reserved memory.
        device_peak_bytes: What the driver shows for the process on a roomy card.
        paged_bytes: Optimizer state in managed memory, which can leave the device.
        load_peak_bytes: Largest allocated while the model is loaded and prepared.
        host_ram_bytes: Host memory of the process, with all paged state evicted to it.
        download_bytes: The checkpoint on disk.
        adapter_bytes: What training saves: the adapter, or the whole model.
        optimizer_file_bytes: Optimizer state of one saved checkpoint.
    """

    job: Job
    model: Model
    estimate: Estimate
    calibration: Calibration
    ready_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    min_limit_bytes: int
    context_bytes: int
    process_bytes: int
    device_peak_bytes: int
    min_device_bytes: int
    paged_bytes: int
    load_peak_bytes: int
    host_ram_bytes: int
    download_bytes: int
    adapter_bytes: int
    optimizer_file_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Checkpoint download, saved weights and one optimizer checkpoint."""
        return self.download_bytes + self.adapter_bytes + self.optimizer_file_bytes

    def peak(self) -> Peak:
        """The fullest moment and what is in it."""
        return self.estimate.timeline.peak()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a job fits one card.

    Attributes:
        gpu: Slug or size asked for.
        usable_bytes: What the driver reports.
        verdict: ``fits``, ``tight`` or ``no``.
        headroom_bytes: Usable minus what the job takes unhurried (minus its smallest need when it
            does not fit unhurried).
    """

    gpu: str
    usable_bytes: int
    verdict: str
    headroom_bytes: int


def job_for(job: Job, gpu: Gpu | None) -> Job:
    """The job as this card would run it: without bf16 units it trains in fp16 with a scaler."""
    if gpu is None or gpu.supports_bf16:
        return job
    return replace(
        job,
        mixed_precision="fp16" if job.mixed_precision == "bf16" else job.mixed_precision,
        dtype="fp16" if job.dtype == "bf16" else job.dtype,
    )


def predict(model: Model, job: Job, gpu: Gpu | None = None) -> Prediction:
    """Predict every number of a job on a card.

    Args:
        model: The model.
        job: The job; see ``job_for`` for cards without bf16.
        gpu: The card, None for any card.

    Returns:
        The prediction.

    Raises:
        UsageError: If the job does not go with the model.
    """
    hopper = gpu is None or gpu.compute_capability[0] == 9
    walked = estimate(model, job, hopper=hopper)
    calibration = calibration_for(gpu.slug if gpu else None)
    process = calibration.process_bytes(
        job.quantised or job.optimizer.library == "bitsandbytes"
    )
    reserved, limit = reserved_bounds(walked)
    return Prediction(
        job=job,
        model=model,
        estimate=walked,
        calibration=calibration,
        ready_bytes=walked.ready_bytes,
        peak_allocated_bytes=walked.peak_allocated_bytes,
        peak_reserved_bytes=reserved,
        min_limit_bytes=limit,
        context_bytes=calibration.context_bytes,
        process_bytes=process,
        device_peak_bytes=reserved + process,
        min_device_bytes=limit + process,
        paged_bytes=walked.paged_bytes,
        load_peak_bytes=load_peak(model, job, walked),
        host_ram_bytes=calibration.host_bytes + walked.paged_bytes,
        download_bytes=model.num_parameters * model.dims.dtype.size,
        adapter_bytes=_saved_bytes(model, job, walked),
        optimizer_file_bytes=walked.optimizer_bytes + walked.paged_bytes,
    )


def reserved_bounds(walked: Estimate) -> tuple[int, int]:
    """Reserved memory and the smallest working limit, until the allocator itself is modelled.

    Static blocks sit in full segments. What moves during a step leaves holes between long-lived
    blocks: recorded runs reserved up to 0.65 of the moving bytes on top when unhurried, and still
    ran with 0.28 of them. The bounds take these shares.

    Known limitations:
        A bound from a few recorded runs, marked as such wherever it is shown.
    """
    moving = max(0, walked.peak_allocated_bytes - walked.static_bytes)
    peak = walked.peak_allocated_bytes
    return peak + moving * 65 // 100, peak + moving * 28 // 100


def load_peak(model: Model, job: Job, walked: Estimate) -> int:
    """Largest allocated while loading and preparing, on the device.

    Loading quantises one weight at a time; preparing for k-bit training casts one unquantised
    parameter at a time to fp32.

    Source: transformers 5.17 ``core_model_loading.py``; peft 0.21 ``utils/other.py``.
    """
    arch = model.architecture
    linears = [m for m in (*arch.block, arch.head) if isinstance(m, LinearSpec)]
    size = job.weight_dtype.size
    largest = max(m.in_features * m.out_features for m in linears)
    plain = max(arch.embedding.num_parameters, arch.head.num_parameters)
    extra = round_block(max(largest, plain) * size) if job.quantised else 0
    return max(walked.ready_bytes, walked.base_bytes + extra)


def _saved_bytes(model: Model, job: Job, walked: Estimate) -> int:
    """The saved adapter (fp32), or the whole model in its dtype."""
    if job.method == "full":
        return model.num_parameters * job.weight_dtype.size
    return walked.num_trainable * 4


def judge(prediction: Prediction, name: str, usable_bytes: int) -> Verdict:
    """Compare a prediction with what a card offers.

    ``fits``: all it would reserve, unhurried, is within the usable memory. ``tight``: only the
    smallest working limit is; expect allocator retries and slower steps.
    """
    room = usable_bytes - prediction.device_peak_bytes
    if room >= 0:
        return Verdict(name, usable_bytes, "fits", room)
    least = usable_bytes - prediction.min_device_bytes
    if least >= 0:
        return Verdict(name, usable_bytes, "tight", least)
    return Verdict(name, usable_bytes, "no", least)
