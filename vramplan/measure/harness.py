"""Runs jobs in workers and turns whatever happens to them into records. Never imports torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from vramplan.catalogue import model_from_config
from vramplan.errors import EnvironmentProblem, RecordError
from vramplan.files import provenance
from vramplan.measure.machine import (
    Device,
    Machine,
    Sampler,
    check_disk,
    check_host_memory,
    locked,
)
from vramplan.measure.spec import RunSpec
from vramplan.prediction import predict
from vramplan.record import Record, parse_record
from vramplan.units import MIB, format_bytes

NEEDED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
LOG_TAIL = 2000
SPARE_DISK_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left behind.

    Attributes:
        record: Its record.
        timeline: The gzipped timeline document, where the history was recorded.
    """

    record: Record
    timeline: bytes | None = None


class Harness:
    """A GPU (or the CPU), locked, with a process that forks a fresh worker for every run.

    Args:
        device: "cuda" or "cpu".
        gpu_index: Which of the visible GPUs.
        allow_busy: Measure although others use the GPU.
        lock: Take the GPU's lock; whoever holds it already says no.

    Raises:
        EnvironmentProblem: Without a GPU, with a busy or locked one, or with packages missing.
    """

    def __init__(
        self, device: str, *, gpu_index: int = 0, allow_busy: bool = False, lock: bool = True
    ) -> None:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise EnvironmentProblem(
                f"measuring needs {', '.join(missing)}: pip install 'vramplan[measure]'"
            )
        self.allow_busy, self.lock = allow_busy, lock
        self.machine = Machine() if device == "cuda" else None
        self.gpu: Device | None = self.machine.device(gpu_index) if self.machine else None
        self._server: subprocess.Popen[str] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self.lock:
                stack.enter_context(locked(self.gpu.uuid if self.gpu else "cpu"))
            if self.machine and self.gpu and not self.allow_busy:
                self.machine.refuse_if_busy(self.gpu)
            self._folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vramplan-"))
            stack.enter_context(_terminated_cleanly())
            stack.callback(self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # -- the server ------------------------------------------------------------------------------

    def _start(self) -> subprocess.Popen[str]:
        """The process with the slow imports done; started at the first run, again if it died."""
        if self._server is not None and self._server.poll() is None:
            return self._server
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",  # nothing is downloaded
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # so that the server makes no CUDA context
            "CUDA_VISIBLE_DEVICES": self.gpu.uuid if self.gpu else "",
        }
        command = [sys.executable, "-m", "vramplan.measure.worker", self._folder]
        command.append(str(os.getpid()))
        command += [self.gpu.capability] if self.gpu else []
        with Path(self._folder, "log").open("w", encoding="utf-8") as log:
            self._server = subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        if not self._read():
            raise EnvironmentProblem(
                f"the measuring process could not start: {self._log() or 'it said nothing'}"
            )
        return self._server

    def _read(self) -> dict[str, Any] | None:
        assert self._server is not None and self._server.stdout is not None
        line = self._server.stdout.readline()
        return dict(json.loads(line)) if line.strip() else None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        server = self._start()
        assert server.stdin is not None
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            answer = self._read()
        except BrokenPipeError:
            answer = None
        if answer is None:
            self._stop()
            return {"code": None, "timeout": False}
        return answer

    def _log(self) -> str:
        try:
            return (
                Path(self._folder, "log")
                .read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
                .strip()
            )
        except OSError:
            return ""

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.terminate()  # it kills its worker
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        for pipe in (server.stdin, server.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    # -- one run ---------------------------------------------------------------------------------

    def run(self, spec: RunSpec) -> Outcome:
        """Run one spec in a fresh worker.

        Raises:
            EnvironmentProblem: If it must not be tried here: no room on the disk, or more managed
                memory than the card has free.
        """
        self._check_host(spec)
        refused = self.refusal(spec)
        if refused is not None:
            raise EnvironmentProblem(f"{spec.name}: {refused}")
        before = self.machine.used_bytes(self.gpu) if self.machine and self.gpu else None
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._folder) as name:
            folder = Path(name)
            out = folder / "record.json"
            sent = spec.document() | {"card_before_bytes": before}
            (folder / "spec.json").write_text(json.dumps(sent), encoding="utf-8")
            request = {
                "spec": str(folder / "spec.json"),
                "out": str(out),
                "folder": str(folder),
                "timeout_s": spec.timeout_s,
            }
            sampler = None
            if self.machine and self.gpu:
                self._start()
                with Sampler(self.machine, self.gpu, before or 0) as sampler:
                    answer = self._ask(request)
            else:
                answer = self._ask(request)
            document = spec.record_document("killed") | _kept(out)
            document |= self._ending(document, answer, spec)
            times = document.pop("times", {})
            document["sampling"] = sampler.document(times) if sampler else None
            document |= provenance()
            if self.gpu:
                document["gpu"] = {
                    "name": self.gpu.name,
                    **document.get("gpu", {}),
                    "slug": self.gpu.slug,
                    "driver": self.gpu.driver,
                    "nvml_total_bytes": self.gpu.total_bytes,
                }
            timeline = out.with_suffix(".timeline.json.gz")
            return Outcome(
                parse_record(document, spec.name),
                timeline.read_bytes() if timeline.exists() else None,
            )

    def _ending(
        self, document: Mapping[str, Any], answer: Mapping[str, Any], spec: RunSpec
    ) -> dict[str, Any]:
        """Status and error of a run, from what its worker wrote and how it ended."""
        if answer["timeout"]:
            return {
                "status": "timeout",
                "error": f"killed after {spec.timeout_s:g} s, in {document.get('phase', 'start')}",
            }
        code = answer["code"]
        if code == 0:
            return {}
        if code is None:
            return {"status": "killed", "error": f"the measuring process ended. {self._log()}"}
        if code < 0:
            name = signal.Signals(-code).name
            why = " (the host may have run out of memory)" if -code == signal.SIGKILL else ""
            return {"status": "killed", "error": f"ended by {name}{why}. {self._log()}".strip()}
        return {"status": "error", "error": f"ended with code {code}. {self._log()}".strip()}

    def refusal(self, spec: RunSpec) -> str | None:
        """Why a run must not be tried on this card; None if it may be.

        A run that must end out of memory ends before its first optimizer step makes paged state;
        should the estimate be wrong, the worker looks again before each such allocation.
        """
        if self.machine is None or self.gpu is None:
            return None
        prediction = predict(model_from_config(spec.config, spec.model), spec.job)
        paged = prediction.paged_bytes
        before = self.machine.used_bytes(self.gpu)
        free = self.gpu.total_bytes - before - prediction.process_bytes
        held = min(prediction.peak_reserved_bytes, spec.limit_bytes or free)
        if not paged or (paged < free and not held < free <= held + paged):
            return None
        return (
            f"its paged optimizer would take {format_bytes(paged)} of managed memory; beside the "
            f"{format_bytes(held)} of the run the card has {format_bytes(max(0, free - held))} "
            "free. More managed memory than that can hang the GPU for everyone; use an unpaged "
            "--optim"
        )

    def _check_host(self, spec: RunSpec) -> None:
        """Room on the disk and in the host's memory."""
        prediction = predict(model_from_config(spec.config, spec.model), spec.job)
        needed = SPARE_DISK_BYTES
        if spec.save:
            needed += prediction.adapter_bytes + prediction.optimizer_file_bytes
        check_disk(Path(self._folder), needed, "this run")
        if self.gpu is not None:
            check_host_memory(prediction.host_ram_bytes)


def _kept(out: Path) -> dict[str, Any]:
    """What the worker wrote last; nothing if it wrote nothing."""
    try:
        document = json.loads(out.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RecordError(f"{out} was left half written: {error}") from None
    return dict(document)


@contextlib.contextmanager
def _terminated_cleanly() -> Any:
    """SIGTERM and SIGHUP become an exception here, so that workers and files are cleaned up."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not in the main thread
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
