"""What is there to copy is what it says: workflows that actionlint passes, files that parse."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from vramplan.job import Job
from vramplan.measure.spec import RunSpec, read_matrix
from vramplan.testing.baselines import read_all

EXAMPLES = Path(__file__).parents[2] / "examples" / "ci"


def test_workflows_pass_actionlint() -> None:
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("actionlint is not installed here (Linux only, in the test extra)")
    files = sorted(EXAMPLES.glob("*-runner.yml"))
    assert len(files) == 2
    command = [program, "-config-file", str(EXAMPLES / "actionlint.yaml"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_jobs_of_the_sample_project_can_be_run() -> None:
    blank = RunSpec(name="", model="", config={}, job=Job())
    (row,) = read_matrix(EXAMPLES / "project" / "jobs.toml", blank)
    assert [spec.model for spec in row.specs] == ["gpt-j-6b"]
    assert tomllib.loads((EXAMPLES / "project" / "jobs.toml").read_text(encoding="utf-8"))


def test_baseline_of_the_sample_project() -> None:
    (baseline,) = read_all(EXAMPLES / "project" / ".vram")
    assert baseline.where["GPU"] == "h100-sxm-80gb"
    assert {test.rpartition("::")[2] for test in baseline.tests} == {
        "test_gpt_j_fits_12_gb",
        "test_our_loop",
        "test_a_second_epoch_needs_no_more",
    }
