"""The GPU from outside: which one, who uses it, and what it shows while a run goes on. No torch."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.errors import EnvironmentProblem, UnknownNameError, UsageError
from vramplan.gpus import find_gpu
from vramplan.units import GIB, format_bytes

SAMPLE_INTERVAL_S = 0.05
SENSORS = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")
FOREIGN_BYTES = GIB  # more than a desktop takes: somebody whom the driver does not name


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU of this machine.

    Attributes:
        index: Its number in nvidia-smi.
        uuid: What CUDA_VISIBLE_DEVICES is set to.
        name: Product name.
        driver: Version of the driver.
        total_bytes: What nvidia-smi prints.
        capability: Compute capability, such as "9.0".
        slug: Its name in our catalogue, None if it is not there.
    """

    index: int
    uuid: str
    name: str
    driver: str
    total_bytes: int
    capability: str
    slug: str | None


class Machine:
    """NVML, opened once."""

    def __init__(self) -> None:
        try:
            import pynvml  # noqa: PLC0415 - an optional extra

            pynvml.nvmlInit()
        except ImportError:
            raise EnvironmentProblem(
                "measuring needs more packages: pip install 'vramplan[measure]'"
            ) from None
        except Exception as error:  # NVML's errors are made at run time
            raise EnvironmentProblem(
                f"no NVIDIA GPU can be used here (NVML: {error}). `--device cpu` tries the harness "
                "with a tiny config and measures no GPU memory"
            ) from None
        self.nvml = pynvml

    def count(self) -> int:
        """GPUs that CUDA_VISIBLE_DEVICES leaves visible."""
        return len(self._visible())

    def device(self, index: int) -> Device:
        """One GPU.

        Args:
            index: Its number among those that CUDA_VISIBLE_DEVICES leaves visible.

        Raises:
            UsageError: If there is no such GPU.
        """
        visible = self._visible()
        if not 0 <= index < len(visible):
            raise UsageError(f"--gpu-index {index}: this machine shows {len(visible)} GPU(s)")
        handle = visible[index]
        name = _text(self.nvml.nvmlDeviceGetName(handle))
        try:
            slug = find_gpu(name).slug
        except UnknownNameError:
            slug = None
        return Device(
            index=self.nvml.nvmlDeviceGetIndex(handle),
            uuid=_text(self.nvml.nvmlDeviceGetUUID(handle)),
            name=name,
            driver=_text(self.nvml.nvmlSystemGetDriverVersion()),
            capability="{}.{}".format(*self.nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            total_bytes=int(self.nvml.nvmlDeviceGetMemoryInfo(handle).total),
            slug=slug,
        )

    def _visible(self) -> list[Any]:
        count = self.nvml.nvmlDeviceGetCount()
        handles = [self.nvml.nvmlDeviceGetHandleByIndex(n) for n in range(count)]
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            return handles
        named = {_text(self.nvml.nvmlDeviceGetUUID(h)): h for h in handles}
        found = []
        for word in filter(None, (part.strip() for part in chosen.split(","))):
            if word.lstrip("-").isdigit():
                if not 0 <= int(word) < count:
                    break  # CUDA stops at the first that does not exist
                found.append(handles[int(word)])
            else:
                found += [h for uuid, h in named.items() if uuid.startswith(word)]
        return found

    def handle(self, device: Device) -> Any:
        """NVML's handle of a device."""
        return self.nvml.nvmlDeviceGetHandleByIndex(device.index)

    def used_bytes(self, device: Device) -> int:
        """In use on the card, the driver's own reserve left out."""
        handle = self.handle(device)
        with contextlib.suppress(Exception):  # older drivers know only the first form
            info = self.nvml.nvmlDeviceGetMemoryInfo(handle, version=self.nvml.nvmlMemory_v2)
            return int(info.used)
        return int(self.nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def processes(self, device: Device) -> dict[int, tuple[str, int | None]]:
        """Compute processes on the card: name and bytes by process id."""
        found = {}
        for process in self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle(device)):
            name = "a process"
            with contextlib.suppress(Exception):
                name = Path(_text(self.nvml.nvmlSystemGetProcessName(process.pid))).name
            used = process.usedGpuMemory
            found[int(process.pid)] = (name, None if used is None else int(used))
        return found

    def refuse_if_busy(self, device: Device) -> None:
        """Stop before disturbing others.

        Raises:
            EnvironmentProblem: If somebody else computes on the card; it names them.
        """
        others = {pid: entry for pid, entry in self.processes(device).items() if pid != os.getpid()}
        used = self.used_bytes(device)
        if others:
            who = ", ".join(
                f"{name} (process {pid}, {format_bytes(size)})"
                for pid, (name, size) in sorted(others.items())
            )
        elif used > FOREIGN_BYTES:
            who = "somebody the driver does not name (another container?)"
        else:
            return
        raise EnvironmentProblem(
            f"GPU {device.index} ({device.name}) is in use, {format_bytes(used)} of it: {who}. "
            "Figures taken beside others are of little worth; wait, choose another with "
            "--gpu-index, or say --allow-busy"
        )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextlib.contextmanager
def locked(name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of one GPU, so that two measurements never share it.

    Args:
        name: The GPU's UUID, or "cpu".
        wait: Wait for another measurement to end.

    Raises:
        EnvironmentProblem: If another measurement holds it.
    """
    try:
        from filelock import FileLock, Timeout  # noqa: PLC0415 - only where something is run
    except ImportError:
        raise EnvironmentProblem(
            "measuring needs more packages: pip install 'vramplan[measure]'"
        ) from None
    path = Path(tempfile.gettempdir()) / f"vramplan-{name}.lock"
    lock = FileLock(path, timeout=-1 if wait else 0, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        raise EnvironmentProblem(
            f"another vramplan measures on this GPU (it holds {path}); wait for it to end"
        ) from None
    except OSError as error:
        raise EnvironmentProblem(f"cannot lock {path}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin what would fill the disk.

    Raises:
        EnvironmentProblem: If there is not enough room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise EnvironmentProblem(
            f"{folder} has {format_bytes(free)} free and {what} needs {format_bytes(needed_bytes)}"
        )


def check_host_memory(needed_bytes: int, *, meminfo: Path = Path("/proc/meminfo")) -> None:
    """Refuse to begin what would push the host into swapping or its out-of-memory killer.

    Args:
        needed_bytes: What the run takes of it.
        meminfo: Linux's table; where it is missing nothing is known and nothing refused.

    Raises:
        EnvironmentProblem: If there is less available.
    """
    try:
        rows = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        available = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return
    if available < needed_bytes:
        raise EnvironmentProblem(
            f"the host has {format_bytes(available)} of memory available and this run needs about "
            f"{format_bytes(needed_bytes)}"
        )


class Sampler:
    """Looks at the card from a thread of the parent, so that the run itself is not disturbed.

    Args:
        machine: NVML.
        device: The card.
        before_bytes: In use on the card before the run.
    """

    def __init__(self, machine: Machine, device: Device, before_bytes: int) -> None:
        self.machine, self.device, self.before_bytes = machine, device, before_bytes
        self.handle = machine.handle(device)
        self.strangers = set(machine.processes(device))
        self.memory: list[tuple[float, int | None, int | None]] = []  # time, card, process
        self.readings: list[tuple[float, str, float]] = []
        self.reasons = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            now = time.monotonic()
            card = process = None
            with contextlib.suppress(Exception):  # a card may not tell everything
                card = self.machine.used_bytes(self.device)
            with contextlib.suppress(Exception):
                own = [
                    size
                    for pid, (_, size) in self.machine.processes(self.device).items()
                    if pid not in self.strangers and size is not None
                ]
                process = sum(own) if own else None
            self.memory.append((now, card, process))
            self._sample_clocks(now)

    def _sample_clocks(self, now: float) -> None:
        nvml, handle = self.machine.nvml, self.handle
        sensors: dict[str, Callable[[], float]] = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
        }
        for name, read in sensors.items():
            with contextlib.suppress(Exception):
                self.readings.append((now, name, float(read())))
        with contextlib.suppress(Exception):
            self.reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)

    def document(self, times: Mapping[str, float]) -> dict[str, Any]:
        """What was seen, as a record keeps it.

        Args:
            times: Monotonic times of the worker: ``began``, ``ready`` (training begins) and
                ``trained``; what it does afterwards is not part of the run.
        """
        end = times.get("trained", math.inf)
        ready = times.get("ready", math.inf)
        memory = [row for row in self.memory if times.get("began", -math.inf) <= row[0] <= end]
        series: dict[str, list[float]] = {name: [] for name in SENSORS}
        for when, name, value in self.readings:
            if ready <= when <= end:
                series[name].append(value)
        return {
            "interval_s": SAMPLE_INTERVAL_S,
            "count": len(memory),
            "process_peak_bytes": max((p for _, _, p in memory if p is not None), default=None),
            "card_peak_bytes": max((c for _, c, _ in memory if c is not None), default=None),
            "card_before_bytes": self.before_bytes,
            **{name: _spread(values) for name, values in series.items()},
            "throttle_reasons": throttle_words(self.machine.nvml, self.reasons),
        }


def throttle_words(nvml: Any, reasons: int) -> list[str]:
    """The names of NVML's clock-throttling bits; idle and application settings are none."""
    prefix = "nvmlClocksThrottleReason"
    harmless = ("None", "GpuIdle", "ApplicationsClocksSetting", "All", "UserDefinedClocks")
    return sorted(
        name.removeprefix(prefix)
        for name in dir(nvml)
        if name.startswith(prefix)
        and name.removeprefix(prefix) not in harmless
        and isinstance(getattr(nvml, name), int)
        and reasons & getattr(nvml, name)
    )


def _spread(values: list[float]) -> dict[str, float | int] | None:
    if not values:
        return None
    return {
        "minimum": min(values),
        "median": statistics.median(values),
        "maximum": max(values),
        "count": len(values),
    }
