"""The measuring harness part by part, without torch, a GPU or a process of its own."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeHarness, record_of, spec_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.catalogue import find_model
from vramplan.errors import EnvironmentProblem, UnknownNameError
from vramplan.gpus import find_gpu
from vramplan.measure.harness import Harness, Outcome
from vramplan.measure.limit import MAX_TRIES, emulated, find_limit
from vramplan.measure.machine import check_disk
from vramplan.measure.spec import RunSpec
from vramplan.measure.sweep import Work, hopeless, perform
from vramplan.prediction import predict, usable_bytes
from vramplan.units import GIB, MIB

# -- the smallest limit ----------------------------------------------------------------------------


class Card:
    """Stands in for a harness: a run needs so much and no less."""

    def __init__(self, needs: float, others: dict[int, str] | None = None) -> None:
        self.needs, self.others = needs, others or {}
        self.tried: list[int] = []

    def run(self, spec: RunSpec) -> Outcome:
        limit = spec.limit_bytes
        assert limit is not None
        self.tried.append(limit)
        status = self.others.get(len(self.tried)) or ("done" if limit >= self.needs else "oom")
        return Outcome(record_of(spec, status), b"timeline" if status == "done" else None)


@settings(deadline=None)
@given(
    needs=st.integers(1, 100 * GIB),
    guess=st.integers(1, 100 * GIB),
    resolution=st.sampled_from([MIB, 32 * MIB, 100_000_007]),
)
def test_the_bracket_is_right(needs: int, guess: int, resolution: int) -> None:
    card, spec = Card(needs), spec_of("pythia-70m")
    found = find_limit(card.run, spec, guess_bytes=guess, resolution_bytes=resolution)
    search = found.record.limit_search
    assert search is not None
    failing = search.largest_failing_bytes or 0
    assert failing < needs <= search.smallest_running_bytes
    assert search.smallest_running_bytes - failing <= resolution
    assert found.record.run.limit_bytes == search.smallest_running_bytes
    assert found.timeline == b"timeline"
    assert [limit for limit, _ in search.tries] == card.tried
    assert len(set(card.tried)) == len(card.tried)
    doublings = (abs(needs - guess) // resolution + 2).bit_length()
    assert len(card.tried) <= 2 * doublings + 3


def test_a_good_guess_takes_few_runs() -> None:
    for needs in (5 * GIB - 40 * MIB, 5 * GIB, 5 * GIB + 40 * MIB):
        card = Card(needs)
        find_limit(card.run, spec_of("pythia-70m"), guess_bytes=5 * GIB, resolution_bytes=32 * MIB)
        assert len(card.tried) <= 4


def test_each_try_is_told() -> None:
    told: list[str] = []
    find_limit(
        Card(GIB).run, spec_of("pythia-70m"), guess_bytes=GIB, resolution_bytes=512 * MIB,
        tell=told.append,
    )  # fmt: skip
    assert told == ["1.00 GiB: runs", "0.50 GiB: oom"]


def test_what_always_runs_has_no_failing_limit() -> None:
    card = Card(0)
    found = find_limit(
        card.run, spec_of("pythia-70m"), guess_bytes=GIB, resolution_bytes=32 * MIB
    ).record.limit_search
    assert found is not None
    assert (found.smallest_running_bytes, found.largest_failing_bytes) == (32 * MIB, None)


def test_what_never_runs_ends() -> None:
    card = Card(float("inf"))
    found = find_limit(card.run, spec_of("pythia-70m"), guess_bytes=GIB)
    assert found.record.status == "oom" and found.record.limit_search is None
    assert len(card.tried) <= MAX_TRIES
    assert card.tried == sorted(card.tried)


@pytest.mark.parametrize("status", ["error", "killed", "timeout"])
def test_a_run_that_fails_otherwise_ends_the_search(status: str) -> None:
    card = Card(3 * GIB, {3: status})
    found = find_limit(card.run, spec_of("pythia-70m"), guess_bytes=GIB)
    assert found.record.status == status and found.record.limit_search is None
    assert len(card.tried) == 3


# -- smaller cards ---------------------------------------------------------------------------------


def test_an_emulated_card_leaves_room_for_what_the_allocator_does_not_see() -> None:
    spec = emulated(spec_of("gpt-j-6b", optim="adamw_8bit", emulated_gpu="3060"))
    card = find_gpu("rtx-3060-12gb")
    process = predict(find_model("gpt-j-6b"), spec.job, card).process_bytes
    assert spec.emulated_gpu == "rtx-3060-12gb"
    assert spec.limit_bytes == (usable_bytes(card) or 0) - process
    paged = emulated(spec_of("gpt-j-6b", emulated_gpu="3060"))
    assert spec.limit_bytes - (paged.limit_bytes or 0) == 128 * MIB  # managed memory, one step


def test_a_card_without_bf16_is_emulated_in_fp16() -> None:
    spec = emulated(spec_of("pythia-410m", emulated_gpu="t4"))
    assert (spec.job.dtype, spec.job.mixed_precision) == ("fp16", "fp16")
    assert emulated(spec_of("pythia-410m", emulated_gpu="3090")).job.mixed_precision == "bf16"


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="rtx-3060"):
        emulated(spec_of(emulated_gpu="rtx-3061"))


# -- what must not be tried ------------------------------------------------------------------------

PAGED = spec_of("pythia-1b", method="full", optim="paged_adamw_32bit", batch_size=1, seq_len=128)


def harness_on(total: int, used: int = 0) -> Harness:
    """A harness beside a card of that size, with nothing started."""
    harness = Harness.__new__(Harness)
    harness.machine = SimpleNamespace(used_bytes=lambda _: used)  # type: ignore[assignment]
    harness.gpu = SimpleNamespace(total_bytes=total)  # type: ignore[assignment]
    return harness


@pytest.fixture(scope="module")
def need() -> SimpleNamespace:
    """What the paged run takes: in the process, in the allocator, in managed memory."""
    found = predict(find_model("pythia-1b"), PAGED.job)
    return SimpleNamespace(
        process=found.process_bytes, held=found.peak_reserved_bytes, paged=found.paged_bytes
    )


def test_the_paged_run_is_a_test(need: SimpleNamespace) -> None:
    assert need.paged > 4 * GIB and need.held > 2 * GIB


@pytest.mark.parametrize(
    ("room", "refused"),
    [
        (lambda n: n.held + n.paged + MIB, False),  # all of it fits
        (lambda n: n.held + n.paged, True),
        (lambda n: n.held + n.paged - GIB, True),  # the run fits, its state does not
        (lambda n: n.held + MIB, True),
        (lambda n: n.paged, True),  # no run may ask for more than the whole card
        (lambda n: n.paged // 2, True),
    ],
)
def test_more_managed_memory_than_is_free_is_refused(
    need: SimpleNamespace, room: Callable[[Any], int], refused: bool
) -> None:
    reason = harness_on(room(need) + need.process).refusal(PAGED)
    assert (reason is not None) is refused
    if reason is not None:
        assert "managed memory" in reason and "--optim" in reason and "\n" not in reason


def test_what_others_use_is_not_free(need: SimpleNamespace) -> None:
    total = need.process + need.held + need.paged + 2 * GIB
    assert harness_on(total, used=GIB).refusal(PAGED) is None
    assert harness_on(total, used=3 * GIB).refusal(PAGED) is not None


def test_a_limit_leaves_room_for_managed_memory(need: SimpleNamespace) -> None:
    tight = harness_on(need.process + need.held + need.paged - GIB)
    assert tight.refusal(PAGED) is not None
    assert tight.refusal(replace(PAGED, limit_bytes=need.held - 2 * GIB)) is None


def test_a_run_that_cannot_get_so_far_may_be_tried() -> None:
    """It ends out of memory before there is any optimizer state."""
    spec = spec_of("gpt-j-6b", method="full", optim="paged_adamw_8bit", seq_len=128)
    found = predict(find_model("gpt-j-6b"), spec.job)
    assert found.paged_bytes < 20 * GIB < found.peak_reserved_bytes
    assert harness_on(20 * GIB + found.process_bytes).refusal(spec) is None


@pytest.mark.parametrize(
    "used",
    [
        0,
        pytest.param(
            24 * GIB - 100 * MIB,
        ),
    ],
)
def test_unpaged_runs_are_never_refused(used: int) -> None:
    spec = spec_of("pythia-1b", method="full", optim="adamw_torch")
    assert harness_on(24 * GIB, used).refusal(spec) is None


def test_without_a_gpu_nothing_is_refused() -> None:
    harness = Harness.__new__(Harness)
    harness.machine = harness.gpu = None
    assert harness.refusal(PAGED) is None


@pytest.mark.parametrize(
    ("total", "change", "find", "words"),
    [
        (24 * GIB, {}, False, None),
        (6 * GIB, {}, False, r"at least \d\.\d\d GiB of 5\.\d\d GiB"),
        (24 * GIB, {"limit_bytes": 4 * GIB}, False, r"of 4\.00 GiB"),
        (6 * GIB, {}, True, None),  # that is what is looked for
    ],
)
def test_hopeless_runs(total: int, change: dict[str, Any], find: bool, words: str | None) -> None:
    spec = replace(spec_of("pythia-1b", method="full", optim="adamw_torch", seq_len=128), **change)
    reason = hopeless(harness_on(total), Work(spec, find_limit=find))
    if words is None:
        assert reason is None
    else:
        assert reason is not None
        assert re.search(words, reason) and "--no-skip" in reason


# -- how a run ended ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "status", "begins", "ends"),
    [
        ({"code": 0, "timeout": False}, None, "", ""),
        ({"code": -9, "timeout": True}, "timeout", "killed after 5 s, in backward", "backward"),
        (
            {"code": -9, "timeout": False},
            "killed",
            "ended by SIGKILL (the host may have run out of memory). ",
            "the last words",
        ),
        ({"code": -11, "timeout": False}, "killed", "ended by SIGSEGV. ", "the last words"),
        ({"code": None, "timeout": False}, "killed", "the measuring process ", "the last words"),
        ({"code": 3, "timeout": False}, "error", "ended with code 3. ", "the last words"),
    ],
)
def test_endings(
    tmp_path: Path, answer: dict[str, Any], status: str | None, begins: str, ends: str
) -> None:
    harness = harness_on(GIB)
    harness._folder = str(tmp_path)
    (tmp_path / "log").write_bytes(b"x" * 5000 + b"\xff\nthe last words\n")
    ending = harness._ending({"phase": "backward"}, answer, spec_of(timeout_s=5.0))
    error = ending.get("error", "")
    assert ending.get("status") == status
    assert error.startswith(begins) and error.endswith(ends) and len(error) < 4000


# -- disks -----------------------------------------------------------------------------------------


def test_check_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * MIB))
    check_disk(tmp_path, 3 * MIB, "the records")
    with pytest.raises(EnvironmentProblem, match=r"has 3\.0 MiB free and the records needs 3\.0 M"):
        check_disk(tmp_path, 3 * MIB + 1, "the records")


def test_a_save_needs_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of a 1 B full fine-tune: weights and two states of each."""
    harness = harness_on(80 * GIB)
    harness._folder = str(tmp_path)
    spec = spec_of("pythia-1b", method="full", optim="adamw_torch")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=GIB))
    harness._check_host(spec)
    with pytest.raises(EnvironmentProblem, match=r"5\.\d\d GiB|6\.\d\d GiB"):
        harness._check_host(replace(spec, save=True))


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond ``size``, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("timeline", "room"),
    [
        (None, 100),
        pytest.param(
            bytes(100_000),
            50_000,
        ),
    ],
    ids=["record", "timeline"],
)
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tmp_path: Path, timeline: bytes | None, room: int
) -> None:
    work = Work(spec_of(name="one"))
    with pytest.raises(EnvironmentProblem, match=r"one\..*File too large"), files_up_to(room):
        perform(FakeHarness(timeline), work, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_timeline_lies_beside_its_record(tmp_path: Path) -> None:
    spec = spec_of(name="v1.5")
    perform(FakeHarness(b"1234"), Work(spec), tmp_path)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "v1.5.json",
        "v1.5.timeline.json.gz",
    ]
