"""``vramplan check --predicted``: what the installed libraries make of the jobs of a baseline.

A job is traced layer by layer, not folded: a change in one of many equal layers is a change too.
"""

from __future__ import annotations

import gc
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan import __version__
from vramplan.catalogue import FoundConfig, model_from_config
from vramplan.cli import options as o
from vramplan.cli import output
from vramplan.cli.trace import NEEDED
from vramplan.errors import RecordError, UsageError
from vramplan.estimate import DEFAULT_CAPABILITY, estimate
from vramplan.families import NAMES
from vramplan.gpus import find_gpu
from vramplan.prediction import Prediction, ReplayedCache
from vramplan.profile import profile_for
from vramplan.regression import Accepted, Measurement, Threshold, check_all, surplus
from vramplan.timeline import BEFORE_TRAINING, Phase
from vramplan.units import MIB, format_bytes

if TYPE_CHECKING:
    from vramplan.predicted import Planned, Predicted
    from vramplan.regression import Holdings
    from vramplan.trace import Trace

AGREE_BYTES = 16 * MIB  # estimate and trace of the versions that the estimate was written for
AGREE_SHARE = 0.005
TITLES = {"ready": "ready to train", "allocated": "at the peak", "paged": "of paged state"}


def gate(
    baseline: Path, matrix: Path | None, allowed: Mapping[str, Threshold | None], *, update: bool
) -> Accepted:
    """Predict jobs with what is installed and compare with a baseline.

    Args:
        baseline: A file of predictions.
        matrix: The jobs, as ``vramplan measure`` reads them; None for the baseline's own.
        allowed: As ``regression.thresholds`` gives them.
        update: Whether what is predicted becomes the baseline.

    Returns:
        The comparison, and if it is the baseline now, what became of each name.

    Raises:
        RecordError: If the baseline is missing or unreadable, or a new one would hold a failure.
        UsageError: If the matrix has something that it should not.
        EnvironmentProblem: If the libraries are not installed.
    """
    o.needs("a gate of predictions", "pydantic", "filelock", *NEEDED)
    from vramplan.predicted import read_predictions, write_predictions  # noqa: PLC0415

    if not baseline.exists() and not update:
        raise RecordError(f"there is no baseline {baseline}; --matrix RUNS.toml --update makes it")
    if not baseline.exists() and matrix is None:
        raise UsageError(f"{baseline} is not there: name its jobs with --matrix RUNS.toml")
    before = {p.planned.name: p for p in read_predictions(baseline)} if baseline.exists() else {}
    jobs = [p.planned for p in before.values()] if matrix is None else list(read_jobs(matrix))
    versions = installed()
    now = {p.planned.name: p for p in predict_all(jobs, versions)}
    for found in now.values():
        _tell_disagreement(found)
    checked = check_all(
        {name: found.measurement for name, found in now.items()},
        {name: found.measurement for name, found in before.items()},
        allowed,
    )
    if not update:
        return Accepted(checked, {})
    _accept(baseline, now.values())
    write_predictions(baseline, now.values(), versions)
    fates = {name: _fate(found, before.get(name)) for name, found in now.items()}
    return Accepted(checked, fates | dict.fromkeys(checked.missing, "removed"))


def _fate(found: Predicted, before: Predicted | None) -> str:
    if before is None:
        return "added"
    return "unchanged" if found == before else "replaced"


def _accept(baseline: Path, found: Iterable[Predicted]) -> None:
    for each in found:
        told = each.measurement
        if told.failed and not told.oom:
            raise RecordError(f"{told.name} is no baseline: {told.failed}; {baseline} is as it was")


def read_jobs(matrix: Path) -> Iterator[Planned]:
    """The jobs of a matrix file, repeats once; what only a GPU can tell of them is left out."""
    from vramplan.measure.limit import emulated  # noqa: PLC0415 - needs pydantic and filelock
    from vramplan.measure.spec import RunSpec, read_matrix  # noqa: PLC0415
    from vramplan.pairing import REPEAT  # noqa: PLC0415
    from vramplan.predicted import Planned  # noqa: PLC0415

    shared = RunSpec(name="", model="", config={}, job=o.DEFAULT_JOB)
    specs = [emulated(spec) for row in read_matrix(matrix, shared) for spec in row.specs]
    unseen = sorted(
        {part for spec in specs for part in ("evaluate", "save", "paging") if getattr(spec, part)}
    )
    if unseen:
        print(f"note: training steps alone are predicted, not {', '.join(unseen)}", file=sys.stderr)
    seen: set[str] = set()
    for spec in specs:
        name = REPEAT.sub("", spec.name)
        if name not in seen:
            yield Planned(
                name, spec.model, spec.config, spec.job, spec.emulated_gpu, spec.limit_bytes
            )
        seen.add(name)


