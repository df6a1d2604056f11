"""The pytest plugin: GPU memory as something that tests can fail on.

``@pytest.mark.limit_vram("11 GiB")`` limits a test, the ``vram`` fixture measures regions and runs
fine-tuning jobs, ``--vram-save`` and ``--vram-compare`` keep baselines. Pytest loads this in every
project that has vramplan installed: everything behind it is imported when a test asks for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from vramplan.testing.collector import Collector

if TYPE_CHECKING:
    from vramplan.testing.fixture import Vram
    from vramplan.testing.limits import Limit
    from vramplan.testing.plan import Plan
    from vramplan.testing.session import GpuCard, Measured, Session

MARKER = "limit_vram"
REQUIRE = "VRAMPLAN_REQUIRE_GPU"
MARKER_HELP = (
    f'{MARKER}(size, kind="allocated"): fail the test if its peak of GPU memory is above the size, '
    'such as "11 GiB". kind: "allocated" (torch\'s max_memory_allocated), "reserved" '
    '(max_memory_reserved) or "device" (what the process holds on the card). '
    f"Skipped without a GPU, unless {REQUIRE}=1. (vramplan)"
)


class HookSpecs:
    """Hooks that a conftest.py may implement."""

    @pytest.hookspec(firstresult=True)
    def pytest_vram_card(self, config: pytest.Config) -> GpuCard | None:
        """Return the card to measure on, in place of torch's current CUDA device."""


_session: pytest.StashKey[Session] = pytest.StashKey()
_plan: pytest.StashKey[Plan | None] = pytest.StashKey()
_measured: pytest.StashKey[Measured] = pytest.StashKey()
_limits: pytest.StashKey[list[Limit]] = pytest.StashKey()
_told: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of ``pytest --help``."""
    group = parser.getgroup("vramplan", "GPU memory: limits and baselines (vramplan)")
    group.addoption(
        "--vram-save",
        metavar="NAME",
        help="Save what passing tests took as baseline NAME, one file per GPU and versions.",
    )
    group.addoption(
        "--vram-compare",
        nargs="?",
        const="",
        metavar="NAME",
        help="Compare with baseline NAME (write it with =), or with the newest for this GPU, and "
        "fail tests that need more.",
    )
    group.addoption(
        "--vram-fail",
        metavar="FIGURE:MORE,...",
        help="With --vram-compare: how much more is a failure, such as "
        "allocated:1%%,reserved:200MiB,device:off; the default thresholds for what is not named.",
    )
    group.addoption(
        "--vram-storage",
        metavar="DIR",
        default=".vram",
        help="Folder of the baselines, meant to be committed; relative to rootdir "
        "[default: %(default)s].",
    )
    group.addoption(
        "--vram-overwrite",
        action="store_true",
        help="With --vram-save: replace a baseline of that name.",
    )
    group.addoption(
        "--vram-spread",
        action="store_true",
        help="With pytest-xdist: worker n measures on GPU n modulo their number. Without, all "
        "workers measure on the first GPU, one test at a time.",
    )


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """The hooks that a conftest.py may implement."""
    pluginmanager.add_hookspecs(HookSpecs)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; what is wrong with them is said before any test runs."""
    config.addinivalue_line("markers", MARKER_HELP)
    options = [config.getoption(f"vram_{name}") for name in ("save", "compare", "fail")]
    config.stash[_plan] = None
    if any(option is not None for option in options) or config.getoption("vram_overwrite"):
        from vramplan.testing.plan import make_plan  # noqa: PLC0415 - where it is asked for

        with _usage():
            config.stash[_plan] = make_plan(config, lambda: _session_of(config).card)
    worker = getattr(config, "workerinput", None)  # of pytest-xdist
    if worker is None:
        config.pluginmanager.register(Collector(config.stash[_plan]), "vramplan-collector")
    elif config.getoption("vram_spread"):
        from vramplan.testing.spread import choose_gpu  # noqa: PLC0415 - as above

        with _usage():
            choose_gpu(worker["workerid"])


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Our errors as pytest's own: one line and exit code 4."""
    from vramplan.errors import VramplanError  # noqa: PLC0415 - light, but not for every project

    try:
        yield
    except VramplanError as error:
        raise pytest.UsageError(f"vramplan: {error}") from None


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what the tests left open."""
    session = config.stash.get(_session, None)
    if session is not None:
        session.close()


def _session_of(config: pytest.Config) -> Session:
    if _session not in config.stash:
        from vramplan.testing.session import Session  # noqa: PLC0415 - as above

        def open_card() -> GpuCard:
            chosen: GpuCard | None = config.hook.pytest_vram_card(config=config)
            if chosen is not None:
                return chosen
            from vramplan.measure.card import open_card  # noqa: PLC0415 - as above

            return open_card()

        config.stash[_session] = Session(open_card)
    return config.stash[_session]


# -- one test --------------------------------------------------------------------------------------


@pytest.fixture
def vram(request: pytest.FixtureRequest) -> Vram:
    """Measure GPU memory: `with vram.measure("step") as m: ...`, `vram.run(model, ...)`."""
    _prepare(request.node)
    from vramplan.testing.fixture import Vram  # noqa: PLC0415 - as above

    return Vram(_session_of(request.config), request.node.stash[_measured])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Take the card for a test that measures."""
    marks = list(item.iter_markers(MARKER))
    if marks:
        item.stash[_limits] = _limits_of(marks)
    if marks or "vram" in getattr(item, "fixturenames", ()):
        _prepare(item)
    return (yield)


