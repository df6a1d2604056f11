"""Emulating smaller cards, and the smallest limit at which a job still runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vramplan.catalogue import model_from_config
from vramplan.errors import UsageError
from vramplan.gpus import find_gpu
from vramplan.measure.harness import Outcome
from vramplan.measure.spec import RunSpec
from vramplan.prediction import job_for, predict, usable_bytes
from vramplan.record import LimitSearch
from vramplan.units import MIB, format_bytes

RESOLUTION_BYTES = 32 * MIB
MAX_TRIES = 40


def emulated(spec: RunSpec) -> RunSpec:
    """The run held to what the card it stands in for would leave to the allocator.

    Args:
        spec: The run.

    Returns:
        The run itself if it stands in for none; else with a limit: what the card's driver reports
        as usable, less the CUDA context, kernels and the managed memory of a paged optimizer; and
        in fp16 on cards without bf16.

    Raises:
        UsageError: If the card's memory is not known or the job cannot even begin on it.

    Known limitations:
        Kernels are still those of the card at work: their workspaces and speeds are not the other
        card's.
    """
    if spec.emulated_gpu is None:
        return spec
    gpu = find_gpu(spec.emulated_gpu)
    usable = usable_bytes(gpu)
    if usable is None:
        raise UsageError(f"the memory of {gpu.slug} is not known; use --limit")
    job = job_for(spec.job, gpu)
    prediction = predict(model_from_config(spec.config, spec.model), job, gpu)
    managed = prediction.profile.managed_bytes(prediction.paged_bytes)
    limit = usable - prediction.process_bytes - managed
    if limit <= 0:
        raise UsageError(f"{gpu.slug} has no room beside its CUDA context")
    return replace(spec, job=job, limit_bytes=limit, emulated_gpu=gpu.slug)


def find_limit(
    run: Callable[[RunSpec], Outcome],
    spec: RunSpec,
    *,
    guess_bytes: int,
    resolution_bytes: int = RESOLUTION_BYTES,
    most_bytes: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Find the smallest allocator limit at which a job runs, by running it.

    From the guess outwards in doubling steps until one limit runs and one fails, then bisection.

    Args:
        run: Runs one spec.
        spec: The job; any limit of its own is replaced.
        guess_bytes: Where to begin, best a prediction.
        resolution_bytes: How close the two ends must come.
        most_bytes: What the card has; above it a limit is none.
        tell: Receives one line per try.

    Returns:
        The outcome at the smallest limit that ran, its record carrying ``limit_search``; or the
        outcome that ended the search early: a run that ended in another way than out of memory.

    Known limitations:
        Fragmentation can make a job fail at a limit above one at which it runs; the search takes
        the two as ordered and reports every try.
    """
    tries: list[tuple[int, str]] = []
    running: Outcome | None = None
    low: int | None = None  # largest failing
    high: int | None = None  # smallest running
    limit = _grid(guess_bytes, resolution_bytes)
    stride = resolution_bytes
    outcome: Outcome | None = None
    while len(tries) < MAX_TRIES:
        outcome = run(replace(spec, limit_bytes=limit))
        status = outcome.record.status
        tries.append((limit, status))
        tell(f"{format_bytes(limit)}: {'runs' if status == 'done' else status}")
        if status == "done":
            high, running = limit, outcome
        elif status == "oom":
            low = limit
            if most_bytes is not None and limit >= most_bytes:
                break
        else:
            return outcome
        if high is None:
            limit, stride = limit + stride, 2 * stride
        elif low is None:
            if limit <= resolution_bytes:
                break
            limit, stride = max(resolution_bytes, limit - stride), 2 * stride
        elif high - low <= resolution_bytes:
            break
        else:
            limit = _grid((low + high) // 2, resolution_bytes)
            if limit in (low, high):
                break
    if running is None or high is None:
        assert outcome is not None
        return outcome
    search = LimitSearch(
        smallest_running_bytes=high,
        largest_failing_bytes=low,
        resolution_bytes=resolution_bytes,
        tries=tries,
    )
    return Outcome(running.record.model_copy(update={"limit_search": search}), running.timeline)


def _grid(size: int, resolution: int) -> int:
    """The nearest multiple of the resolution, at least one."""
    return max(1, round(size / resolution)) * resolution
