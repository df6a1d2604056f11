"""Baselines: what tests took, one JSON file for each name, GPU and set of versions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vramplan.errors import EnvironmentProblem, RecordError
from vramplan.files import alone_in, check_schema, provenance, read_json, write_text
from vramplan.names import printable
from vramplan.regression import Measurement
from vramplan.testing.documents import MeasurementDocument

SCHEMA_VERSION = 1
MAX_FILE_BYTES = 64 * 1024**2
MAX_COPIES = 1000
IN_FILE_NAME = ("torch", "transformers")  # versions that tell files apart at a glance


class _File(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    schema_version: int
    name: str
    created: str
    where: dict[str, str]
    versions: dict[str, str]
    tests: dict[str, dict[str, MeasurementDocument]]


@dataclass(frozen=True, slots=True)
class Baseline:
    """One file.

    Attributes:
        path: Where it lies.
        name: What it was saved as.
        created: When, UTC, ISO 8601.
        where: GPU and allocator settings.
        versions: Versions of everything that decides the figures.
        tests: Test -> name -> what was measured.
    """

    path: Path
    name: str
    created: str
    where: Mapping[str, str]
    versions: Mapping[str, str]
    tests: Mapping[str, Mapping[str, MeasurementDocument]] = field(repr=False)

    def measurement(self, test: str, name: str) -> Measurement | None:
        """What a test took; None if it is not in it."""
        found = self.tests.get(test, {}).get(name)
        return None if found is None else found.measurement(name, self.where, self.versions)

    def __str__(self) -> str:
        return f"{printable(self.name)} of {printable(self.created[:10])}"


def read_all(folder: Path) -> list[Baseline]:
    """Every baseline in a folder, the newest first.

    Raises:
        RecordError: If one cannot be read, is too large, broken, or of a newer version.
    """
    found = [read(path) for path in sorted(folder.glob("*/*.json"))]
    return sorted(found, key=lambda baseline: baseline.created, reverse=True)


def read(path: Path) -> Baseline:
    """One baseline.

    Raises:
        RecordError: If it cannot be read, is too large, broken, or of a newer version.
    """
    document = read_json(path, MAX_FILE_BYTES, "baseline", f"; {_REMEDY}")
    check_schema(document, SCHEMA_VERSION, str(path), "baseline")
    try:
        file_ = _File.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = printable(".".join(str(part) for part in first["loc"]))
        reason = printable(first["msg"])
        raise RecordError(f"{path} is no usable baseline: {place}: {reason}; {_REMEDY}") from None
    return Baseline(
        path, file_.name, file_.created, file_.where, file_.versions, file_.tests
    )  # fmt: skip


_REMEDY = "take it back from version control, or save it again with --vram-overwrite"


def choose(
    baselines: Sequence[Baseline], where: Mapping[str, str], versions: Mapping[str, str]
) -> tuple[Baseline | None, list[str]]:
    """The baseline for a card, and why others are none.

    Args:
        baselines: The newest first.
        where: GPU and allocator settings of this process.
        versions: Its versions.

    Returns:
        The one of the same versions, else the newest; None if none was made on such a card under
        such settings, with the reasons.
    """
    fitting = [b for b in baselines if _difference(b.where, where) == ""]
    if not fitting:
        reasons = {f"{baseline}: {_difference(baseline.where, where)}" for baseline in baselines}
        return None, sorted(reasons)
    same = [baseline for baseline in fitting if baseline.versions == versions]
    return (same or fitting)[0], []


def _difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    differ = [name for name in (*then, *(n for n in now if n not in then))
              if then.get(name) != now.get(name)]  # fmt: skip
    return ", ".join(
        f"made with {name} {printable(then.get(name, 'unknown'))}, not {now.get(name, 'unknown')}"
        for name in differ
    )


# -- saving ----------------------------------------------------------------------------------------


def file_path(
    folder: Path, name: str, where: Mapping[str, str], versions: Mapping[str, str]
) -> Path:
    """Where the baseline of a name, a GPU and versions lies."""
    known = [(what, versions.get(what, "none")) for what in IN_FILE_NAME]
    told = "-".join(f"{what}-{version}" for what, version in known if version != "none")
    return folder / _safe(where.get("GPU", "gpu")) / f"{name}--{_safe(told)}.json"


def _safe(text: str) -> str:
    return re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-.") or "unknown"


def digest(path: Path) -> str:
    """What a file holds, in short; empty if there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def save(
    path: Path,
    name: str,
    where: Mapping[str, str],
    versions: Mapping[str, str],
    tests: Mapping[str, Mapping[str, Any]],
    replaced: str,
) -> Path:
    """Write a baseline whole or not at all.

    Args:
        path: Where.
        name: What it is saved as.
        where: GPU and allocator settings of its figures.
        versions: And versions.
        tests: Test -> name -> document.
        replaced: Digest of the file that may be replaced; empty for none.

    Returns:
        Where it was written: if another process has written there meanwhile, beside it, under a
        number.

    Raises:
        EnvironmentProblem: If the disk is full or the folder cannot be written.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        **provenance(),
        "where": dict(where),
        "versions": dict(versions),
        "tests": {test: dict(sorted(found.items())) for test, found in sorted(tests.items())},
    }
    with alone_in(path.parent):
        for number in range(1, MAX_COPIES):
            stem, _, told = path.name.partition("--")
            target = path if number == 1 else path.with_name(f"{stem}-{number}--{told}")
            if not target.exists() or (number == 1 and digest(target) == replaced):
                kept = document | ({} if number == 1 else {"name": f"{name}-{number}"})
                write_text(target, _lines(kept))
                return target
    raise EnvironmentProblem(f"{path} and {MAX_COPIES} numbered ones are there already")


def _lines(document: Mapping[str, Any]) -> str:
    """JSON that version control can tell apart: indented, with each entry of a list in one line."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda m: f"[{_one_line(m[1])}]", text) + "\n"


def _one_line(text: str) -> str:
    return re.sub(r",\n\s*", ", ", text)
