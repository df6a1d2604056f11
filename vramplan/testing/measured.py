"""Regions as Measurements."""

from __future__ import annotations

from collections.abc import Mapping

from vramplan.evidence import out_of_memory
from vramplan.measure.region import Region
from vramplan.regression import Measurement

# Kernels stay on the card once they are loaded: it depends on the tests before, and on those that
# were chosen, which of them this region had to load.
UNSTEADY = frozenset({"device"})


def region_measurement(
    region: Region, where: Mapping[str, str], versions: Mapping[str, str]
) -> Measurement:
    """What a region took, in the form that two of them are compared in.

    Args:
        region: One that is over.
        where: What must be equal for figures to be comparable.
        versions: What else decides them.
    """
    figures = {
        "allocated": region.peak_allocated_bytes,
        "reserved": region.peak_reserved_bytes,
        "device": region.device_peak_bytes,
        "leaked": region.leaked_bytes,
        "per_step": region.per_step_bytes,
        "paged": region.paged_bytes,
    }
    return Measurement(
        name=region.name,
        figures={name: max(0, size) for name, size in figures.items() if size is not None},
        phases=region.phases,
        peak=region.owners,
        left=region.left,
        moments=region.moments,
        where=where,
        versions=versions,
        failed=failure_text(region),
        unsteady=UNSTEADY,
        oom=region.oom,
    )


def failure_text(region: Region) -> str:
    """How a region ended if it did not end well."""
    if not region.oom:
        return region.failed
    failure = region.failure
    if failure is None:
        return out_of_memory(None)
    return out_of_memory(failure.phase, failure.owner, failure.requested_bytes)
