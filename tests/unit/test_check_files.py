"""Broken, hostile and absent files, and a baseline that is never lost half-way."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
from planted import NAME

from vramplan import files
from vramplan.errors import EnvironmentProblem, RecordError, UsageError, VramplanError
from vramplan.evidence import read_timeline, timeline_path
from vramplan.files import write_all
from vramplan.pairing import accept, compare, gather
from vramplan.record import MAX_RECORD_BYTES, read_record
from vramplan.regression import thresholds

ANY = thresholds("")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return planted.write(tmp_path / "base", planted.recorded()).parent


@pytest.fixture
def now(tmp_path: Path) -> Path:
    return planted.write(tmp_path / "now", planted.extra_logits()).parent


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edited(**values: Any) -> str:
    return json.dumps(planted.recorded()[0] | values)


# -- files that are no records ---------------------------------------------------------------------


def _deep(record: dict[str, Any], key: str, value: Any) -> str:
    return json.dumps(record | {key: value})


BROKEN: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "empty": (lambda: "", "cannot be read as a record"),
    "truncated": (lambda: edited()[:500], "cannot be read as a record"),
    "binary": (lambda: b"\xff\xfe\x00", "cannot be read as a record"),
    "nested": (lambda: "[" * 100_000, "cannot be read as a record"),
    "list": (lambda: "[1, 2]", "no schema_version"),
    "number": (lambda: "1" * 5000, "cannot be read as a record"),
    "huge": (lambda: b" " * (MAX_RECORD_BYTES + 1), "larger than any record"),
    "newer": (lambda: edited(schema_version=99), "has schema_version 99"),
    "no version": (lambda: edited(schema_version="1"), "no schema_version"),
    "negative": (lambda: edited(peak_allocated_bytes=-5), "peak_allocated_bytes: Input should be"),
    "absurd": (lambda: edited(peak_allocated_bytes=10**30), "peak_allocated_bytes: Input should"),
    "text": (lambda: edited(ready_bytes="much"), "ready_bytes: Input should be a valid integer"),
    "fraction": (lambda: edited(ready_bytes=0.5), "ready_bytes: Input should be a valid integer"),
    "nan": (
        lambda: edited(tokens_per_s={"minimum": 1, "median": float("nan"), "maximum": 2,
                                     "count": 3}),
        "tokens_per_s.median: Input should be a finite number",
    ),
    "steps": (lambda: edited(steps=5), "steps: Input should be a valid list"),
    "step": (lambda: edited(steps=[{"begin_allocated_bytes": -1}]), "steps.0.begin_allocated"),
    "versions": (lambda: edited(versions=[]), "versions: Input should be a valid dictionary"),
    "phases": (lambda: edited(phases={"\x1b[31m\n": 1}), "phases.\x1b[31m\n: Input should be"),
    "status": (lambda: edited(status="fine"), "status: Input should be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("update", [False, True])
def test_a_broken_record_is_one_error(case: str, update: bool, base: Path, now: Path) -> None:
    make, told = BROKEN[case]
    data = make()
    path = now / f"{NAME}.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    before = contents(base)
    for current, baseline in ((now, base), (base, now)):
        with pytest.raises(RecordError) as error:
            (accept if update else compare)(current, baseline, ANY)
        assert str(path) in str(error.value) and told in str(error.value)
    assert contents(base) == before


def _timeline(**values: Any) -> bytes:
    return gzip.compress(json.dumps(planted.recorded()[1] | values).encode())


def _events(*event: Any) -> bytes:
    return _timeline(sections=[{"repeats": 1, "events": [list(event)]}])


@pytest.mark.parametrize(
    "data, told",
    [
        (b"", "cannot be read as a timeline"),
        (b"{}", "cannot be read as a timeline"),
        (_timeline()[:3000], "cannot be read as a timeline"),
        (_timeline()[:50] + b"\x00" * 50 + _timeline()[100:], "cannot be read as a timeline"),
        (gzip.compress(b"[" * 100_000, mtime=0), "cannot be read as a timeline"),
        (gzip.compress(b"[]", mtime=0), "not a usable timeline"),
        (gzip.compress(b"null", mtime=0), "not a usable timeline"),
        (_timeline(schema_version=9), "has schema_version 9"),
        (_timeline(kinds=["treasure"]), "not a usable timeline"),
        (_timeline(owners=5), "not a usable timeline"),
        (_events(1, float("inf"), 0, 0, 0, 1), "not a usable timeline"),
        (_events(1, float("nan"), 0, 0, 0, 1), "not a usable timeline"),
        (_events(1, 512, 99, 0, 0, 1), "not a usable timeline"),
        (_events(1, 512), "not a usable timeline"),
    ],
)
def test_a_broken_timeline_is_one_error(data: bytes, told: str, base: Path, now: Path) -> None:
    timeline_path(now / f"{NAME}.json").write_bytes(data)
    with pytest.raises(RecordError, match=told):
        compare(now, base, ANY)


def test_an_empty_timeline_knows_nothing(base: Path, now: Path) -> None:
    timeline_path(now / f"{NAME}.json").write_bytes(_timeline(sections=[]))
    (found,) = compare(now, base, ANY).checks
    assert (found.outcome, found.grown) == ("worse", ())


def test_a_timeline_that_is_too_large(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr("vramplan.evidence.MAX_TIMELINE_BYTES", 1000)
    with pytest.raises(RecordError, match="larger than any timeline"):
        read_timeline(timeline_path(base / f"{NAME}.json"))


def test_a_device_is_not_read_for_ever() -> None:
    with pytest.raises(RecordError, match="larger than any record"):
        read_record(Path("/dev/zero"))


def test_paths_that_are_not_there(tmp_path: Path, base: Path) -> None:
    record, empty = base / f"{NAME}.json", tmp_path / "empty"
    empty.mkdir()
    for current, baseline, kind, told in (
        (tmp_path / "no", base, RecordError, "there is no record or folder"),
        (base, tmp_path / "no", RecordError, "--update makes it"),
        (base, empty, RecordError, "holds no records"),
        (empty, base, RecordError, "holds no records"),
        (record, base, UsageError, "give two of a kind"),
        (base, base, UsageError, "is its own baseline"),
    ):
        with pytest.raises(kind, match=told):
            compare(current, baseline, ANY)


def test_two_records_of_one_name(base: Path) -> None:
    (base / "copy.json").write_text((base / f"{NAME}.json").read_text())
    with pytest.raises(RecordError, match="remove one"):
        gather(base)


def test_the_command_prints_one_line(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(edited(phases={"\x1b[31m\nerror: two": 1}))
    done = subprocess.run(
        [sys.executable, "-m", "vramplan.cli", "check", str(path), str(base / f"{NAME}.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {path} is not a usable record: phases.\ufffd[31m\ufffderror: two: Input should be "
        "a valid dictionary or instance of PhasePeak\n"
    )


def test_exit_codes_of_the_command(tmp_path: Path, base: Path, now: Path) -> None:
    def code(*args: object) -> int:
        command = [sys.executable, "-m", "vramplan.cli", "check", *map(str, args), "-q"]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert code(now, base) == 1
    assert code(base, now) == 0
    assert code(base, tmp_path / "none") == 2
    assert code(now, base, "--update") == 0
    assert code(now, base) == 0


def test_a_reader_that_went_away_is_no_answer(base: Path, now: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vramplan.cli", "check", str(now), str(base)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# -- a new baseline --------------------------------------------------------------------------------


def test_update_replaces_record_and_timeline(base: Path, now: Path) -> None:
    accepted = accept(now, base, ANY)
    assert accepted.fates == {NAME: "replaced"}
    assert accepted.checked.outcome == "worse"
    assert contents(base) == contents(now)
    assert accept(now, base, ANY).fates == {NAME: "unchanged"}
    timeline_path(now / f"{NAME}.json").unlink()
    assert accept(now, base, ANY).fates == {NAME: "replaced"}
    assert contents(base) == contents(now)  # a timeline of another run would blame the wrong module


def test_update_of_one_record(tmp_path: Path, base: Path, now: Path) -> None:
    target = tmp_path / "baselines" / "mine.json"
    record = now / f"{NAME}.json"
    assert accept(record, target, ANY).fates == {NAME: "added"}
    assert accept(base / f"{NAME}.json", target, ANY).fates == {NAME: "replaced"}
    assert contents(target.parent) == {
        "mine.json": (base / f"{NAME}.json").read_bytes(),
        "mine.timeline.json.gz": timeline_path(base / f"{NAME}.json").read_bytes(),
    }


def test_update_keeps_what_was_not_measured_again(tmp_path: Path, base: Path) -> None:
    new = planted.write(tmp_path / "new", planted.recorded("gpt2-full-8x512"), "g").parent
    assert accept(new, base, ANY).fates == {"gpt2-full-8x512": "added", NAME: "kept"}
    assert len(contents(base)) == 4
    assert accept(new, tmp_path / "deep" / "er", ANY).fates == {"gpt2-full-8x512": "added"}
    (tmp_path / "hollow").mkdir()
    assert accept(new, tmp_path / "hollow", ANY).fates == {"gpt2-full-8x512": "added"}


def test_update_replaces_all_repeats_of_a_measurement(tmp_path: Path) -> None:
    for folder, count in (("old", 5), ("fresh", 3)):
        (tmp_path / folder).mkdir()
        for n in range(1, count + 1):
            record = planted.recorded()[0] | {"name": f"x-repeat{n}", "created": folder}
            (tmp_path / folder / f"x-repeat{n}.json").write_text(json.dumps(record))
    assert accept(tmp_path / "fresh", tmp_path / "old", ANY).fates == {"x": "replaced"}
    assert contents(tmp_path / "old") == contents(tmp_path / "fresh")


def test_update_refuses_runs_that_failed(base: Path, now: Path) -> None:
    oom = edited(status="oom", oom={"phase": "loss"})
    (now / f"{NAME}.json").write_text(oom)
    before = contents(base)
    with pytest.raises(RecordError, match=f"{NAME} is no baseline: out of memory in loss; --force"):
        accept(now, base, ANY)
    assert contents(base) == before
    assert accept(now, base, ANY, force=True).fates == {NAME: "replaced"}
    assert (base / f"{NAME}.json").read_text() == oom


def test_update_overwrites_no_other_record(base: Path, now: Path) -> None:
    (now / f"{NAME}.json").write_text(edited(name="another"))
    before = contents(base)
    with pytest.raises(RecordError, match=f"is the record {NAME}; rename one"):
        accept(now, base, ANY)
    assert contents(base) == before


@pytest.mark.parametrize("failing", range(1, 5))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_lost_half_way(
    failing: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    paths[0].write_text("old a")
    paths[1].write_text("old b")
    before = contents(tmp_path)
    calls = 0
    real = {name: getattr(Path, name) for name in ("write_bytes", "replace")}

    def failing_call(name: str) -> Callable[..., Any]:
        def call(self: Path, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise error
            return real[name](self, *args)

        return call

    for name in real:
        monkeypatch.setattr(Path, name, failing_call(name))
    with pytest.raises((EnvironmentProblem, KeyboardInterrupt)):
        write_all({paths[0]: b"new a", paths[1]: None, paths[2]: b"new c"})
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path, now: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot use .*file/base: Not a directory"):
        accept(now, tmp_path / "file" / "base", ANY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(base: Path, now: Path) -> None:
    before = contents(base)
    base.chmod(0o555)
    try:
        with pytest.raises(EnvironmentProblem, match="Permission denied; nothing was changed"):
            accept(now, base, ANY)
    finally:
        base.chmod(0o755)
    assert contents(base) == before


def test_a_file_system_that_is_read_only(
    base: Path, now: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, _data: bytes) -> int:
        raise OSError(30, "Read-only file system", str(self))

    before = contents(base)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(EnvironmentProblem, match="Read-only file system; nothing was changed"):
        accept(now, base, ANY)
    assert contents(base) == before


def _accept(current: Path, baseline: Path) -> str:
    try:
        return str(accept(current, baseline, thresholds("")).fates)
    except VramplanError as error:
        return f"error: {error}"


def test_two_processes_at_once(tmp_path: Path) -> None:
    target = tmp_path / "target"
    sides = []
    for side in ("one", "two"):
        for n in range(4):
            record, timeline = planted.recorded()
            run = (record | {"name": f"r{n}", "created": side}, timeline | {"side": side})
            planted.write(tmp_path / side, run, f"r{n}")
        sides.append(tmp_path / side)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for told in pool.starmap(_accept, [(side, target) for side in sides * 3]):
            assert not told.startswith("error"), told
    assert contents(target) in [contents(side) for side in sides]


def test_without_locks_it_works_too(base: Path, now: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert accept(now, base, ANY).fates == {NAME: "replaced"}
    assert files.write_all({}) is None
