"""Answers whose numbers come from a trace: any architecture that transformers knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vramplan.catalogue import FoundConfig, find_config
from vramplan.cli.options import check_length
from vramplan.cli.trace import run_trace
from vramplan.config import ConfigReader
from vramplan.estimate import DEFAULT_CAPABILITY
from vramplan.job import Job
from vramplan.model import TracedModel
from vramplan.prediction import Prediction, ReplayedCache, conclude
from vramplan.profile import profile_for
from vramplan.replay import Replay

if TYPE_CHECKING:
    from vramplan.gpus import Gpu
    from vramplan.trace import Trace


def tracer(name: str) -> Callable[[Job, Gpu | None], Prediction]:
    """A function that predicts jobs on one model by tracing them.

    Args:
        name: The model, as ``find_config`` understands it.

    Raises:
        UsageError: If there is no such model.
    """
    return tracer_of(find_config(name))


def tracer_of(
    found: FoundConfig, *, fold: bool = True
) -> Callable[[Job, Gpu | None], Prediction]:  # fmt: skip
    """A function that predicts jobs on the model of a config by tracing them.

    Args:
        found: The config.
        fold: Trace equal layers once; otherwise every layer, which takes longer.
    """

    def predict(job: Job, gpu: Gpu | None) -> Prediction:
        profile = profile_for(gpu.slug if gpu else None)
        traced = run_trace(
            found,
            job,
            gpu.compute_capability if gpu else DEFAULT_CAPABILITY,
            profile.cublas_workspace_bytes,
            fold=fold,
        )
        model = traced_model(found, traced)
        check_length(model, job)
        replayed = Replay(traced.timeline, job.allocator_settings, in_order=True)
        cache = ReplayedCache(replayed, traced)
        return conclude(model, job, traced, profile, cache, traced.load_peak_bytes)

    return predict


def traced_model(found: FoundConfig, traced: Trace) -> TracedModel:
    """What a trace found out about a model."""
    return TracedModel(
        name=found.name,
        family=traced.family,
        num_parameters=traced.num_parameters,
        attention=traced.attn_implementation,
        dimensions=traced.dimensions,
        checkpoint_dtype=ConfigReader(found.config, found.where).dtype(),
        repository=found.repository,
        revision=found.revision,
    )
