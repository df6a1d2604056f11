"""The pytest plugin, on a card that is told what is allocated on it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CONFTEST = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from fake_card import FakeCard
CARD = FakeCard()

def pytest_vram_card(config):
    return CARD
"""
PLUGIN = ("-p", "no:vramplan", "-p", "vramplan.pytest_plugin", "-p", "no:cacheprovider")

HEAD = """
import pytest
from conftest import CARD
from vramplan.timeline import Kind
from vramplan.units import GIB, MIB

"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("VRAMPLAN_REQUIRE_GPU", raising=False)
    monkeypatch.delenv("FAKE_CARD", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPOSITORY), str(HERE))))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose tests measure on the fake card."""
    pytester.makeconftest(CONFTEST)
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    return project.runpytest_subprocess(*PLUGIN, *words)


def write(project: pytest.Pytester, body: str, name: str = "test_it") -> None:
    project.makepyfile(**{name: HEAD + body})


def section(result: pytest.RunResult) -> list[str]:
    """What stands under "vram" in the summary."""
    lines = result.stdout.lines
    begin = next(n for n, line in enumerate(lines) if re.fullmatch(r"=+ vram =+", line))
    end = next(n for n in range(begin + 1, len(lines)) if re.match(r"=+ ", lines[n]))
    return lines[begin + 1 : end]


LIMITED = """
@pytest.mark.limit_vram("1 GiB")
def test_step():
    weights = [CARD.alloc(100 * MIB, Kind.WEIGHTS, f"model.layers.{n}.mlp") for n in range(4)]
    CARD.at("forward", "model.layers.0.mlp")
    a = CARD.alloc(300 * MIB)
    CARD.at("backward", "lm_head", inside=False)
    b = CARD.alloc(SIZE)
    CARD.free(a), CARD.free(b)
"""


def test_within_the_limit(project: pytest.Pytester) -> None:
    write(project, LIMITED.replace("SIZE", "324 * MIB"))
    result = run(project)
    result.assert_outcomes(passed=1)
    assert section(result) == [
        "test                   region      allocated  reserved",
        "test_it.py::test_step  whole test   1.00 GiB  1.00 GiB",
    ]


def test_above_the_limit(project: pytest.Pytester) -> None:
    write(project, LIMITED.replace("SIZE", "600 * MIB"))
    result = run(project)
    result.assert_outcomes(failed=1)
    begin = result.stdout.lines.index("__________________________ test_step ___________________________") if False else None
    text = result.stdout.str()
    print(text)
    assert begin is None
