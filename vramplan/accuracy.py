"""How right the estimates are: every recorded run beside its prediction.

``python -m vramplan.accuracy [FOLDER]`` writes the record as Markdown to standard output.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.catalogue import model_from_config
from vramplan.errors import RecordError
from vramplan.gpus import find_gpu
from vramplan.job import Job
from vramplan.prediction import Prediction, predict
from vramplan.resources import profiles_dir
from vramplan.units import MIB

SCHEMA_VERSION = 1
FIGURES = (
    ("ready", "ready_bytes", "ready_bytes"),
    ("peak allocated", "peak_allocated_bytes", "peak_allocated_bytes"),
    ("peak reserved", "peak_reserved_bytes", "peak_reserved_bytes"),
    ("device peak", "device_peak_bytes", "device_used_at_end_bytes"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded run and its prediction."""

    name: str
    record: dict[str, Any]
    prediction: Prediction

    def error(self, predicted: str, measured: str) -> float | None:
        """Relative error of one figure; None where it was not measured."""
        value = self.record.get(measured)
        if not value:
            return None
        return float(getattr(self.prediction, predicted)) / float(value) - 1.0


def read_record(path: Path) -> dict[str, Any]:
    """A record of the measuring worker.

    Raises:
        RecordError: If it cannot be read or comes from a newer version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not a record: {error}") from None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema_version {version}; this vramplan reads up to {SCHEMA_VERSION}, "
            "update it"
        )
    return dict(record)


def rows(folder: Path) -> list[Row]:
    """Every record of a calibration folder with its prediction, by name."""
    gpu = find_gpu(folder.name)
    found = []
    for path in sorted((folder / "runs").glob("*.json")):
        record = read_record(path)
        model = model_from_config(record["config"], record["model"])
        found.append(Row(record["name"], record, predict(model, Job.from_dict(record["job"]), gpu)))
    return found


def _percent(values: Iterable[float]) -> tuple[str, str, str]:
    """Median, 90th percentile and worst of absolute errors."""
    sizes = sorted(abs(value) for value in values)
    ninth = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    return tuple(f"{100 * v:.2f} %" for v in (statistics.median(sizes), ninth, sizes[-1]))  # type: ignore[return-value]


def summary(found: list[Row]) -> list[str]:
    """One table row per figure."""
    done = [
        row for row in found if row.record["status"] == "done" and not row.record["limit_bytes"]
    ]
    lines = ["| figure | runs | median error | 90 % within | worst |", "|---|---|---|---|---|"]
    for label, predicted, measured in FIGURES:
        errors = [e for row in done if (e := row.error(predicted, measured)) is not None]
        if errors:
            lines.append(f"| {label} | {len(errors)} | " + " | ".join(_percent(errors)) + " |")
    return lines


def limits(found: list[Row]) -> list[str]:
    """Runs under an allocator limit: did they run, and what was predicted."""
    lines = ["| run | limit | ran | predicted smallest limit |", "|---|---|---|---|"]
    for row in found:
        limit = row.record["limit_bytes"]
        if limit:
            ran = "yes" if row.record["status"] == "done" else "out of memory"
            least = row.prediction.min_limit_bytes
            lines.append(f"| {row.name} | {limit // MIB} MiB | {ran} | {least // MIB} MiB |")
    return lines


def details(found: list[Row]) -> list[str]:
    """One table row per run."""
    lines = [
        "| run | measured peak allocated | predicted | error | reserved error |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        peak = row.record.get("peak_allocated_bytes")
        if row.record["limit_bytes"] or not peak:
            continue
        errors = [
            row.error(key, key) or 0.0 for key in ("peak_allocated_bytes", "peak_reserved_bytes")
        ]
        lines.append(
            f"| {row.name} | {peak / MIB:,.1f} MiB | "
            f"{row.prediction.peak_allocated_bytes / MIB:,.1f} MiB | "
            + " | ".join(f"{100 * e:+.2f} %" for e in errors)
            + " |"
        )
    return lines


def report(folder: Path) -> str:
    """The whole record as Markdown."""
    found = rows(folder)
    record = found[0].record
    versions = ", ".join(
        f"{name} {version}" for name, version in record["versions"].items() if name != "vramplan"
    )
    return "\n".join(
        [
            f"# Accuracy on {record['gpu']['name']}",
            "",
            f"Stock `transformers.Trainer`, random weights; driver {record['gpu']['driver']}, "
            f"{versions}. Made by `python -m vramplan.accuracy`; the runs by "
            f"`{record['command']}`. They were looked at while the block programs were written: "
            "none of them is held out.",
            "",
            *summary(found),
            "",
            "## Under an allocator limit",
            "",
            *limits(found),
            "",
            "## Every run",
            "",
            *details(found),
            "",
        ]
    )


if __name__ == "__main__":
    default = profiles_dir() / "calibrations" / "h100-sxm-80gb"
    print(report(Path(sys.argv[1]) if sys.argv[1:] else default), end="")
