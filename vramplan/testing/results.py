"""All tests of a run together: saved, and summed up. Runs once, in xdist's controller."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vramplan.errors import EnvironmentProblem
from vramplan.testing import baselines
from vramplan.testing.plan import Plan

MAX_LINES = 20


@dataclass
class Results:
    """What came in from the tests.

    Attributes:
        told: Test -> what was said of it (see ``verdict.judge``), one entry for each phase that
            measured something.
        failed: Tests that did not pass.
        saved: What became of saving, in sentences.
        error: Why saving failed.
    """

    told: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    saved: list[str] = field(default_factory=list)
    error: str = ""

    def add(self, test: str, told: Mapping[str, Any]) -> None:
        """What one phase of a test measured."""
        self.told.setdefault(test, []).append(dict(told))

    def save(self, plan: Plan) -> None:
        """Write the baselines of the tests that passed: one for each card they ran on."""
        cards: dict[str, dict[str, dict[str, Any]]] = {}
        for test, entries in self.told.items():
            if test in self.failed:
                continue
            for told in entries:
                card = json.dumps([told["where"], told["versions"]])
                cards.setdefault(card, {}).setdefault(test, {}).update(told["measured"])
        for card, tests in cards.items():
            where, versions = json.loads(card)
            self._save(plan, where, versions, tests)
        if not cards:
            self.saved.append(f"{plan.save} was not saved: no passing test measured anything.")
        left_out = len(self.failed & self.told.keys())
        if left_out and cards:
            self.saved.append(f"{_tests(left_out)} that did not pass {_are(left_out)} not in it.")

    def _save(
        self,
        plan: Plan,
        where: Mapping[str, str],
        versions: Mapping[str, str],
        tests: Mapping[str, Mapping[str, Any]],
    ) -> None:
        path = baselines.file_path(plan.storage, plan.save, where, versions)
        lost = len(_tests_in(path) - tests.keys()) if plan.replaced else 0
        try:
            target = baselines.save(path, plan.save, where, versions, tests, plan.replaced)
        except EnvironmentProblem as error:
            rescued = Path(tempfile.mkdtemp(prefix="vramplan-")) / path.name
            self.error = str(error)
            baselines.save(rescued, plan.save, where, versions, tests, "")
            self.saved.append(f"{plan.save} could not be saved: {error}. It is in {rescued}.")
            return
        self.saved.append(f"Saved {_tests(len(tests))} in {_shown(target)}.")
        if target != path:
            self.saved.append(f"{path.name} is another run's, made meanwhile; it was left alone.")
        elif lost:
            self.saved.append(f"{_tests(lost)} of the replaced file {_are(lost)} no longer in it.")

    def lines(self) -> list[str]:
        """The summary, as plain text."""
        entries = [(test, told) for test, found in self.told.items() for told in found]
        lines = table(
            (test, *row) for test, told in entries for row in told["rows"]
        )  # fmt: skip
        for baseline in sorted({told["baseline"] for _, told in entries if told["baseline"]}):
            changed = {told["changed"] for _, told in entries if told["baseline"] == baseline}
            versions = "; ".join(sorted(filter(None, changed)))
            lines.append(f"Baseline: {baseline}" + (f" ({versions})." if versions else "."))
        for title, key in (("Not compared", "not_compared"), ("Note", "notes")):
            texts = list(dict.fromkeys(text for _, told in entries for text in told[key]))
            lines += [f"{title}: {text}." for text in texts[:MAX_LINES]]
            if len(texts) > MAX_LINES:
                lines.append(f"{title}: {len(texts) - MAX_LINES} more.")
        return lines + self.saved


def _tests_in(path: Path) -> set[str]:
    return set(baselines.read(path).tests)


def _shown(path: Path) -> Path:
    """A path as people would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _tests(count: int) -> str:
    return f"{count} {'test' if count == 1 else 'tests'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Figures of all regions; the last column only where something was compared."""
    found = list(rows)
    if not found:
        return []
    compared = any(row[-1] != "-" for row in found)
    heads = ("test", "region", "allocated", "reserved", "against baseline")
    cells = [heads, *found] if compared else [row[:-1] for row in (heads, *found)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(
            f"{cell:>{width}}" if 2 <= column <= 3 else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
