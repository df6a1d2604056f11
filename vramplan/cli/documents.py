"""The JSON documents of ``fit --json`` and ``estimate --json``: additions allowed, no renames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vramplan.advice import Advice
from vramplan.cli.pace import pace_document
from vramplan.estimate import attention_of
from vramplan.families import find_family
from vramplan.job import Job
from vramplan.model import Model, TracedModel
from vramplan.prediction import Prediction, Verdict
from vramplan.timing import Pace, WholeRun

SCHEMA_VERSION = 1


def job_document(model: Model | TracedModel, job: Job) -> dict[str, Any]:
    """The job with its defaults resolved."""
    attention = (
        attention_of(find_family(model.family), job, model)
        if isinstance(model, Model)
        else model.attention
    )
    return asdict(job) | {"optim": job.optimizer_name, "attn_implementation": attention}


def model_document(model: Model | TracedModel) -> dict[str, Any]:
    """What the model is."""
    return {
        "name": model.name,
        "family": model.family,
        "num_parameters": model.num_parameters,
        "repository": model.repository,
        "revision": model.revision,
        **model.dimensions,
    }


def prediction_document(
    prediction: Prediction, found: Pace | None, run: WholeRun | None = None
) -> dict[str, Any]:
    """Every number, in bytes and seconds; null is "not known"."""
    profile = prediction.profile
    return {
        "witness": prediction.witness,
        "ready_bytes": prediction.ready_bytes,
        "peak_allocated_bytes": prediction.peak_allocated_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "min_limit_bytes": prediction.min_limit_bytes,
        "context_bytes": prediction.context_bytes,
        "process_bytes": prediction.process_bytes,
        "device_peak_bytes": prediction.device_peak_bytes,
        "paged_bytes": prediction.paged_bytes,
        "load_peak_bytes": prediction.load_peak_bytes,
        "host_ram_bytes": prediction.host_ram_bytes,
        "disk_bytes": prediction.disk_bytes,
        "peak_phase": prediction.peak_phase,
        "breakdown": {kind.value: size for kind, size in prediction.breakdown().items()},
        **pace_document(found, run),
        "num_trainable": prediction.estimate.num_trainable,
        "flops_per_step": prediction.estimate.flops,
        "calibration": profile.name,
        "calibration_borrowed": profile.borrowed,
        "calibration_doubt_bytes": profile.doubt_bytes,
        "first_step_peak_allocated_bytes": prediction.first_step_peak_allocated_bytes,
        "phases": {
            name: {"peak_allocated_bytes": size} for name, size in prediction.phases().items()
        },
        "bounds": {
            "peak_reserved_bytes": "allocator replay",
            "min_limit_bytes": "allocator replay under a limit",
            "load_peak_bytes": "replay of transformers' loader",
            "host_ram_bytes": "bound",
        },
    }


def prediction_keys() -> tuple[str, ...]:
    """The names under ``prediction``, in order; other witnesses leave what they lack null."""
    return (
        "witness", "ready_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "min_limit_bytes",
        "context_bytes", "process_bytes", "device_peak_bytes", "paged_bytes", "load_peak_bytes",
        "host_ram_bytes", "disk_bytes", "peak_phase", "breakdown", "step_time_s", "tokens_per_s",
        "step_time_range_s", "time_source", "whole_run", "num_trainable", "flops_per_step",
        "calibration", "calibration_borrowed", "calibration_doubt_bytes",
        "first_step_peak_allocated_bytes", "phases", "bounds",
    )  # fmt: skip


def document(
    model: Model | TracedModel,
    job: Job,
    prediction: Prediction,
    found: Pace | None,
    run: WholeRun | None = None,
    verdicts: Sequence[Verdict] = (),
    advice: Sequence[Advice] = (),
) -> dict[str, Any]:
    """The whole document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "job": job_document(model, job),
        "model": model_document(model),
        "prediction": prediction_document(prediction, found, run),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "advice": [asdict(item) for item in advice],
    }
