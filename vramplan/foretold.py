"""Predictions written down before their runs were measured.

``vramplan accuracy --predict MATRIX -o predictions.json`` writes them; the file is committed, the
matrix is measured, and the accuracy record then compares the runs with what was written, whatever
the code has become since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from vramplan.errors import RecordError
from vramplan.files import provenance
from vramplan.gpus import Gpu
from vramplan.prediction import Prediction
from vramplan.record import MAX_RECORD_BYTES
from vramplan.timing import pace

SCHEMA_VERSION = 1
FILES = "predictions*.json"
TRACES = "traces.json"  # what the trace says of recorded jobs, in the same form


@dataclass(frozen=True, slots=True)
class Foretold:
    """The numbers of a prediction as they were written down, in bytes and seconds.

    Attributes:
        ready_bytes: Allocated when training is about to start.
        peak_allocated_bytes: Largest allocated from the second step on.
        peak_reserved_bytes: Most reserved on a roomy card.
        min_limit_bytes: Smallest allocator limit at which it runs.
        device_peak_bytes: What the driver shows for the process.
        load_peak_bytes: Largest allocated while loading.
        paged_bytes: Optimizer state in managed memory.
        step_time_s: One optimizer step; None where it was not predicted.
    """

    ready_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    min_limit_bytes: int
    device_peak_bytes: int
    load_peak_bytes: int
    paged_bytes: int
    step_time_s: float | None = None

    @classmethod
    def of(cls, prediction: Prediction, gpu: Gpu) -> Foretold:
        """What is predicted now, for a card."""
        found = pace(prediction.estimate, prediction.job, gpu)
        names = [field.name for field in fields(cls) if field.name != "step_time_s"]
        return cls(
            **{name: getattr(prediction, name) for name in names},
            step_time_s=None if found is None else found.step_s,
        )


def document(found: Iterable[tuple[str, Prediction]], gpu: Gpu) -> dict[str, Any]:
    """The file's content: predictions by the name of their run, on a card."""
    return {
        "schema_version": SCHEMA_VERSION,
        **provenance(),
        "predictions": {name: asdict(Foretold.of(prediction, gpu)) for name, prediction in found},
    }


class Round(NamedTuple):
    """What one file foretells.

    Attributes:
        created: When it was written, UTC, ISO 8601.
        predictions: By the name of their run.
    """

    created: str
    predictions: Mapping[str, Foretold]


def rounds(folder: Path) -> list[Round]:
    """Every round of predictions of a card's calibration folder, the earliest first."""
    return sorted((read(path) for path in folder.glob(FILES)), key=lambda found: found.created)


def read(path: Path) -> Round:
    """The predictions of a file.

    Raises:
        RecordError: If the file is not such a file, or of a newer version.
    """
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise RecordError(f"{path} is too large for a file of predictions")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] > SCHEMA_VERSION:
            raise RecordError(f"{path} has a newer schema_version than this vramplan reads")
        found = {name: Foretold(**numbers) for name, numbers in content["predictions"].items()}
        return Round(str(content["created"]), found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read as predictions: {error!r}") from None
