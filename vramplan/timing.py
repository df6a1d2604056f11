"""How long a step takes: what the walk asks of the host and of the card, at their measured rates.

Two clocks run side by side. The host launches one operation after another and does not wait; the
card executes them in that order, never before they are launched. So stretch by stretch of the walk
(``vramplan/work.py``) the slower of the two decides, and a host that has launched ahead while the
card was at the logits loses nothing in the layers. The Trainer reads the loss after every
micro-batch: there the clocks meet, and again after the optimizer's step.

The card's time of a stretch is a roofline per operation: a matrix product or attention kernel takes
its operations at the achieved rate or its operands at the achieved bandwidth, whichever is longer;
everything else takes the bytes it reads and writes. The host's is counted in operations.

Source: torch 2.11; transformers 5.17.0 ``trainer.py`` (``logging_nan_inf_filter`` reads the loss
every micro-step); rates from ``vramplan calibrate`` (``vramplan/timefit.py``).

Known limitations:
    Where the host decides, its pace does, and that is not the same in every run: five repeats of
    one job on one machine, minutes apart, differed by a third. A loop that launches small
    operations tells it (``at_pace``); nothing can tell it beforehand. Data loading, logging,
    evaluation and saving are left out, as are the GradScaler of fp16 and what an allocator under
    pressure adds. Elementwise operations are taken to miss the L2 cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

from vramplan.estimate import Estimate
from vramplan.job import Job
from vramplan.profile import REFERENCE_GPU, Profile, profile_for
from vramplan.work import Work

if TYPE_CHECKING:
    from vramplan.gpus import Gpu

# What Python itself takes for a linear layer's call and for a checkpointed call run again, in
# operations. Fitted to steps of models too small for anything but the host to count (hidden size
# 64, on a CPU: gpt_neox, gemma2, llama, opt, qwen3; full, LoRA and QLoRA; with and without
# checkpointing; 2 and 8 layers): all 60 within 11 %, the middle one within 3 %.
LAYER_CALL = 3.5
FRAME_CALL = 20
# Of every trainable byte, fused AdamW behind clipping reads the gradient three times and writes it
# once, reads and writes the parameter; its states are read and written.
UPDATE_PASSES = 6
STATE_PASSES = 2
# How far a card or host that was not measured may be off beyond what measured ones were: a host
# half as fast, a generation that reaches less of its rates. Assumed, not measured.
EXTRAPOLATION_FACTOR = 1.5
RATIO = "step_time_ratio"
RATIO_AT_PACE = "step_time_ratio_at_pace"
HOST_RATES = ("launch_overhead_s", "operation_s", "quantised_call_s", "micro_step_s")


@dataclass(frozen=True, slots=True)
class Rates:
    """What a host and a card achieve.

    Attributes:
        launch_overhead_s: Seconds to launch one operation from a bare loop or autograd's engine.
        operation_s: Seconds that a model's forward takes on the host for each operation: Python,
            autograd, autocast and the launch.
        quantised_call_s: Seconds of one call of bitsandbytes' autograd functions beyond those.
        micro_step_s: Seconds of a micro-batch outside the model.
        thin_flops_per_s: 16-bit matrix products, as thin as a batch makes them.
        fp32_flops_per_s: fp32 matrix products (TF32 is off in PyTorch unless asked for).
        attention_flops_per_s: Fused attention.
        moved_bytes_per_s: Everything else, bytes read and written.
        dequantised_per_s: 4-bit or 8-bit weights made 16-bit, elements.
        updated_8bit_per_s: Elements whose 8-bit optimizer state is updated.
        pace_exponent: A host that takes x times as long to launch takes x to this power as long
            for everything: below 1, as the loop shows a moment and the step is an average.
    """

    launch_overhead_s: float
    operation_s: float
    quantised_call_s: float
    micro_step_s: float
    thin_flops_per_s: float
    fp32_flops_per_s: float
    attention_flops_per_s: float
    moved_bytes_per_s: float
    dequantised_per_s: float
    updated_8bit_per_s: float
    pace_exponent: float


def at_pace(rates: Rates, launch_overhead_s: float) -> Rates:
    """The rates while the host is as fast as its launches show.

    Args:
        rates: At the host's usual pace.
        launch_overhead_s: Seconds that it takes to launch one small operation now.
    """
    slower = (launch_overhead_s / rates.launch_overhead_s) ** rates.pace_exponent
    return replace(rates, **{name: getattr(rates, name) * slower for name in HOST_RATES})


class StepTime(NamedTuple):
    """One optimizer step.

    Attributes:
        micro_steps_s: Forward and backward of all micro-batches, in seconds.
        update_s: Clipping and the optimizer.
        host_s: What the host alone would need for all of it.
        card_s: What the card alone would need.
    """

    micro_steps_s: float
    update_s: float
    host_s: float
    card_s: float

    @property
    def step_s(self) -> float:
        """All of it, in seconds."""
        return self.micro_steps_s + self.update_s


def step_time(walked: Estimate, job: Job, rates: Rates) -> StepTime:
    """The time of one optimizer step.

    Args:
        walked: The walk of the job.
        job: The job.
        rates: What its host and card achieve.

    Returns:
        Seconds.
    """
    steps = job.gradient_accumulation_steps
    host = launched = rates.micro_step_s
    card = busy = 0.0
    for work in walked.work:
        launch, execute = host_seconds(work, rates), card_seconds(work, rates)
        card = max(max(card, launched) + execute, launched + launch)
        launched += launch
        busy += execute
    host = launched
    optimizer = job.optimizer
    update_host = walked.num_trainable_tensors * optimizer.num_launches * rates.launch_overhead_s
    state = walked.optimizer_bytes + walked.paged_bytes
    moved = UPDATE_PASSES * walked.trainable_bytes + STATE_PASSES * state
    update_card = moved / rates.moved_bytes_per_s
    if optimizer.state_bits == 8:
        update_card += walked.num_trainable / rates.updated_8bit_per_s
    return StepTime(
        micro_steps_s=max(host, card) * steps,
        update_s=max(update_host, update_card),
        host_s=host * steps + update_host,
        card_s=busy * steps + update_card,
    )


def host_seconds(work: Work, rates: Rates) -> float:
    """What the host takes to launch a stretch of work, in seconds."""
    operations = work.num_launches + LAYER_CALL * work.num_layers + FRAME_CALL * work.num_frames
    return work.repeats * (
        operations * rates.operation_s
        + work.num_engine_launches * rates.launch_overhead_s
        + work.num_quantised * rates.quantised_call_s
    )


def card_seconds(work: Work, rates: Rates) -> float:
    """What the card takes to execute it, in seconds.

    LLM.int8's products are taken at the 16-bit rate.
    """
    bandwidth = rates.moved_bytes_per_s
    total = work.moved_bytes / bandwidth + work.dequantised / rates.dequantised_per_s
    for unit, flops, read_bytes in work.products:
        if unit == "attention":
            rate = rates.attention_flops_per_s
        elif unit == "fp32":
            rate = rates.fp32_flops_per_s
        else:
            rate = rates.thin_flops_per_s
        total += max(flops / rate, read_bytes / bandwidth)
    return work.repeats * total


# -- which rates -----------------------------------------------------------------------------------


def rates_of(profile: Profile) -> Rates | None:
    """The rates of a Profile; None where it was made from too few runs to tell them."""
    names = [field.name for field in fields(Rates)]
    if not {*names, RATIO} <= profile.constants.keys():
        return None
    return Rates(**{name: profile.constants[name].value for name in names})


def scaled(rates: Rates, card: Gpu, reference: Gpu) -> Rates | None:
    """The rates of a card that was not measured: it reaches the same share of its datasheet.

    The host's are taken over; they are its own and not the card's.

    Args:
        rates: Of the reference card.
        card: The card. Without bf16 it works in fp16.
        reference: The card that was measured.

    Returns:
        Its rates; None where its datasheet's are not known.
    """
    pairs = (
        (card.bf16_flops_per_s or card.fp16_flops_per_s, reference.bf16_flops_per_s),
        (card.fp32_flops_per_s, reference.fp32_flops_per_s),
        (card.bandwidth_bytes_per_s, reference.bandwidth_bytes_per_s),
    )
    shares = [own / other for own, other in pairs if own and other]
    if len(shares) < len(pairs):
        return None
    product, plain, bandwidth = shares
    return replace(
        rates,
        thin_flops_per_s=rates.thin_flops_per_s * product,
        attention_flops_per_s=rates.attention_flops_per_s * product,
        fp32_flops_per_s=rates.fp32_flops_per_s * plain,
        updated_8bit_per_s=rates.updated_8bit_per_s * plain,
        moved_bytes_per_s=rates.moved_bytes_per_s * bandwidth,
        dequantised_per_s=rates.dequantised_per_s * bandwidth,
    )


class Pace(NamedTuple):
    """How fast a job runs on a card.

    Attributes:
        time: One optimizer step.
        tokens_per_s: Tokens of all micro-batches over the step's seconds.
        low_s: Shortest step that would not surprise, in seconds.
        high_s: Longest.
        source: "calibrated" on this card or "extrapolated" from the reference card (at the pace of
            this card's host, where that was measured).
    """

    time: StepTime
    tokens_per_s: float
    low_s: float
    high_s: float
    source: str

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.time.step_s


def pace(walked: object, job: Job, gpu: Gpu | None) -> Pace | None:
    """How fast the job runs on a card.

    The range is what the recorded runs were off by, each family predicted from the others; on a
    card without measurements ``EXTRAPOLATION_FACTOR`` more on either side.

    Args:
        walked: The walk of the job; a trace counts no work and tells no time.
        job: The job, as the card runs it (see ``prediction.job_for``).
        gpu: The card.

    Returns:
        Its pace; None without a walk or a card, or where the card's rates are not known.
    """
    if gpu is None or not isinstance(walked, Estimate):
        return None
    profile = profile_for(gpu.slug)
    rates = None if profile.borrowed else rates_of(profile)
    factor, source = 1.0, "calibrated"
    if rates is None:
        from vramplan.gpus import find_gpu  # noqa: PLC0415 - only where a card is named

        measured, profile = profile, profile_for(None)
        factor, source = EXTRAPOLATION_FACTOR, "extrapolated"
        known = rates_of(profile)
        rates = scaled(known, gpu, find_gpu(REFERENCE_GPU)) if known is not None else None
        if rates is None:
            return None
        launch = measured.constants.get("launch_overhead_s")
        if launch is not None and not measured.borrowed:
            rates = at_pace(rates, launch.value)  # too few runs for rates, but its host is known
    time = step_time(walked, job, rates)
    ratio = profile.constants[RATIO]
    return Pace(
        time=time,
        tokens_per_s=job.tokens * job.gradient_accumulation_steps / time.step_s,
        low_s=time.step_s / ratio.high / factor,
        high_s=time.step_s / ratio.low * factor,
        source=source,
    )


# -- a whole run -----------------------------------------------------------------------------------


class WholeRun(NamedTuple):
    """A training run from its first step to its last.

    Attributes:
        num_steps: Optimizer steps.
        hours: Their time.
        energy_kwh: Energy at the card's board power, an upper bound; None where that is not known.
        cost: Hours times the price of one; None without a price.
    """

    num_steps: int
    hours: float
    energy_kwh: float | None
    cost: float | None


def whole_run(
    found: Pace,
    job: Job,
    num_samples: int,
    epochs: float,
    board_power_w: float | None,
    price_per_hour: float | None,
) -> WholeRun:
    """Time, energy and cost of training on a data set.

    Args:
        found: The pace of the job.
        job: The job.
        num_samples: Sequences in the data set.
        epochs: Passes over it.
        board_power_w: The card's, in watts.
        price_per_hour: Of the machine, in any currency.

    Returns:
        The run.

    Source: transformers 5.17.0 ``trainer.py`` (``set_initial_training_values``: steps per epoch and
    in all are rounded up).
    """
    batches = -(-num_samples // job.batch_size)
    per_epoch = -(-batches // job.gradient_accumulation_steps)
    num_steps = math.ceil(per_epoch * epochs)
    hours = num_steps * found.step_s / 3600
    return WholeRun(
        num_steps=num_steps,
        hours=hours,
        energy_kwh=None if board_power_w is None else hours * board_power_w / 1000,
        cost=None if price_per_hour is None else hours * price_per_hour,
    )
