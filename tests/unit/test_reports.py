"""The committed reports say what the code says today: their words and figures, not their pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.report.page import figures
from vramplan.resources import profiles_dir

pytest.importorskip("matplotlib")
ROOT = profiles_dir().parent
NAMES = ("article-claims.md", "article-claims.html", "hardware-comparison.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every report, made again."""
    folder = tmp_path_factory.mktemp("reports")
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / "reports"), str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_committed_report_is_up_to_date(made: Path, name: str) -> None:
    committed = ROOT / "reports" / name
    if not committed.exists():
        pytest.skip(f"{name} is not committed yet; scripts/reports makes it")
    assert figures((made / name).read_text(encoding="utf-8")) == figures(
        committed.read_text(encoding="utf-8")
    ), "make them again with scripts/reports"


def test_every_claim_is_judged(made: Path) -> None:
    text = (made / "article-claims.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == 7 + 2  # claims, assumptions, how it was made
    assert "| does not hold |" not in text
    assert text.count("| holds |") == 6 and text.count("| holds in part |") == 1
