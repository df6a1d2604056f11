"""One run of the stock Trainer in a fresh process: ``python -m vramplan.measure.worker SPEC OUT``.

Without arguments it serves runs: one JSON object {"spec", "out", "timeout_s"} a line on standard
input, each forked from a process that has the slow imports behind it but has not touched the GPU.

SPEC is a JSON file with ``name``, ``config`` (a config.json's values), ``job`` (fields of
``vramplan.job.Job``) and optionally ``steps``, ``limit_bytes`` (most the allocator may reserve) and
``history`` (keep the allocator's own trace). OUT receives one record, whatever happens: a run that
ends out of memory is a record too. Weights are random and built on the device; nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vramplan import __version__
from vramplan.job import Job

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def environment() -> dict[str, Any]:
    """Versions of everything that decides the numbers."""
    versions = {"python": platform.python_version(), "vramplan": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # type: ignore[assignment]
    versions["torch"] = torch.__version__
    return versions


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document so that the file is either the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(spec_path: str, out_path: str) -> int:
    """Run one spec and write its record; returns the exit code."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from vramplan.measure import steps  # noqa: PLC0415 - imports what would touch the GPU

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    job = Job.from_dict(spec["job"])
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": spec["name"],
        "command": spec.get("command"),
        "model": spec.get("model"),
        "config": spec["config"],
        "job": asdict(job) | {"optim": job.optimizer_name},
        "limit_bytes": spec.get("limit_bytes"),
        "versions": environment(),
        "status": "error",
        "phase": "start",
    }
    began = time.perf_counter()
    try:
        steps.run(spec, record)
    except torch.OutOfMemoryError as error:
        record |= {"status": "oom", "error": str(error)[:500]}
    except Exception:  # every way to end is a record
        record["error"] = traceback.format_exc()[-3000:]
    record["wall_s"] = round(time.perf_counter() - began, 1)
    write_json(Path(out_path), record)
    if spec.get("history") and torch.cuda.is_available():
        steps.write_history(Path(out_path).with_suffix(".history.json.gz"), record)
    return {"done": 0, "oom": 1}.get(record["status"], 2)


def serve() -> None:
    """Fork one child per request; answer one line when it ended ("done" or "killed")."""
    import transformers.models.auto.modeling_auto  # noqa: PLC0415 - the slow part
    import transformers.quantizers  # noqa: F401, PLC0415

    assert not torch.cuda.is_initialized(), "a forked child could not use the GPU"
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            code = 2
            try:
                code = main(request["spec"], request["out"])
            finally:
                os._exit(code)
        print("done" if _wait(child, request["timeout_s"]) else "killed", flush=True)


def _wait(child: int, timeout_s: float) -> bool:
    """Wait for a child; kill it and everything it started after ``timeout_s`` seconds."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(main(*sys.argv[1:3]))
    serve()
