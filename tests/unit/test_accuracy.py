"""The accuracy record is what its command makes, and the README quotes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramplan.accuracy import read_record, report, rows, summary
from vramplan.errors import RecordError
from vramplan.resources import profiles_dir

ROOT = profiles_dir().parent
FOLDER = profiles_dir() / "calibrations" / "h100-sxm-80gb"


def test_committed_report_is_up_to_date() -> None:
    committed = (ROOT / "reports" / "accuracy.md").read_text(encoding="utf-8")
    assert report(FOLDER) == committed


def test_readme_quotes_the_summary() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in summary(rows(FOLDER)):
        assert line in readme


def test_enough_is_recorded() -> None:
    done = [row for row in rows(FOLDER) if row.record["status"] == "done"]
    families = {row.record["config"]["model_type"] for row in done}
    methods = {row.record["job"]["method"] for row in done}
    assert len(done) >= 10 and len(families) >= 3
    assert methods == {"full", "lora", "qlora"}
    for row in done:
        assert row.record["versions"]["torch"] and row.record["gpu"]["driver"]
        assert row.record["command"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema_version": 99}', '{"schema_version": "x"}']
)
def test_unreadable_records_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"record\.json"):
        read_record(path)


def test_newer_record_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(RecordError, match="update it"):
        read_record(path)
