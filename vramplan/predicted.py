"""Predictions kept as a baseline: what each job took with the libraries of the day.

The file is JSON, meant to be committed. A job's figures are the trace's, for it runs the libraries
that are installed; the estimate's are kept beside them. Modules of equal layers are one row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vramplan.config import MAX_LAYERS
from vramplan.errors import RecordError, UsageError
from vramplan.files import provenance, write_text
from vramplan.job import Job
from vramplan.names import ranges
from vramplan.regression import METRICS, Holdings, Measurement
from vramplan.timeline import Kind, Phase
from vramplan.units import format_bytes

SCHEMA_VERSION = 1
MAX_BYTES = 64 * 1024**2  # of a file
MAX_SIZE = 2**60  # bytes of memory
MAX_OWNERS = 1_000_000
READY, LEFT = "ready", "left"
_MOMENTS = frozenset((READY, LEFT, *(phase.value for phase in Phase)))
WITNESSES = (READY, "allocated", "paged")  # the estimate's figures

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_KINDS = frozenset(kind.value for kind in Kind)
_ROW = re.compile(
    r"(?P<size>\d{1,19}) (?P<kind>\w+) (?P<owner>\S{1,1000})"
    r"( (?P<layers>\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*))?"
)


@dataclass(frozen=True, slots=True)
class Planned:
    """One job whose memory is watched.

    Attributes:
        name: Its name in the file.
        model: What the user called the model.
        config: Values of its config.json.
        job: The job.
        gpu: Slug of the card it is planned for; None for any.
        limit_bytes: Most the allocator may reserve; None without a limit.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    job: Job
    gpu: str | None = None
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Predicted:
    """A job and what was predicted of it.

    Attributes:
        planned: The job.
        measurement: What the trace says, in the form that two of them are compared in.
        estimate: Metric -> bytes, what the estimate says; empty for a family that it does not know.
    """

    planned: Planned
    measurement: Measurement
    estimate: Mapping[str, int] = field(default_factory=dict)


def where(planned: Planned) -> dict[str, str]:
    """What two predictions must have in common to be compared."""
    limit = "none" if planned.limit_bytes is None else format_bytes(planned.limit_bytes)
    return {
        "card": planned.gpu or "any",
        "limit": f"as {planned.gpu}" if planned.gpu else limit,
        "allocator": planned.job.alloc_conf or "default",
    }


def conditions(planned: Planned, versions: Mapping[str, str]) -> dict[str, str]:
    """What may differ between two predictions and is then told: libraries, model and job."""
    told = dict(versions) | {"model": planned.model}
    for group, values in (("config", planned.config), ("job", asdict(planned.job))):
        told |= {f"{group}.{key}": json.dumps(value).strip('"') for key, value in values.items()}
    return told


# -- writing ---------------------------------------------------------------------------------------


def write_predictions(
    path: Path, found: Iterable[Predicted], versions: Mapping[str, str]
) -> None:  # fmt: skip
    """Write a baseline, whole or not at all.

    Args:
        path: The file.
        found: Every job of it.
        versions: Library -> version that they were predicted with.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        **provenance(),
        "versions": dict(versions),
        "predictions": [_document(each) for each in found],
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def _document(found: Predicted) -> dict[str, Any]:
    planned, told = found.planned, found.measurement
    held = {READY: told.ready, LEFT: told.left, **told.moments}
    return {
        **asdict(planned),
        "figures": dict(told.figures),
        "estimate": dict(found.estimate) or None,
        "phases": dict(told.phases),
        "failed": told.failed,
        "oom": told.oom,
        "held": {name: list(_rows(holdings)) for name, holdings in held.items() if holdings},
    }


def _rows(held: Holdings) -> Iterator[str]:
    """Holdings as text, the largest first: ``1048576 weights model.layers.*.mlp 0-23``."""
    alike: dict[tuple[int, str, str], list[int]] = {}
    for (kind, owner), size in held.items():
        number = _NUMBER.search(owner)
        pattern = f"{owner[: number.start()]}*{owner[number.end() :]}" if number else owner
        layers = alike.setdefault((size, kind, pattern), [])
        if number:
            layers.append(int(number[0]))
    for (size, kind, pattern), layers in sorted(
        alike.items(), key=lambda item: (-item[0][0] * max(1, len(item[1])), item[0])
    ):
        yield " ".join(filter(None, (str(size), kind, pattern, ranges(layers))))


# -- reading ---------------------------------------------------------------------------------------


def read_predictions(path: Path) -> list[Predicted]:
    """The jobs of a baseline.

    Args:
        path: The file; anyone may have written it.

    Raises:
        RecordError: If it cannot be read, is newer than this version, or is not what we write.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise RecordError(f"{path} is larger than any file of predictions")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no JSON: {error}") from None
    try:
        return _predictions(document)
    except (_BadFileError, UsageError) as error:
        raise RecordError(
            f"{path} is no baseline of predictions: {error}; make it again with --update"
        ) from None


