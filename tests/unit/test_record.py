"""Records: what is read, what is refused, and that a file is never half of anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vramplan import record as module
from vramplan.errors import EnvironmentProblem, RecordError
from vramplan.files import provenance, write_text
from vramplan.record import (
    SCHEMA_VERSION,
    Record,
    parse_record,
    read_record,
    write_record,
)

FULL_DISK = Path("/dev/full")
MINIMAL = {
    "schema_version": SCHEMA_VERSION,
    "name": "one",
    "model": "tiny",
    "config": {"model_type": "llama"},
    "job": {"method": "full"},
    "status": "done",
}
SAMPLING = {"interval_s": 0.05, "count": 9, "card_before_bytes": 100}
RICH = MINIMAL | {
    "command": "vramplan measure tiny",
    "created": "2026-01-01T00:00:00+00:00",
    "run": {"device": "cuda", "num_steps": 3, "timeout_s": 60.0, "limit_bytes": 2**33},
    "versions": {"torch": "2.11.0", "cuda": None},
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "total_bytes": 2**36},
    "oom": {"phase": "loss", "requested_bytes": 512, "module": "lm_head"},
    "phases": {"step": {"peak_allocated_bytes": 4, "peak_reserved_bytes": 8}},
    "steps": [{"time_s": 0.5, "major_faults": 1}, {"time_s": 0.25}],
    "step_time_s": {"minimum": 0.25, "median": 0.25, "maximum": 0.25, "count": 1},
    "rates": {"copy_bytes_per_s": 2.5e12},
    "limit_search": {
        "smallest_running_bytes": 96,
        "largest_failing_bytes": 64,
        "resolution_bytes": 32,
        "tries": [[64, "oom"], [96, "done"]],
    },
    "sampling": SAMPLING | {"throttle_reasons": ["SwPowerCap"]},
    "paging": {
        "measured": True,
        "canary_bytes": 8,
        "windows": [{"window": "step 1", "host_to_device_bytes": {"prefetch": 4096}}],
    },
}


def without(key: str) -> dict:
    return {k: v for k, v in MINIMAL.items() if k != key}


@pytest.mark.parametrize("document", [MINIMAL, RICH], ids=["minimal", "rich"])
def test_round_trip(tmp_path: Path, document: dict) -> None:
    path = tmp_path / "one.json"
    written = parse_record(document, "one")
    write_record(path, written)
    assert read_record(path) == written


def test_what_was_not_measured_is_null() -> None:
    record = parse_record(MINIMAL, "one")
    for name in ("peak_allocated_bytes", "paged_bytes", "num_ooms", "sampling", "paging", "rates"):
        assert getattr(record, name) is None
    assert record.device_peak_bytes is None and record.beyond_reserved_bytes is None


def test_unknown_fields_are_kept(tmp_path: Path) -> None:
    """Fields may be added within a schema version: an older vramplan must not lose them."""
    path = tmp_path / "one.json"
    document = MINIMAL | {"a_new_figure_bytes": 7, "gpu": {"name": "X", "ecc": True}}
    write_record(path, parse_record(document, "one"))
    written = json.loads(path.read_text())
    assert written["a_new_figure_bytes"] == 7
    assert written["gpu"]["ecc"] is True


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (MINIMAL | {"schema_version": SCHEMA_VERSION + 1}, "update it"),
        (without("schema_version"), "no schema_version"),
        (MINIMAL | {"schema_version": "1"}, "no schema_version"),
        (MINIMAL | {"schema_version": None}, "no schema_version"),
        ([], "not a record"),
        ("text", "not a record"),
        (None, "not a record"),
        (without("status"), "status"),
        (without("config"), "config"),
        (MINIMAL | {"status": "finished"}, "status"),
        (MINIMAL | {"job": []}, "job"),
        (MINIMAL | {"peak_allocated_bytes": "much"}, "peak_allocated_bytes"),
        (MINIMAL | {"peak_allocated_bytes": 1.5}, "peak_allocated_bytes"),
        (MINIMAL | {"steps": [{"time_s": "fast"}]}, r"steps\.0\.time_s"),
        (MINIMAL | {"gpu": "H100"}, "gpu"),
        (MINIMAL | {"sampling": {"count": 3}}, r"sampling\.interval_s"),
        (MINIMAL | {"paging": {}}, r"paging\.measured"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_usable_record_is_refused(document: object, words: str) -> None:
    with pytest.raises(RecordError, match=words) as caught:
        parse_record(document, "that.json")
    assert str(caught.value).startswith("that.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b"NaN"],
    ids=["empty", "half", "not text", "deep", "no fields", "null", "nan"],
)
def test_broken_files_give_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"broken\.json") as caught:
        read_record(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_missing_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecordError, match=str(path)):
            read_record(path)


def test_too_large_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    text = json.dumps(MINIMAL)
    path.write_text(text)
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", len(text))
    assert read_record(path).name == "one"
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", len(text) - 1)
    with pytest.raises(RecordError, match="larger than any record"):
        read_record(path)


def test_device_peak_leaves_others_out() -> None:
    figures = {"device_used_at_end_bytes": 1000, "reserved_at_end_bytes": 700}
    alone = parse_record(MINIMAL | figures, "one")
    beside = parse_record(MINIMAL | figures | {"sampling": SAMPLING}, "one")
    assert (alone.device_peak_bytes, alone.beyond_reserved_bytes) == (1000, 300)
    assert (beside.device_peak_bytes, beside.beyond_reserved_bytes) == (900, 200)


# -- writing -----------------------------------------------------------------------------------


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    if not FULL_DISK.exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "one.json"
    write_text(path, "old")
    (tmp_path / f".one.json.{os.getpid()}").symlink_to(FULL_DISK)
    with pytest.raises(EnvironmentProblem, match=r"one\.json: No space left on device"):
        write_text(path, "new" * 100_000)
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["one.json"]


@pytest.mark.parametrize("old", ["old", None])
def test_a_failed_replacement_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None
) -> None:
    path = tmp_path / "one.json"
    if old is not None:
        path.write_text(old)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(EnvironmentProblem, match="Permission denied"):
        write_text(path, "new")
    assert left_in(tmp_path) == ([] if old is None else ["one.json"])
    assert old is None or path.read_text() == old


def test_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "one.json", "new")
    assert (tmp_path / "a" / "b" / "one.json").read_text() == "new"


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*one\.json"):
        write_text(tmp_path / "file" / "one.json", "new")
    assert (tmp_path / "file").read_text() == "mine"


# -- where it comes from -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/x/vramplan/cli/__main__.py", "measure", "a b"], "vramplan measure 'a b'"),
        (["/usr/bin/vramplan", "calibrate"], "vramplan calibrate"),
    ],
)
def test_the_command_can_be_typed_again(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], command: str
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert provenance()["command"] == command


def test_outside_a_checkout_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GITHUB_SHA", raising=False)
    assert provenance()["commit"] is None
    monkeypatch.setenv("GITHUB_SHA", "abc")
    assert provenance()["commit"] == "abc"


def test_records_cannot_be_changed() -> None:
    record = Record.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        record.status = "oom"
