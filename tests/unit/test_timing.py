"""Step times: properties of the model, and how near it comes to the recorded runs."""

from __future__ import annotations

import math
import statistics
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.catalogue import find_model
from vramplan.estimate import estimate
from vramplan.gpus import find_gpu, load_gpus
from vramplan.job import Job
from vramplan.prediction import job_for
from vramplan.profile import REFERENCE_GPU, profile_for
from vramplan.record import Record, read_record
from vramplan.resources import profiles_dir
from vramplan.timefit import (
    START,
    TimeFit,
    fit_times,
    launch_overheads,
    measured_step_time,
    timed_runs,
)
from vramplan.timing import (
    EXTRAPOLATION_FACTOR,
    HOST_RATES,
    RATIO,
    RATIO_AT_PACE,
    Rates,
    StepTime,
    at_pace,
    card_seconds,
    host_seconds,
    pace,
    rates_of,
    scaled,
    step_time,
    whole_run,
)

FOLDER = profiles_dir() / "calibrations" / REFERENCE_GPU
H100 = find_gpu(REFERENCE_GPU)
MODEL = find_model("llama-3.2-1b")


def rates() -> Rates:
    found = rates_of(profile_for(REFERENCE_GPU))
    assert found is not None
    return found


def timed(job: Job, own: Rates | None = None, model: str = "llama-3.2-1b") -> StepTime:
    return step_time(estimate(find_model(model), job), job, own or rates())


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [read_record(path) for path in sorted((FOLDER / "runs").glob("*.json"))]


@pytest.fixture(scope="module")
def fitted(records: list[Record]) -> TimeFit:
    found = fit_times(records)
    assert found is not None
    return found


# -- against the recorded runs ---------------------------------------------------------------------


def test_every_family_is_foretold_by_the_others(fitted: TimeFit) -> None:
    """At the pace that a loop around the run showed of the host."""
    errors = sorted(abs(ratio - 1) for ratio in fitted.at_pace.values())
    assert len(errors) >= 90 and len(fitted.without) >= 20
    assert statistics.median(errors) <= 0.10
    assert errors[int(0.9 * len(errors))] <= 0.25
    assert errors[-1] <= 0.35


def test_without_the_pace_the_worst_is_worse(fitted: TimeFit) -> None:
    """Which is why `estimate` gives a range."""
    errors = sorted(abs(ratio - 1) for ratio in fitted.ratios.values())
    assert fitted.at_pace.keys() < fitted.ratios.keys()
    assert statistics.median(errors) <= 0.11
    assert errors[int(0.9 * len(errors))] <= 0.33
    assert 0.35 < errors[-1] <= 0.55


def test_another_kind_of_card(records: list[Record]) -> None:
    """An H200 by the H100's rates, at its own host's pace; no rate was fitted to these runs."""
    own = scaled(rates(), find_gpu("h200-141gb"), H100)
    folder = profiles_dir() / "calibrations" / "h200-141gb" / "runs"
    runs = timed_runs([read_record(path) for path in sorted(folder.glob("*.json"))])
    assert own is not None and len(runs) == 7
    errors = [
        step_time(run.walked, run.job, at_pace(own, run.launch_overhead_s)).step_s / run.measured_s
        - 1
        for run in runs
        if run.launch_overhead_s is not None
    ]
    assert len(errors) == 7
    assert statistics.median(map(abs, errors)) <= 0.10 and max(map(abs, errors)) <= 0.25
    decided_by_the_card = [run for run in runs if run.name.startswith(("gpt-neox", "qwen2.5-7b"))]
    for run in decided_by_the_card:
        assert step_time(run.walked, run.job, own).step_s == pytest.approx(run.measured_s, rel=0.1)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_host_half_as_fast(factor: float) -> None:
    slower = at_pace(rates(), factor * rates().launch_overhead_s)
    for name in HOST_RATES:
        assert getattr(slower, name) == pytest.approx(
            getattr(rates(), name) * factor ** rates().pace_exponent
        )
    assert slower.thin_flops_per_s == rates().thin_flops_per_s


def test_pace_of_a_run_is_that_of_the_loops_around_it(records: list[Record]) -> None:
    """The loop behind it, and the one behind the run just before."""
    found = [r for r in records if r.rates and r.created and r.wall_s][:1] * 3
    first, second, late = (
        record.model_copy(
            update={
                "name": name,
                "created": f"2026-11-24T21:{minute}+00:00",
                "wall_s": 8.0,
                "rates": {"launch_overhead_s": seconds} if seconds else None,
            }
        )
        for record, name, minute, seconds in zip(
            found, "abc", ("00:00", "00:10", "05:00"), (4e-6, 9e-6, None), strict=True
        )
    )
    assert launch_overheads([first, second, late]) == pytest.approx({"a": 4e-6, "b": 6e-6})


