"""Several runs, each in a fresh worker: ``python -m vramplan.measure.batch RUNS.toml FOLDER``.

RUNS holds ``[[run]]`` tables with ``name``, ``model`` and any field of ``vramplan.job.Job``, and
optionally ``steps``, ``limit_mib`` and ``history``. Finished records are kept, so an interrupted
batch goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from vramplan.catalogue import find_model

RUN_LIMIT_S = 150.0


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Worker specs from a TOML file of runs."""
    specs = []
    for run in tomllib.loads(path.read_text(encoding="utf-8"))["run"]:
        values = dict(run)
        limit = values.pop("limit_mib", None)
        spec = {
            "name": values.pop("name"),
            "model": values.pop("model"),
            "steps": values.pop("steps", 3),
            "history": values.pop("history", False),
            "limit_bytes": limit * 1024**2 if limit else None,
            "job": values,
        }
        spec["config"] = dict(find_model(spec["model"]).config)
        spec["command"] = f"python -m vramplan.measure.batch {path.name} FOLDER"
        specs.append(spec)
    return specs


def run_all(runs_path: Path, folder: Path, budget_s: float) -> None:
    """Run every spec that has no record yet, while the time lasts.

    Args:
        runs_path: The TOML file.
        folder: Where records go.
        budget_s: Seconds after which no further run is started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget_s
    with start_server() as server:
        for spec in read_runs(runs_path):
            out = folder / f"{spec['name']}.json"
            if out.exists():
                continue
            left = end - time.monotonic()
            if left < 20:
                print(f"{spec['name']}: not started, the time is up", flush=True)
                continue
            spec_path = folder / f".{spec['name']}.spec"
            spec_path.write_text(json.dumps(spec), encoding="utf-8")
            answer = ask(server, spec_path, out, min(RUN_LIMIT_S, left))
            spec_path.unlink(missing_ok=True)
            print(summary(spec["name"], out, answer), flush=True)


def start_server() -> subprocess.Popen[str]:
    """A process with the slow imports done, which forks one worker per run."""
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", "vramplan.measure.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # asks NVML, so that the server itself never makes a CUDA context
        env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    )


def ask(server: subprocess.Popen[str], spec: Path, out: Path, timeout_s: float) -> str:
    """Have one run made; returns "done", "killed", or "lost" when the server died."""
    assert server.stdin is not None and server.stdout is not None
    request = {"spec": str(spec), "out": str(out), "timeout_s": timeout_s}
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
    except BrokenPipeError:
        return "lost"
    return server.stdout.readline().strip() or "lost"


def summary(name: str, out: Path, answer: str) -> str:
    """One line about a finished run."""
    if not out.exists():
        return f"{name}: {answer} without a record"
    record = json.loads(out.read_text(encoding="utf-8"))
    numbers = " ".join(
        f"{key} {record.get(f'{key}_bytes')}"
        for key in ("ready", "peak_allocated", "peak_reserved")
    )
    error = (record.get("error") or "").strip().splitlines()
    return f"{name}: {record['status']} {numbers} in {record['wall_s']} s " + "".join(error[-1:])


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3] if sys.argv[3:] else 3600))
