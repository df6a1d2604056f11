"""Paging events, counted by a CUPTI written here: what is added up, and when it is trusted."""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from vramplan.measure import paging
from vramplan.measure.paging import (
    CANARY_BYTES,
    ManagedMemoryError,
    PagingTap,
    PagingUnavailableError,
    guard_managed_memory,
)
from vramplan.record import Paging

CUDA = torch.device("cuda")


class Kinds(enum.IntEnum):
    """CUPTI's numbers need not be these; only the names are relied on."""

    BYTES_TRANSFER_HTOD = 11
    BYTES_TRANSFER_DTOH = 12
    CPU_PAGE_FAULT_COUNT = 13
    GPU_PAGE_FAULT = 14
    THRASHING = 15
    THROTTLING = 16


class Causes(enum.IntEnum):
    USER = 1
    COHERENCE = 2
    EVICTION = 4


class Activities(enum.IntEnum):
    KERNEL = 3
    UNIFIED_MEMORY_COUNTER = 33


class Config(list):  # type: ignore[type-arg]
    """The array of settings that CUPTI takes."""

    def __init__(self, count: int) -> None:
        super().__init__(SimpleNamespace() for _ in range(count))
        self.ptr = 1


class FakeCupti:
    """Delivers, at a flush, the events that were made to happen since the last one."""

    ActivityUnifiedMemoryCounterKind = Kinds
    ActivityUnifiedMemoryMigrationCause = Causes
    ActivityUnifiedMemoryCounterScope = SimpleNamespace(PROCESS_SINGLE_DEVICE=0)
    ActivityUnifiedMemoryCounterConfig = Config
    ActivityKind = Activities

    def __init__(self) -> None:
        self.pending: list[Any] = []
        self.enabled: list[int] = []
        self.dropped = 0
        self.seen = 1.0  # share of the canary's bytes that is reported
        self.refuses = False

    def happen(self, kind: int, value: int, flags: int = Causes.USER) -> None:
        counter = Activities.UNIFIED_MEMORY_COUNTER
        self.pending.append(
            SimpleNamespace(kind=counter, counter_kind=kind, value=value, flags_=flags)
        )

    def activity_register_callbacks(self, _room: Any, receive: Callable[[list[Any]], None]) -> None:
        self.receive = receive

    def activity_configure_unified_memory_counter(self, _settings: int, _count: int) -> None:
        if self.refuses:
            raise RuntimeError("CUPTI_ERROR_UM_PROFILING_NOT_SUPPORTED")

    def activity_enable(self, kind: int) -> None:
        self.enabled.append(kind)

    def activity_disable(self, kind: int) -> None:
        self.enabled.remove(kind)

    def activity_flush_all(self, _flag: int) -> None:
        events, self.pending = self.pending, []
        self.receive(events)

    def activity_get_num_dropped_records(self, _context: int, _stream: int, where: int) -> None:
        ctypes.c_size_t.from_address(where).value = self.dropped


class Canary:
    """A managed buffer: reading it on the CPU moves it to the host, prefetching moves it back."""

    def __init__(self, cupti: FakeCupti) -> None:
        self.cupti = cupti

    def move(self, kind: Kinds) -> None:
        self.cupti.happen(kind, int(CANARY_BYTES * self.cupti.seen))

    def __getitem__(self, _key: Any) -> Canary:
        return self

    def sum(self) -> int:
        self.move(Kinds.BYTES_TRANSFER_DTOH)
        return 1


@pytest.fixture
def cupti(monkeypatch: pytest.MonkeyPatch) -> FakeCupti:
    fake = FakeCupti()
    monkeypatch.setitem(sys.modules, "cupti", SimpleNamespace(cupti=fake))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    monkeypatch.setattr(bnb, "get_paged", lambda *_, **__: Canary(fake))
    monkeypatch.setattr(bnb, "fill", lambda *_: fake.happen(Kinds.GPU_PAGE_FAULT, 9))
    monkeypatch.setattr(bnb, "prefetch_tensor", lambda one: one.move(Kinds.BYTES_TRANSFER_HTOD))
    return fake


def watched(tap: PagingTap) -> Any:
    """The hooks of a run's watch, with the tap attached."""
    watch = SimpleNamespace(after_step=[], after_phase=[])
    tap.attach(watch)
    return SimpleNamespace(step=watch.after_step[0], phase=watch.after_phase[0])


# -- adding up -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "booked"),
    [
        ([], {}),
        (
            [(Kinds.BYTES_TRANSFER_HTOD, 4096, 1), (Kinds.BYTES_TRANSFER_HTOD, 100, 1)],
            {"host_to_device_bytes": {"user": 4196}},
        ),
        (
            [(Kinds.BYTES_TRANSFER_DTOH, 64, 4), (Kinds.BYTES_TRANSFER_DTOH, 32, 2)],
            {"device_to_host_bytes": {"eviction": 64, "coherence": 32}},
        ),
        (
            [(Kinds.BYTES_TRANSFER_HTOD, 8, 99)],  # a cause that CUPTI will have one day
            {"host_to_device_bytes": {"cause 99": 8}},
        ),
        ([(Kinds.GPU_PAGE_FAULT, 3, 1), (Kinds.GPU_PAGE_FAULT, 4, 1)], {"gpu_fault_groups": 7}),
        (
            [(Kinds.CPU_PAGE_FAULT_COUNT, 0x7F00_1234, 1)] * 2,  # values are program counters
            {"cpu_faults": 2},
        ),
        ([(Kinds.THRASHING, 0x7F00_0000, 1)], {"thrashing": 1}),
        ([(Kinds.THROTTLING, 5, 1)], {}),
    ],
)
def test_events_are_added_up_by_cause(
    cupti: FakeCupti, events: list[tuple[int, int, int]], booked: dict[str, Any]
) -> None:
    tap = PagingTap(CUDA)
    for event in events:
        cupti.happen(*event)
    watched(tap).step(1)
    nothing = {
        "host_to_device_bytes": {}, "device_to_host_bytes": {}, "gpu_fault_groups": 0,
        "cpu_faults": 0, "thrashing": 0, "window": "step 1",
    }  # fmt: skip
    (window,) = tap.windows
    assert window.pop("major_faults") >= 0
    assert window == nothing | booked