def test_what_the_card_decides_is_nearer(fitted: TimeFit) -> None:
    """Where the host has time to spare, its pace does not matter."""
    clocks = {run.name: step_time(run.walked, run.job, fitted.rates) for run in fitted.runs}
    errors = [
        abs(fitted.ratios[name] - 1)
        for name, clock in clocks.items()
        if clock.card_s > clock.host_s
    ]
    assert len(errors) >= 10
    assert statistics.median(errors) <= 0.07 and max(errors) <= 0.25


def test_the_same_job_is_not_always_as_fast(records: list[Record]) -> None:
    """Why no prediction comes nearer: five repeats of one job, one after another."""
    times = [
        seconds
        for record in records
        if record.name.startswith("gpt-j-6b-qlora-2x512-repeat")
        and (seconds := measured_step_time(record)) is not None
    ]
    assert len(times) == 5 and max(times) / min(times) > 1.3


def test_no_family_decides_the_constants(fitted: TimeFit) -> None:
    for name in START:
        value = getattr(fitted.rates, name)
        for without in fitted.without.values():
            assert 0.4 <= getattr(without, name) / value <= 2.5, name


def test_rates_are_below_what_the_card_has(fitted: TimeFit) -> None:
    own = fitted.rates
    assert H100.bf16_flops_per_s and H100.fp32_flops_per_s and H100.bandwidth_bytes_per_s
    assert own.attention_flops_per_s < own.thin_flops_per_s < H100.bf16_flops_per_s
    assert own.fp32_flops_per_s < H100.fp32_flops_per_s
    assert own.moved_bytes_per_s < H100.bandwidth_bytes_per_s
    assert own.launch_overhead_s < own.operation_s < own.quantised_call_s < own.micro_step_s


def test_shipped_profile_holds_the_fit(fitted: TimeFit) -> None:
    shipped = profile_for(REFERENCE_GPU).constants
    for field in fields(Rates):
        assert shipped[field.name].value == pytest.approx(
            getattr(fitted.rates, field.name), rel=1e-3
        ), field.name
    assert shipped[RATIO].low == pytest.approx(min(fitted.ratios.values()), rel=1e-3)
    assert shipped[RATIO].high == pytest.approx(max(fitted.ratios.values()), rel=1e-3)
    assert shipped[RATIO_AT_PACE].high == pytest.approx(max(fitted.at_pace.values()), rel=1e-3)


def test_slowed_runs_are_left_out(records: list[Record]) -> None:
    for record in records:
        if record.run.history or record.run.paging or record.num_alloc_retries:
            assert measured_step_time(record) is None
    record = next(r for r in records if r.run.evaluate and r.run.save)
    assert measured_step_time(record) == statistics.median(
        step.time_s for step in record.steps[1:-1] if step.time_s is not None
    )


def test_repeats_count_once(records: list[Record]) -> None:
    names = [run.name for run in timed_runs(records)]
    assert sum(name.startswith("gpt-j-6b-qlora-2x512") for name in names) == 1


def test_few_runs_tell_no_rates(records: list[Record]) -> None:
    assert fit_times(records[:10]) is None


# -- properties ------------------------------------------------------------------------------------

jobs = st.builds(
    Job,
    method=st.sampled_from(["full", "lora", "qlora"]),
    batch_size=st.integers(1, 8),
    seq_len=st.sampled_from([64, 512, 2048]),
    gradient_accumulation_steps=st.sampled_from([1, 2, 5]),
    gradient_checkpointing=st.booleans(),
    optim=st.sampled_from(["adamw_torch", "adamw_torch_fused", "adafactor", "paged_adamw_8bit"]),
)


@settings(max_examples=40, deadline=None)
@given(job=jobs)
def test_parts_and_bounds(job: Job) -> None:
    walked = estimate(MODEL, job)
    time = step_time(walked, job, rates())
    assert all(math.isfinite(part) and part >= 0 for part in time)
    assert time.step_s == time.micro_steps_s + time.update_s
    longer, both = max(time.host_s, time.card_s), time.host_s + time.card_s
    assert longer * (1 - 1e-9) <= time.step_s <= both * (1 + 1e-9)
    for work in walked.work:
        assert host_seconds(work, rates()) >= 0 and card_seconds(work, rates()) >= 0


