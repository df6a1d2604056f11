"""The fullest moment of every phase of a run, and of its first step.

Phases are the harness's: load and prepare once, then forward, loss, backward and step of every
later step, then evaluate and save.
"""

from __future__ import annotations

from vramplan.job import Job
from vramplan.model import LinearSpec, Model
from vramplan.timeline import BEFORE_TRAINING, Kind, Phase, Timeline
from vramplan.units import round_block


def phase_peaks(timeline: Timeline) -> dict[Phase, int]:
    """Most bytes live in each phase of a steady run.

    Args:
        timeline: What an estimate walked; repeated sections folded.

    Returns:
        Bytes by phase, in the order of the run. Workspaces and optimizer state are there from the
        start, as from the second step on.
    """
    peaks: dict[Phase, int] = {}
    live = 0
    for section in timeline.sections:
        start = live
        tops: dict[Phase, int] = {}
        for event in section.events:
            before = live
            live += event.nbytes * event.copies
            tops[event.phase] = max(tops.get(event.phase, 0), live, before)
        growth = (live - start) * (section.repeats - 1)
        live += growth
        for phase, top in tops.items():
            peaks[phase] = max(peaks.get(phase, 0), top + max(0, growth))
    return peaks


def first_step_peak(timeline: Timeline) -> int:
    """Most bytes live in the first step: workspaces come as they are used, optimizer state last.

    Args:
        timeline: What an estimate walked.

    Returns:
        Bytes as torch's ``max_memory_allocated`` over the first step, blocks rounded.
    """
    late = {e.block for e in timeline.events() if e.nbytes == 0 and e.block > 0}
    sizes = {e.block: e.nbytes for e in timeline.events() if e.nbytes > 0 and e.block in late}
    live = most = state = 0
    for section in timeline.sections:
        start, top, once = live, live, 0
        for event in section.events:
            if event.phase is Phase.EVALUATE:
                continue
            if event.block in late:
                once += sizes.pop(event.block, 0) if event.nbytes == 0 else 0
                added = 0
            elif event.kind is Kind.OPTIMIZER and event.phase in BEFORE_TRAINING:
                state += event.nbytes * event.copies * section.repeats
                added = 0
            else:
                added = event.nbytes * event.copies
            live += added
            if event.phase not in BEFORE_TRAINING:
                full = live + once + (state if event.phase is Phase.STEP else 0)
                top = max(top, full)
        growth = (live - start) * (section.repeats - 1)
        most = max(most, top + max(0, growth))
        live += growth + once
    return most


def save_bytes(model: Model, job: Job) -> int:
    """What saving a checkpoint allocates on the card beside what is there, in bytes.

    Tensors go to the host one by one. Only a nested quantisation state is cloned in part: the
    scales' code of every 4-bit layer, all of them listed in the model's state dict at once. Paged
    optimizer state is read on the host, which brings its pages there.

    Source:
        transformers 5.17.0 ``trainer.py`` (``_save_checkpoint``); peft 0.21
        ``utils/save_and_load.py`` (``get_peft_model_state_dict``); bitsandbytes 0.50.2
        ``functional.py`` (``QuantState.as_dict``). Four recorded runs show it to the byte.
    """
    if not job.quantised or job.quant_type == "int8" or not job.double_quant:
        return 0
    arch = model.architecture
    specs = [*arch.outside, *(m for kind in model.dims.kinds for m in arch.block_of(kind))]
    layers = sum(isinstance(m, LinearSpec) and m.quantisable for m in specs)
    return layers * round_block(256 * 4)