def installed() -> dict[str, str]:
    """Versions of what decides a prediction."""
    return {"vramplan": __version__} | {name: importlib.metadata.version(name) for name in NEEDED}


def predict_all(jobs: list[Planned], versions: Mapping[str, str]) -> Iterator[Predicted]:
    """Every job predicted, with a line on stderr of how far it is."""
    with output.progress(len(jobs)) as begin:
        for planned in jobs:
            begin(planned.name)
            yield predict_one(planned, versions)
            gc.collect()  # the command line switches it off, and models are full of circles


def predict_one(planned: Planned, versions: Mapping[str, str]) -> Predicted:
    """One job, traced and estimated.

    Args:
        planned: The job.
        versions: Of what is installed.

    Returns:
        Its measurement; ``failed`` if the installed libraries cannot run it.
    """
    from vramplan.cli.witness import tracer_of  # noqa: PLC0415 - needs torch
    from vramplan.predicted import Predicted, conditions, where  # noqa: PLC0415

    gpu = find_gpu(planned.gpu) if planned.gpu else None
    found = FoundConfig(planned.model, planned.config, planned.name)
    told: dict[str, Any]
    try:
        told = _measured(tracer_of(found, fold=False)(planned.job, gpu), planned.limit_bytes)
    except UsageError as error:  # of a library: the job's own faults are found in the matrix
        told = {"failed": str(error)}
    return Predicted(
        planned,
        Measurement(
            name=planned.name,
            where=where(planned),
            versions=conditions(planned, versions),
            **told,
        ),
        _estimated(planned),
    )


def _measured(prediction: Prediction, limit_bytes: int | None) -> dict[str, Any]:
    """A traced prediction as fields of a Measurement."""
    from vramplan.evidence import moments, snapshots_at  # noqa: PLC0415 - needs pydantic

    traced: Trace = prediction.estimate  # type: ignore[assignment]
    before, steady = moments(traced.timeline), moments(traced.steady)
    begun = before["ready"], steady["ready"]  # the first step, the second
    early = snapshots_at(traced.timeline, set(before.values()))
    late = snapshots_at(traced.steady, set(steady.values()))
    names = [phase.value for phase in BEFORE_TRAINING]
    held: dict[str, Holdings] = {n: early[before[n]] for n in names if n in before} | {
        phase.value: late[steady[phase.value]]
        for phase in Phase
        if phase.value in steady and phase.value not in names
    }
    left = surplus(late[steady["end"]], late.get(begun[1], {}))
    phases = {name: sum(sizes.values()) for name, sizes in held.items()}
    least = prediction.min_limit_bytes
    told: dict[str, Any] = {
        "figures": {
            "load": phases[Phase.LOAD.value],
            "ready": prediction.ready_bytes,
            "allocated": prediction.peak_allocated_bytes,
            "reserved": prediction.peak_reserved_bytes,
            "min_limit": least,
            "per_step": sum(left.values()),
            "paged": prediction.paged_bytes,
        },
        "phases": phases,
        "ready": early.get(begun[0], {}),
        "left": left,
        "moments": held,
    }
    assert isinstance(prediction.cache, ReplayedCache)
    if limit_bytes is not None and not prediction.cache.runs_within(limit_bytes):
        needed, given = format_bytes(least), format_bytes(limit_bytes)
        told |= {"failed": f"out of memory: it needs {needed} of {given}", "oom": True}
    return told


def _estimated(planned: Planned) -> dict[str, int]:
    """What the estimate says; nothing of a family that it does not know."""
    if planned.config.get("model_type") not in NAMES:
        return {}
    gpu = find_gpu(planned.gpu) if planned.gpu else None
    walked = estimate(
        model_from_config(planned.config, planned.model),
        planned.job,
        capability=gpu.compute_capability if gpu else DEFAULT_CAPABILITY,
        workspace_bytes=profile_for(planned.gpu).cublas_workspace_bytes,
    )
    return {
        "ready": walked.ready_bytes,
        "allocated": walked.peak_allocated_bytes,
        "paged": walked.paged_bytes,
    }


def _tell_disagreement(found: Predicted) -> None:
    """Say where the estimate was written for other libraries than the trace has run."""
    figures = found.measurement.figures
    parted = [
        f"{format_bytes(size)} {TITLES[name]}, the trace {format_bytes(figures[name])}"
        for name, size in found.estimate.items()
        if name in figures
        and abs(size - figures[name]) > max(AGREE_BYTES, AGREE_SHARE * figures[name])
    ]
    if parted:
        print(
            f"note: {found.planned.name}: the estimate says {'; '.join(parted)}. It was not "
            "written for the installed libraries; the trace ran them and is what is compared",
            file=sys.stderr,
        )
