"""Stand-ins for what the measuring harness meets: runs, records, a machine with GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Self

from vramplan.job import Job
from vramplan.measure.harness import Outcome
from vramplan.measure.spec import RunSpec, make_specs
from vramplan.record import Record, parse_record
from vramplan.units import GIB, MIB

SHARED = RunSpec(name="", model="", config={}, job=Job())


def spec_of(model: str = "pythia-160m", **values: Any) -> RunSpec:
    """A run of a shipped model; fields of RunSpec and of Job."""
    own = {name: values.pop(name) for name in list(values) if name in RunSpec.__dataclass_fields__}
    (spec,) = make_specs(model, values, replace(SHARED, **own))
    return spec


def record_of(spec: RunSpec, status: str = "done", **more: Any) -> Record:
    """The record that a worker would leave of a run."""
    document = {
        "schema_version": 1,
        "name": spec.name,
        "model": spec.model,
        "config": dict(spec.config),
        "job": spec.job_document(),
        "run": spec.conditions(),
        "status": status,
    }
    return parse_record(json.loads(json.dumps(document | more)), spec.name)


class FakeHarness:
    """Runs nothing; every run ends as ``status`` says, with the further fields of ``more``."""

    def __init__(self, timeline: bytes | None = None) -> None:
        self.timeline = timeline
        self.status = "done"
        self.more: dict[str, Any] = {}
        self.runs: list[str] = []
        self.machine = self.gpu = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None: ...

    def run(self, spec: RunSpec) -> Outcome:
        self.runs.append(spec.name)
        return Outcome(record_of(spec, self.status, **self.more), self.timeline)

    def refusal(self, _spec: RunSpec) -> str | None:
        return None


class FakeNvml:
    """Two cards as pynvml shows them."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, nvmlMemory_v2 = 1, 2, 0, 0x2000028
    nvmlClocksThrottleReasonNone = 0
    nvmlClocksThrottleReasonGpuIdle = 1
    nvmlClocksThrottleReasonApplicationsClocksSetting = 2
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonAll = 0x47

    def __init__(self) -> None:
        self.used = [0, 0]
        self.running: list[list[Any]] = [[], []]
        self.names = {4242: b"/usr/bin/python3"}
        self.reasons = 0
        self.old_driver = False

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return (b"NVIDIA H100 80GB HBM3", b"NVIDIA Unheard Of")[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return ("GPU-aaaa-1", "GPU-bbbb-2")[handle]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, handle

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        if version is not None and self.old_driver:
            raise RuntimeError("Function Not Found")
        reserve = 0 if version is not None else 500 * MIB
        return SimpleNamespace(total=80 * GIB, used=self.used[handle] + reserve)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return self.running[handle]

    def nvmlSystemGetProcessName(self, pid: int) -> bytes:
        return self.names[pid]

    def nvmlDeviceGetClockInfo(self, _handle: int, which: int) -> int:
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetPowerUsage(self, _handle: int) -> int:
        return 350_000  # mW

    def nvmlDeviceGetTemperature(self, _handle: int, _sensor: int) -> int:
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle: int) -> int:
        return self.reasons
