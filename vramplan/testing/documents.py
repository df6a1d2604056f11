"""Measurements as JSON and back: the same for baselines and for what xdist's workers send."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vramplan.config import MAX_LAYERS
from vramplan.names import any_layer, ranges
from vramplan.regression import METRICS, Holdings, Measurement
from vramplan.units import MAX_BYTES

_RANGES = re.compile(r"\d{1,5}(?:-\d{1,5})?(?:,\d{1,5}(?:-\d{1,5})?)*")

Bytes = Annotated[int, Field(strict=True, ge=0, le=MAX_BYTES)]
# kind, module, bytes; and which layers it stands for, as "0-3,5", where the module has a "*"
Entry = tuple[str, str, Bytes] | tuple[str, str, Bytes, str]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class MeasurementDocument(_Part):
    """One measurement (see ``regression.Measurement``).

    Attributes:
        where, versions: Only what is not as in the whole file.
    """

    figures: dict[str, Bytes]
    repeats: dict[str, list[float]] = Field(default_factory=dict)
    phases: dict[str, Bytes] = Field(default_factory=dict)
    peak: list[Entry] = Field(default_factory=list)
    ready: list[Entry] = Field(default_factory=list)
    left: list[Entry] = Field(default_factory=list)
    moments: dict[str, list[Entry]] = Field(default_factory=dict)
    where: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    failed: str = ""
    oom: bool = False

    @field_validator("figures", "repeats")
    @classmethod
    def _known(cls, figures: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in figures if name not in METRICS]
        if unknown:
            raise ValueError(f"there is no figure {unknown[0]!r}")
        return figures

    @field_validator("peak", "ready", "left")
    @classmethod
    def _readable(cls, entries: list[Entry]) -> list[Entry]:
        for entry in entries:
            _layers(entry)
        return entries

    @field_validator("moments")
    @classmethod
    def _all_readable(cls, moments: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
        for entries in moments.values():
            cls._readable(entries)
        return moments

    def measurement(
        self, name: str, where: Mapping[str, str], versions: Mapping[str, str]
    ) -> Measurement:
        """The measurement.

        Args:
            name: What it is called.
            where: That of the whole file.
            versions: Those of the whole file.
        """
        return Measurement(
            name=name,
            figures=self.figures,
            repeats={metric: tuple(values) for metric, values in self.repeats.items()},
            phases=self.phases,
            peak=_unfolded(self.peak),
            ready=_unfolded(self.ready),
            left=_unfolded(self.left),
            moments={phase: _unfolded(entries) for phase, entries in self.moments.items()},
            where={**where, **self.where},
            versions={**versions, **self.versions},
            failed=self.failed,
            oom=self.oom,
        )


def document_of(
    measurement: Measurement, where: Mapping[str, str], versions: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON form of a measurement; what is empty is left out.

    Args:
        measurement: What was measured.
        where: That of the whole file.
        versions: Those of the whole file.
    """
    full = {
        "figures": dict(measurement.figures),
        "repeats": {metric: list(values) for metric, values in measurement.repeats.items()},
        "phases": dict(measurement.phases),
        "peak": _folded(measurement.peak),
        "ready": _folded(measurement.ready),
        "left": _folded(measurement.left),
        "moments": {phase: _folded(held) for phase, held in measurement.moments.items()},
        "where": _beyond(measurement.where, where),
        "versions": _beyond(measurement.versions, versions),
        "failed": measurement.failed,
        "oom": measurement.oom,
    }
    return {name: value for name, value in full.items() if value or name == "figures"}


def _beyond(own: Mapping[str, str], shared: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in own.items() if shared.get(name) != value}


# -- holdings: equal layers once -------------------------------------------------------------------


def _folded(holdings: Holdings) -> list[list[Any]]:
    """The largest first; layers that hold as much are told together."""
    alike: dict[tuple[str, str, int], list[int]] = {}
    found: list[list[Any]] = []
    for (kind, owner), nbytes in holdings.items():
        pattern = any_layer(owner)
        numbers = [int(part) for part in owner.split(".") if part.isdigit()]
        if pattern.count("*") == len(numbers) == 1 and numbers[0] < MAX_LAYERS:
            alike.setdefault((kind, pattern, nbytes), []).append(numbers[0])
        else:
            found.append([kind, owner, nbytes])
    for (kind, pattern, nbytes), layers in alike.items():
        if len(layers) > 1:
            found.append([kind, pattern, nbytes, ranges(layers)])
        else:
            found.append([kind, pattern.replace("*", str(layers[0])), nbytes])
    return sorted(found, key=lambda entry: (-entry[2], entry[0], entry[1]))


def _layers(entry: Entry) -> list[int]:
    """The layers an entry stands for; none if it is one module's."""
    if len(entry) == 3:
        return []
    _, pattern, _, text = entry
    if not _RANGES.fullmatch(text) or pattern.count("*") != 1:
        raise ValueError(f"cannot read {text!r} as the layers of {pattern!r}")
    found: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
        if len(found) > MAX_LAYERS or not found:
            raise ValueError(f"cannot read {text!r} as the layers of {pattern!r}")
    return found


def _unfolded(entries: Iterable[Entry]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for entry in entries:
        kind, owner, nbytes = entry[:3]
        layers = _layers(entry)
        for name in [owner.replace("*", str(n)) for n in layers] or [owner]:
            found[kind, name] = nbytes
    return found
