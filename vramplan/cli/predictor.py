"""Who answers for a model: the estimate, or a trace of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vramplan.catalogue import find_model
from vramplan.cli.options import WITNESSES, check_length
from vramplan.errors import UnknownNameError
from vramplan.job import Job
from vramplan.prediction import Prediction, predict

if TYPE_CHECKING:
    from vramplan.gpus import Gpu


def predictor(model: str, job: Job, witness: str) -> Callable[[Job, Gpu | None], Prediction]:
    """What answers for a model: the estimate, or a trace of it.

    Args:
        model: The model, as the user named it.
        job: The job, whose length is checked against the model.
        witness: One of ``WITNESSES``.

    Raises:
        UsageError: If there is no such model or witness, or the estimate has no block program.
    """
    if witness not in WITNESSES:
        raise UnknownNameError("value for --witness", witness, WITNESSES)
    if witness == "trace":
        from vramplan.cli.witness import tracer  # noqa: PLC0415 - only where it is asked for

        return tracer(model)
    found = find_model(model)
    check_length(found, job)
    return lambda asked, gpu: predict(found, asked, gpu)