class _BadFileError(Exception):
    """What is wrong with the file."""


def _predictions(document: Any) -> list[Predicted]:
    top = _object(document, "the file")
    version = top.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _BadFileError("schema_version is missing")
    if version > SCHEMA_VERSION:
        raise _BadFileError(
            f"schema_version {version} is of a newer vramplan (this one reads up to "
            f"{SCHEMA_VERSION}, update it)"
        )
    entries = top.get("predictions")
    if not isinstance(entries, list) or not entries:
        raise _BadFileError("it has no predictions")
    versions = _texts(top.get("versions"), "versions")
    found = [
        _entry(_object(entry, f"prediction {n}"), versions, f"prediction {n}")
        for n, entry in enumerate(entries, 1)
    ]
    names = [each.planned.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise _BadFileError(f"two predictions are called {twice!r}")
    return found


def _entry(entry: dict[str, Any], versions: dict[str, str], what: str) -> Predicted:
    name, model = (_text(entry.get(key), f"{key} of {what}") for key in ("name", "model"))
    gpu, limit = entry.get("gpu"), entry.get("limit_bytes")
    try:
        job = Job.from_dict(_object(entry.get("job"), f"job of {name}"))
    except TypeError as error:
        raise _BadFileError(f"job of {name}: {error}") from None
    planned = Planned(
        name=name,
        model=model,
        config=_object(entry.get("config"), f"config of {name}"),
        job=job,
        gpu=None if gpu is None else _text(gpu, f"gpu of {name}"),
        limit_bytes=None if limit is None else _size(limit, f"limit_bytes of {name}"),
    )
    held = {
        key: _holdings(rows, f"{key} of {name}")
        for key, rows in _object(entry.get("held"), f"held of {name}").items()
        if key in _MOMENTS
    }
    estimate = entry.get("estimate")
    return Predicted(
        planned,
        Measurement(
            name=name,
            figures=_sizes(entry.get("figures"), METRICS, f"figures of {name}"),
            phases=_sizes(entry.get("phases"), [p.value for p in Phase], f"phases of {name}"),
            ready=held.pop(READY, {}),
            left=held.pop(LEFT, {}),
            moments=held,
            where=where(planned),
            versions=conditions(planned, versions),
            failed=_text(entry.get("failed"), f"failed of {name}", empty=True),
            oom=entry.get("oom") is True,
        ),
        {} if estimate is None else _sizes(estimate, WITNESSES, f"estimate of {name}"),
    )


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadFileError(f"{what} is not an object")
    return value


def _text(value: Any, what: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise _BadFileError(f"{what} is not a text")
    return value


def _texts(value: Any, what: str) -> dict[str, str]:
    return {key: _text(text, f"{key} of {what}") for key, text in _object(value, what).items()}


def _size(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
        raise _BadFileError(f"{what} is not a number of bytes")
    return value


def _sizes(value: Any, known: Iterable[str], what: str) -> dict[str, int]:
    names = list(known)
    found = _object(value, what)
    for name in found:
        if name not in names:
            raise _BadFileError(f"{what}: there is no {name!r}")
    return {name: _size(size, f"{name} of {what}") for name, size in found.items()}


def _holdings(rows: Any, what: str) -> Holdings:
    if not isinstance(rows, list):
        raise _BadFileError(f"held, {what}, is not a list")
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        read = _ROW.fullmatch(_text(row, f"a row of held, {what},"))
        if read is None or read["kind"] not in _KINDS:
            raise _BadFileError(f"held, {what}: {row[:80]!r} is not a row of ours")
        size = _size(int(read["size"]), f"held, {what},")
        for owner in _owners(read["owner"], read["layers"]):
            key = read["kind"], owner
            found[key] = found.get(key, 0) + size
            if len(found) > MAX_OWNERS:
                raise _BadFileError(f"held, {what}: more modules than any model has")
    return found


def _owners(pattern: str, layers: str | None) -> Iterator[str]:
    """Every module that a row stands for."""
    if not layers:
        yield pattern
        return
    for part in layers.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), min(int(last or first), MAX_LAYERS) + 1):
            yield pattern.replace("*", str(number), 1)