def test_other_activities_are_not_counted(cupti: FakeCupti) -> None:
    tap = PagingTap(CUDA)
    cupti.pending.append(
        SimpleNamespace(
            kind=Activities.KERNEL, counter_kind=Kinds.GPU_PAGE_FAULT, value=5, flags_=0
        )
    )
    watched(tap).step(1)
    assert tap.windows[0]["gpu_fault_groups"] == 0


def test_each_window_has_its_own_events(cupti: FakeCupti) -> None:
    tap = PagingTap(CUDA)
    watch = watched(tap)
    for close, nbytes in ((lambda: watch.step(1), 10), (lambda: watch.step(2), 20),
                          (lambda: watch.phase("save"), 30)):  # fmt: skip
        cupti.happen(Kinds.BYTES_TRANSFER_HTOD, nbytes)
        close()
    cupti.happen(Kinds.BYTES_TRANSFER_HTOD, 99)  # after the last step: of no window
    found = Paging.model_validate(tap.finish({}))
    assert found.measured and found.reason is None and found.canary_bytes == CANARY_BYTES
    assert [(w.window, w.host_to_device_bytes) for w in found.windows] == [
        ("step 1", {"user": 10}), ("step 2", {"user": 20}), ("save", {"user": 30}),
    ]  # fmt: skip
    assert cupti.enabled == []


# -- trust -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "when"),
    [((0.62, 1.0), "before the run"), ((1.0, 0.0), "after the run"), ((2.0, 1.0), "before")],
    ids=["lost", "silent", "twice"],
)
def test_a_canary_not_seen_exactly_means_not_measured(
    cupti: FakeCupti, share: tuple[float, float], when: str
) -> None:
    cupti.seen = share[0]
    tap = PagingTap(CUDA)
    cupti.happen(Kinds.BYTES_TRANSFER_HTOD, 10)
    watched(tap).step(1)
    cupti.seen = share[1]
    found = Paging.model_validate(tap.finish({}))
    assert not found.measured and found.windows == []
    assert found.reason is not None and when in found.reason


def test_dropped_records_mean_not_measured(cupti: FakeCupti) -> None:
    tap = PagingTap(CUDA)
    cupti.dropped = 3
    found = Paging.model_validate(tap.finish({}))
    assert (found.measured, found.reason) == (False, "CUPTI dropped 3 records")


def test_no_room_for_the_canary_means_not_measured(
    cupti: FakeCupti, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap = PagingTap(CUDA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (CANARY_BYTES, 2**31))
    found = Paging.model_validate(tap.finish({}))
    assert (found.measured, found.reason) == (False, "no free memory for the canary after the run")


@pytest.mark.parametrize(("moved", "noted"), [(1000, False), (999, True), (0, True)])
def test_a_save_that_seems_to_read_too_little_says_so(
    cupti: FakeCupti, moved: int, noted: bool
) -> None:
    tap = PagingTap(CUDA)
    watch = watched(tap)
    watch.step(1)
    cupti.happen(Kinds.BYTES_TRANSFER_DTOH, moved)
    watch.phase("save")
    step, save = Paging.model_validate(tap.finish({"paged_bytes": 1000})).windows
    assert step.note is None
    assert (save.note is not None) is noted


# -- where it cannot be had ------------------------------------------------------------------------


def test_without_a_gpu() -> None:
    with pytest.raises(PagingUnavailableError, match="no GPU"):
        PagingTap(torch.device("cpu"))


def test_without_cupti(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupti", None)
    with pytest.raises(PagingUnavailableError, match=r"vramplan\[paging\]"):
        PagingTap(CUDA)


def test_when_cupti_refuses(cupti: FakeCupti) -> None:
    cupti.refuses = True
    with pytest.raises(PagingUnavailableError, match="NOT_SUPPORTED"):
        PagingTap(CUDA)


# -- managed memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "free", "given"),
    [
        ((1000,), torch.uint8, 1001, True),
        ((1000,), torch.uint8, 1000, False),
        ((10, 100), torch.float32, 4001, True),
        ((10, 100), torch.float32, 3999, False),
    ],
)
def test_managed_memory_is_given_only_while_it_is_free(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    free: int,
    given: bool,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bnb, "get_paged", lambda *shape, **options: asked.append((shape, options)))
    monkeypatch.setattr(paging.torch.cuda, "mem_get_info", lambda: (free, 2**31))
    guard_managed_memory()
    if given:
        bnb.get_paged(*shape, dtype=dtype)
        assert asked == [(shape, {"dtype": dtype})]
    else:
        with pytest.raises(ManagedMemoryError, match="--optim"):
            bnb.get_paged(*shape, dtype=dtype)
        assert asked == []