def _limits_of(marks: list[pytest.Mark]) -> list[Limit]:
    """The limits of a test, of each kind the one that stands closest to it."""
    from vramplan.errors import VramplanError  # noqa: PLC0415 - as above
    from vramplan.testing.limits import parse_limit  # noqa: PLC0415 - as above

    found, wrong = [], ""
    try:
        found = [parse_limit(mark.args, mark.kwargs) for mark in marks]
    except VramplanError as error:
        wrong = str(error)
    if wrong:  # not where the error is handled: pytest would show both
        pytest.fail(wrong, pytrace=False)
    return list({limit.kind: limit for limit in reversed(found)}.values())


def _prepare(item: pytest.Item) -> None:
    """Take the card for a test; without one it is skipped, or fails if one is required."""
    if _measured in item.stash:
        return
    from vramplan.errors import EnvironmentProblem  # noqa: PLC0415 - as above

    problem = ""
    try:
        _session_of(item.config).acquire()
    except (EnvironmentProblem, ImportError) as error:
        problem = f"no GPU memory can be measured: {error}"
    if problem and os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{REQUIRE}=1, but {problem}", pytrace=False)
    if problem:
        pytest.skip(problem)
    from vramplan.testing.session import Measured  # noqa: PLC0415 - as above

    item.stash[_measured] = Measured()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Measure a test that is limited; judge what any measured."""
    limits = item.stash.get(_limits, [])
    try:
        if not limits:
            result = yield
        else:
            with item.stash[_measured].whole(_session_of(item.config)):
                result = yield
    except BaseException:
        _report_failure(item)
        raise
    _judge(item, limits)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Give the card back."""
    try:
        result = yield
        _judge(item, [])  # what fixtures measured while they were taken down
    finally:
        if _measured in item.stash:
            _session_of(item.config).release()
    return result


def _judge(item: pytest.Item, limits: list[Limit]) -> None:
    """Fail a test that took more than it may, or than it did."""
    measured = item.stash.get(_measured, None)
    if measured is None or not measured.repeats:
        return
    from vramplan.errors import VramplanError  # noqa: PLC0415 - as above
    from vramplan.testing.verdict import judge  # noqa: PLC0415 - as above

    card = _session_of(item.config).card
    try:
        told = judge(item.nodeid, measured, limits, item.config.stash[_plan], card)
    except VramplanError as error:
        failures = [str(error)]
    else:
        failures = told["failures"]
        item.stash[_told] = told
        _tell_benchmark(item, told)
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)


def _report_failure(item: pytest.Item) -> None:
    """Show what was held where a test ran out of memory; its figures are not judged."""
    measured = item.stash.get(_measured, None)
    if measured is None:
        return
    from vramplan.testing.verdict import failure_report  # noqa: PLC0415 - as above

    ended = [m for repeats in measured.repeats.values() for m in repeats if m.oom]
    if ended:
        item.add_report_section("call", "vram", failure_report(ended[0]))
    measured.repeats.clear()


def _tell_benchmark(item: pytest.Item, told: dict[str, Any]) -> None:
    """Pytest-benchmark keeps the figures beside its times."""
    benchmark: Any = getattr(item, "funcargs", {}).get("benchmark")
    if hasattr(benchmark, "extra_info"):
        figures = {name: found["figures"] for name, found in told["measured"].items()}
        benchmark.extra_info.setdefault("vram", {}).update(figures)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send along what a test measured."""
    report = yield
    if call.when != "setup" and _told in item.stash:
        report.vram = item.stash[_told]  # type: ignore[attr-defined]  # xdist carries it along
        del item.stash[_told]
    return report
