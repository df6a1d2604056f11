"""Collects what the tests of a run measured; in xdist's controller, where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vramplan.testing.plan import Plan
    from vramplan.testing.results import Results


class Collector:
    """A plugin of its own, as reports come without their config.

    Args:
        plan: What the options ask for, None for nothing.
    """

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan
        self._results: Results | None = None

    @property
    def results(self) -> Results:
        """What came in; what it needs is imported when something does."""
        if self._results is None:
            from vramplan.testing.results import Results  # noqa: PLC0415 - not for every project

            self._results = Results()
        return self._results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        told = getattr(report, "vram", None)
        if told is not None:
            self.results.add(report.nodeid, told)
        if self._results is not None and not report.passed:
            self._results.failed.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Save what passed."""
        if self.plan is None or not self.plan.save:
            return
        self.results.save(self.plan)
        if self.results.error:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was measured, saved, and not compared."""
        lines = [] if self._results is None else self._results.lines()
        if lines:
            terminalreporter.section("vram")
            for line in lines:
                terminalreporter.line(line)
