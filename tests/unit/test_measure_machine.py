"""The GPU from outside, by a pynvml that is not there; one measurement at a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeNvml

from vramplan.errors import EnvironmentProblem, UsageError
from vramplan.measure.harness import _terminated_cleanly
from vramplan.measure.machine import (
    Machine,
    Sampler,
    check_host_memory,
    locked,
    throttle_words,
)
from vramplan.units import GIB, MIB

# -- the machine -----------------------------------------------------------------------------------


def process(pid: int, used: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_a_card_is_described(nvml: FakeNvml) -> None:
    card = Machine().device(0)
    assert (card.uuid, card.slug, card.driver) == ("GPU-aaaa-1", "h100-sxm-80gb", "580.1")
    assert (card.capability, card.total_bytes) == ("9.0", 80 * GIB)
    assert Machine().device(1).slug is None  # not in our catalogue


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-aaaa-1", "GPU-bbbb-2"]),
        ("0,1", ["GPU-aaaa-1", "GPU-bbbb-2"]),
        ("1", ["GPU-bbbb-2"]),
        ("1, 0", ["GPU-bbbb-2", "GPU-aaaa-1"]),
        ("GPU-bbbb-2", ["GPU-bbbb-2"]),
        ("GPU-bb", ["GPU-bbbb-2"]),
        ("", []),
        ("-1", []),
        ("7", []),
    ],
)
def test_only_visible_cards_are_numbered(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, uuids: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = Machine()
    assert [machine.device(n).uuid for n in range(len(uuids))] == uuids
    for missing in (len(uuids), -1):
        with pytest.raises(UsageError, match=rf"shows {len(uuids)} GPU"):
            machine.device(missing)


def test_without_a_driver_it_says_what_to_do(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("Driver Not Loaded")

    monkeypatch.setattr(nvml, "nvmlInit", fail)
    with pytest.raises(EnvironmentProblem, match=r"Driver Not Loaded.*--device cpu"):
        Machine()


@pytest.mark.parametrize(
    ("used", "running", "words"),
    [
        (0, [], None),
        (900 * MIB, [], None),  # a desktop
        (2 * GIB, [], "somebody the driver does not name"),
        (2 * GIB, [(4242, 2 * GIB)], r"python3 \(process 4242, 2\.00 GiB\)"),
        (2 * GIB, [(4242, None), (77, 512 * MIB)], r"a process \(process 77, .*python3"),
        (2 * GIB, [(os.getpid(), GIB)], "somebody"),
    ],
)
def test_a_busy_card_is_refused_and_its_users_named(
    nvml: FakeNvml, used: int, running: list[tuple[int, int | None]], words: str | None
) -> None:
    machine = Machine()
    nvml.used[0], nvml.running[0] = used, [process(*one) for one in running]
    machine.refuse_if_busy(machine.device(1))  # the other card is free
    if words is None:
        machine.refuse_if_busy(machine.device(0))
        return
    with pytest.raises(EnvironmentProblem, match=words) as caught:
        machine.refuse_if_busy(machine.device(0))
    assert "--allow-busy" in str(caught.value) and "\n" not in str(caught.value)


def test_the_drivers_own_reserve_is_not_in_use(nvml: FakeNvml) -> None:
    machine = Machine()
    nvml.used[0] = GIB
    assert machine.used_bytes(machine.device(0)) == GIB
    nvml.old_driver = True  # and knows no better
    assert machine.used_bytes(machine.device(0)) == GIB + 500 * MIB


def sampler(nvml: FakeNvml) -> Sampler:
    machine = Machine()
    return Sampler(machine, machine.device(0), 100)


def test_only_samples_of_the_run_count(nvml: FakeNvml) -> None:
    seen = sampler(nvml)
    seen.memory = [
        (0.5, 9_000, 9_000),  # the worker before this one
        (1.0, 200, None),
        (2.0, 800, 700),
        (3.0, 600, 500),
        (3.5, 9_000, 9_000),  # the loops that measure rates
    ]
    seen.readings = [
        (1.5, "sm_clock_mhz", 300.0),  # loading
        (2.0, "sm_clock_mhz", 1900.0),
        (2.5, "sm_clock_mhz", 1980.0),
        (3.0, "sm_clock_mhz", 1960.0),
        (3.5, "sm_clock_mhz", 100.0),
    ]
    found = seen.document({"began": 1.0, "ready": 2.0, "trained": 3.0})
    assert found["count"] == 3
    assert (found["card_peak_bytes"], found["process_peak_bytes"]) == (800, 700)
    assert found["card_before_bytes"] == 100
    assert found["sm_clock_mhz"] == {
        "minimum": 1900.0, "median": 1960.0, "maximum": 1980.0, "count": 3,
    }  # fmt: skip
    assert found["power_w"] is None


def test_a_run_that_never_trained_has_no_clocks(nvml: FakeNvml) -> None:
    seen = sampler(nvml)
    seen.memory = [(1.0, 200, None), (2.0, 300, None)]
    seen.readings = [(1.0, "power_w", 90.0)]
    found = seen.document({"began": 1.5})
    assert (found["count"], found["card_peak_bytes"], found["process_peak_bytes"]) == (1, 300, None)
    assert found["power_w"] is None
    nothing = seen.document({"began": 5.0})
    assert (nothing["count"], nothing["card_peak_bytes"]) == (0, None)


def test_the_sampler_looks_at_the_run_alone(nvml: FakeNvml) -> None:
    nvml.running[0] = [process(4242, GIB)]  # there before
    nvml.reasons = FakeNvml.nvmlClocksThrottleReasonSwPowerCap
    seen = sampler(nvml)
    nvml.running[0] = [process(4242, 3 * GIB), process(5000, 2 * GIB)]
    nvml.used[0] = 5 * GIB
    with seen:
        end = time.monotonic() + 10
        while len(seen.memory) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    found = seen.document({"ready": 0.0})
    assert (found["card_peak_bytes"], found["process_peak_bytes"]) == (5 * GIB, 2 * GIB)
    assert (found["sm_clock_mhz"]["median"], found["power_w"]["median"]) == (1980.0, 350.0)
    assert found["temperature_c"] is None  # the card does not tell
    assert found["throttle_reasons"] == ["SwPowerCap"]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0, []),
        (1 | 2, []),
        (4, ["SwPowerCap"]),
        (1 | 4 | 0x40, ["HwThermalSlowdown", "SwPowerCap"]),
        (0x8000, []),
    ],
)
def test_throttle_words(bits: int, words: list[str]) -> None:
    assert throttle_words(FakeNvml(), bits) == words


# -- one at a time ---------------------------------------------------------------------------------


def test_a_second_measurement_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with locked("cpu"):
        with locked("GPU-1"):
            pass
        with pytest.raises(EnvironmentProblem, match="another vramplan measures"), locked("cpu"):
            pass
    with locked("cpu"):
        pass


def test_a_lock_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "vramplan-cpu.lock").mkdir()
    with pytest.raises(EnvironmentProblem, match="cannot lock"), locked("cpu"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_ended_is_an_exception(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, _terminated_cleanly():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before


def test_signals_are_left_alone_off_the_main_thread() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with _terminated_cleanly():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize(("available_kb", "refused"), [(2 * 1024**2, False), (1024**2, True)])
def test_a_host_without_memory_is_left_alone(
    tmp_path: Path, available_kb: int, refused: bool
) -> None:
    table = tmp_path / "meminfo"
    table.write_text(f"MemTotal: 99 kB\nMemAvailable: {available_kb} kB\n")
    context = (
        pytest.raises(EnvironmentProblem, match="memory available") if refused else nullcontext()
    )
    with context:
        check_host_memory(3 * 1024**3 // 2, meminfo=table)
    check_host_memory(1024**5, meminfo=tmp_path / "none")  # not known: not refused
