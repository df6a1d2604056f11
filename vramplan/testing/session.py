"""One pytest process: its card, the lock on it, and what the running test measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from vramplan.evidence import merged
from vramplan.measure.machine import locked
from vramplan.measure.region import Card, Meter, Region
from vramplan.regression import Measurement
from vramplan.testing.measured import region_measurement

WHOLE = "whole test"


class GpuCard(Card, Protocol):
    """The card that tests are measured on (see ``measure.card.TorchCard``)."""

    @property
    def where(self) -> Mapping[str, str]:
        """What must be equal for figures to be comparable: GPU and allocator settings."""

    @property
    def versions(self) -> Mapping[str, str]:
        """What else decides them."""

    @property
    def lock_name(self) -> str:
        """What is locked while a test measures."""

    def acquired(self) -> None:
        """The lock was just taken."""

    def released(self) -> None:
        """The lock is about to be given back."""

    def limit(self) -> str:
        """The share of the card that the program lets itself have; empty for all of it."""

    def harness(self) -> Any:
        """What runs jobs in workers, as a context manager."""


@dataclass
class Measured:
    """What one test has measured.

    Attributes:
        repeats: Name -> its measurements.
        notes: What the summary should say of it.
    """

    repeats: dict[str, list[Measurement]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def whole(self, session: Session) -> Iterator[None]:
        """Measure a test as a whole."""
        region = None
        try:
            with session.meter.measure(WHOLE) as region:
                yield
        finally:
            if region is not None:
                self.add_region(region, session)

    def add_region(self, region: Region, session: Session) -> None:
        """A region that is over."""
        if region.peak_allocated_bytes is None:
            return  # the card answered no more
        self.add(region_measurement(region, session.where(), session.card.versions))
        if region.why_unknown:
            self.notes.append(f"{region.name}: modules unknown, {region.why_unknown}")

    def add(self, measurement: Measurement) -> None:
        """One more; those of one name are repeats."""
        self.repeats.setdefault(measurement.name, []).append(measurement)

    def take(self) -> list[Measurement]:
        """Everything measured since the last call, repeats as one."""
        found = [merged(name, repeats) for name, repeats in self.repeats.items()]
        self.repeats = {}
        return found


class Session:
    """What the GPU tests of one process share; nothing is opened before the first of them.

    Args:
        open_card: Opens the card.
    """

    def __init__(self, open_card: Callable[[], GpuCard]) -> None:
        self._open_card = open_card
        self._card: GpuCard | None = None
        self._meter: Meter | None = None
        self._harness: Any = None
        self._lock = contextlib.ExitStack()
        self._keep = contextlib.ExitStack()
        self.holds_lock = False

    @property
    def card(self) -> GpuCard:
        """The card.

        Raises:
            EnvironmentProblem: If there is none that can be used.
        """
        if self._card is None:
            self._card = self._open_card()
        return self._card

    @property
    def meter(self) -> Meter:
        """What measures in this process."""
        if self._meter is None:
            self._meter = Meter(self.card)
        return self._meter

    @property
    def harness(self) -> Any:
        """What runs jobs in workers; started at the first use, kept for the next tests."""
        if self._harness is None:
            self._harness = self._keep.enter_context(self.card.harness())
        return self._harness

    def acquire(self) -> None:
        """Take the card for one test; waits for other measurements to end.

        Raises:
            EnvironmentProblem: If there is no card, or its lock cannot be made.
        """
        if self.holds_lock:
            return
        self._lock.enter_context(locked(self.card.lock_name, wait=True))
        self.holds_lock = True
        self.card.acquired()

    def release(self) -> None:
        """Give the card back."""
        if not self.holds_lock:
            return
        self.holds_lock = False
        try:
            self.card.released()
        finally:
            self._lock.close()

    def close(self) -> None:
        """End what was kept."""
        self.release()
        self._keep.close()

    def where(self) -> dict[str, str]:
        """What must be equal for figures of regions to be comparable, as things are now."""
        return {**self.card.where, "limit": self.card.limit() or "none"}
