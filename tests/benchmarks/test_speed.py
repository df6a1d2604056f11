"""How fast it is. Times are shown, never asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.catalogue import find_model
from vramplan.estimate import estimate
from vramplan.job import Job
from vramplan.prediction import predict

YARDSTICK = [sys.executable, str(Path(__file__).with_name("tables.py"))]
FIT = [
    *(sys.executable, "-m", "vramplan.cli", "fit", "llama-3.1-8b"),
    *("--gpu", "rtx-4090-24gb"),
]
MAX_RSS_KIB = 60 * 1024


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_estimate_of_32_layers(benchmark, method: str) -> None:
    model = find_model("llama-3.1-8b")
    assert benchmark(estimate, model, Job(method=method)).peak_allocated_bytes > 0


def test_prediction_with_allocator_replay(benchmark) -> None:
    model = find_model("llama-3.1-8b")
    assert benchmark(predict, model, Job()).peak_reserved_bytes > 0


@pytest.mark.benchmark(group="process")
@pytest.mark.parametrize("command", [YARDSTICK, FIT], ids=["typer-two-tables", "vramplan-fit"])
def test_process(benchmark, command: list[str]) -> None:
    done = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, check=True), rounds=5, warmup_rounds=1
    )
    assert done.stdout


def test_memory_of_fit() -> None:
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], capture_output=True, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *FIT], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < MAX_RSS_KIB
