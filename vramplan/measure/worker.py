"""The worker: runs of the stock Trainer, each in a fresh process. Imports torch; its parent never.

``python -m vramplan.measure.worker FOLDER PARENT [CAPABILITY]`` serves runs: one JSON object a line
on standard input (see ``Request``), each forked from a process that has the slow imports behind it
but has not touched the GPU, and one JSON object a line back when it ended. It dies with its parent,
and its workers with it.
"""

from __future__ import annotations

import ctypes
import gzip
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, TypedDict

import torch

from vramplan import __version__
from vramplan.files import write_text
from vramplan.measure.spec import RunSpec
from vramplan.timeline import timeline_document

PACKAGES = ("transformers", "peft", "accelerate", "bitsandbytes")
PR_SET_PDEATHSIG = 1
POLL_S = 0.05
OLD_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"


class Request(TypedDict):
    """What the parent asks for: the spec's file, the record's file, a folder, a time limit."""

    spec: str
    out: str
    folder: str
    timeout_s: float


def environment() -> dict[str, str | None]:
    """Versions of everything that decides the numbers."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "vramplan": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def set_allocator(alloc_conf: str) -> str | None:
    """Give this process's allocator its settings; it must not have been used yet.

    PyTorch reads the environment once, at a moment that imports can bring about, so the settings
    are handed over directly. What the environment says stays in force where none are given.

    Args:
        alloc_conf: ``PYTORCH_ALLOC_CONF``; empty to leave the environment's.

    Returns:
        The settings in force, None for PyTorch's defaults.

    Source: torch 2.11 ``c10/core/AllocatorConfig.cpp``
    (``AcceleratorAllocatorConfig::instance``, ``parseArgs``).
    """
    if alloc_conf:
        torch._C._accelerator_setAllocatorSettings(alloc_conf)
    in_force = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    if in_force is not None:
        return in_force() or None
    # a torch that does not say: what was given, else the variables in its own order
    environ = os.environ
    return alloc_conf or environ.get(OLD_VARIABLE) or environ.get("PYTORCH_ALLOC_CONF") or None


def perform(request: Request) -> None:
    """Run one spec; its record is rewritten whenever something worth keeping is known."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from vramplan.measure.run import Run, is_out_of_memory  # noqa: PLC0415 - imported by then

    document = json.loads(Path(request["spec"]).read_text(encoding="utf-8"))
    before = document.pop("card_before_bytes", None)
    spec = RunSpec.from_document(document)
    out = Path(request["out"])
    record = spec.record_document("killed") | {
        "versions": environment(),
        "allocator_settings": set_allocator(spec.job.alloc_conf),
        "phase": "start",
        "card_before_bytes": before,
    }
    began = time.perf_counter()

    def keep() -> None:
        record["wall_s"] = round(time.perf_counter() - began, 2)
        kept = {k: v for k, v in record.items() if k != "card_before_bytes"}
        write_text(out, json.dumps(kept) + "\n")

    run = None
    try:
        run = Run(spec, record, request["folder"], keep)
        run.perform()
    except Exception as error:  # every way to end is a record
        if is_out_of_memory(error):
            last = str(error).strip().splitlines()[0]
            record |= {"status": "oom", "error": last[:500]}
            if run is not None:
                record["oom"] = run.out_of_memory(error)
        else:
            record |= {"status": "error", "error": traceback.format_exc()[-3000:]}
        if run is not None:
            run.keep_steps()
    keep()
    if run is not None and run.history is not None and record["status"] == "done":
        timeline, segments = run.history.timeline()
        text = json.dumps(
            timeline_document(timeline) | {"segments": segments}, separators=(",", ":")
        )
        with gzip.open(out.with_suffix(".timeline.json.gz"), "wt", encoding="utf-8") as file:
            file.write(text)


def import_all(capability: str | None) -> None:
    """Do every slow import, once, without touching the GPU.

    bitsandbytes asks for the card's compute capability while it is imported. torch would make a
    CUDA context to answer, and no forked child could use the card; so it is told what NVML says.

    Args:
        capability: Such as "9.0"; None without a GPU.
    """
    asked = torch.cuda.get_device_capability
    if capability is not None:
        major, minor = capability.split(".")
        torch.cuda.get_device_capability = lambda *_: (int(major), int(minor))
    try:
        import vramplan.measure.run  # noqa: F401, PLC0415 - Trainer, peft and bitsandbytes
    finally:
        torch.cuda.get_device_capability = asked
    assert not torch.cuda.is_initialized(), "a forked child could not use the GPU"


def serve(folder: str, parent: int, capability: str | None = None) -> None:
    """Fork one child per request; answer with how it ended.

    Args:
        folder: The parent's temporary folder, removed here if the parent can no longer do it.
        parent: The parent's process id: it may be gone before this process has imported torch.
        capability: The card's compute capability; None without a GPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import_all(capability)
    try:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            request: Request = json.loads(line)
            child = os.fork()
            if child == 0:
                _child(request)
            print(json.dumps(_wait(child, request, parent)), flush=True)
    except BrokenPipeError:  # the parent is gone
        sys.stdout = open(os.devnull, "w", encoding="ascii")  # noqa: PTH123, SIM115 - to the end
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


def _child(request: Request) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    code = 3
    try:
        perform(request)
        code = 0
    except BaseException:  # what a disk that is full, for one, leaves behind
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, request: Request, parent: int) -> dict[str, Any]:
    """Wait for a child; kill it after its time, or when nobody waits for it any more."""
    end = time.monotonic() + request["timeout_s"]
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return {"code": code, "timeout": False}
            if os.getppid() != parent:
                _kill(child)
                shutil.rmtree(Path(request["folder"]).parent, ignore_errors=True)
                raise SystemExit(1)
            if time.monotonic() > end:
                _kill(child)
                return {"code": -signal.SIGKILL, "timeout": True}
            time.sleep(POLL_S)
    except SystemExit:
        _kill(child)
        shutil.rmtree(request["folder"], ignore_errors=True)
        raise


def _kill(child: int) -> None:
    """Kill a worker and everything it started."""
    for kill in (lambda: os.killpg(child, signal.SIGKILL), lambda: os.waitpid(child, 0)):
        try:
            kill()
        except (ProcessLookupError, ChildProcessError):
            continue


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