@settings(max_examples=20, deadline=None)
@given(job=jobs)
def test_more_takes_longer(job: Job) -> None:
    now = timed(job)
    for more in (
        replace(job, batch_size=job.batch_size * 2),
        replace(job, seq_len=job.seq_len * 2),
        replace(job, gradient_accumulation_steps=job.gradient_accumulation_steps + 1),
    ):
        then = timed(more)
        assert then.step_s >= now.step_s and then.card_s > now.card_s
    slower = replace(rates(), moved_bytes_per_s=rates().moved_bytes_per_s / 2)
    assert timed(job, slower).card_s > now.card_s


def test_layers_checkpointing_and_accumulation_cost_time() -> None:
    job = Job(method="lora", batch_size=4, seq_len=1024)
    deep = timed(job, model="llama-3.1-8b")
    assert timed(job).step_s < deep.step_s
    assert timed(replace(job, gradient_checkpointing=False)).step_s < timed(job).step_s
    four = timed(replace(job, gradient_accumulation_steps=4))
    assert 3.5 * timed(job).micro_steps_s < four.micro_steps_s < 4.5 * timed(job).micro_steps_s


def test_small_jobs_are_decided_by_the_host_and_large_ones_by_the_card() -> None:
    small = timed(Job(batch_size=1, seq_len=64))
    large = timed(Job(batch_size=8, seq_len=2048), model="llama-3.1-8b")
    assert small.host_s > 5 * small.card_s
    assert large.card_s > 2 * large.host_s


def test_identical_layers_are_counted_as_often_as_there_are() -> None:
    walked = estimate(MODEL, Job(gradient_checkpointing=True))
    layers = MODEL.dims.num_layers
    assert sum(w.repeats * w.num_frames for w in walked.work) == layers
    calls = 7 * layers * 2 + 1  # twice with checkpointing, and the head
    assert sum(w.repeats * w.num_layers for w in walked.work) == calls
    quantised = 7 * layers * 3  # and backward
    assert sum(w.repeats * w.num_quantised for w in walked.work) == quantised


# -- other cards -----------------------------------------------------------------------------------


def test_measured_card_is_calibrated_and_others_extrapolated() -> None:
    job = Job(batch_size=4, seq_len=1024)
    walked = estimate(MODEL, job)
    own, other = pace(walked, job, H100), pace(walked, job, find_gpu("a100-80gb"))
    assert own is not None and other is not None
    assert (own.source, other.source) == ("calibrated", "extrapolated")
    assert own.low_s < own.step_s < own.high_s
    assert own.tokens_per_s == pytest.approx(4 * 1024 / own.step_s)
    spread = other.high_s / other.low_s
    assert spread == pytest.approx(own.high_s / own.low_s * EXTRAPOLATION_FACTOR**2)
    assert other.time.card_s > own.time.card_s and other.time.host_s == own.time.host_s
    assert pace(walked, job, None) is None


def test_unknown_rates_stay_unknown() -> None:
    for gpu in load_gpus().values():
        job = job_for(Job(method="lora"), gpu)
        found = pace(estimate(MODEL, job), job, gpu)
        known = (gpu.bf16_flops_per_s or gpu.fp16_flops_per_s) and gpu.fp32_flops_per_s
        assert (found is not None) == bool(known and gpu.bandwidth_bytes_per_s), gpu.slug


def test_a_card_of_twice_the_rates_takes_half_the_card_time() -> None:
    twice = replace(
        H100,
        bf16_flops_per_s=2 * (H100.bf16_flops_per_s or 0),
        fp32_flops_per_s=2 * (H100.fp32_flops_per_s or 0),
        bandwidth_bytes_per_s=2 * (H100.bandwidth_bytes_per_s or 0),
    )
    faster = scaled(rates(), twice, H100)
    job = Job()
    assert faster is not None
    assert timed(job, faster).card_s == pytest.approx(timed(job).card_s / 2)


# -- a whole run -----------------------------------------------------------------------------------


def test_steps_hours_energy_and_cost() -> None:
    job = Job(batch_size=4, gradient_accumulation_steps=8)
    found = pace(estimate(MODEL, job), job, H100)
    assert found is not None
    run = whole_run(found, job, 1001, 2.5, 700, 3.0)
    assert run.num_steps == 80  # 251 batches, 32 steps an epoch
    assert run.hours == pytest.approx(80 * found.step_s / 3600)
    assert run.energy_kwh == pytest.approx(0.7 * run.hours)
    assert run.cost == pytest.approx(3 * run.hours)
    assert whole_run(found, job, 1, 1, None, None)[2:] == (None, None)
