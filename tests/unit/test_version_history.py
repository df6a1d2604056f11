"""The history of version changes: its report is of its pairs, and records are told beside it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import RecordError
from vramplan.resources import profiles_dir

ROOT = Path(__file__).parents[2]
RUN = profiles_dir() / "calibrations/h100-sxm-80gb/runs/pythia-410m-full-2x512-evaluate-save.json"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "version_history", ROOT / "scripts/version_history.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_report_is_of_these_pairs(script: Any) -> None:
    report = json.loads((ROOT / "reports/version-history.json").read_text())
    pairs = script.read_pairs([])
    assert [(p["name"], p["pins"], p["job"], p["layers"]) for p in report["pairs"]] == [
        (pair.name, pair.pins, pair.run, pair.layers) for pair in pairs
    ]
    text = (ROOT / "reports/version-history.md").read_text()
    for pair, told in zip(pairs, report["pairs"], strict=True):
        assert f"## {pair.title}\n\n{pair.why}\n" in text
        figures = told["predicted"]
        worse = figures["after"]["allocated"] > figures["before"]["allocated"]
        assert told["gate"] == ("failed" if worse else "passed")
        assert told["grown"]


def test_records_of_a_pair_are_found_by_card(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "profiles_dir", lambda: tmp_path)
    folder = tmp_path / "calibrations/h100-sxm-80gb/versions"
    folder.mkdir(parents=True)
    record = json.loads(RUN.read_text())
    (pair,) = script.read_pairs(["falcon-qlora-fused-linear"])
    assert script.measured(pair) == {}
    for side, version in (("before", "5.4.0"), ("after", "5.5.0")):
        record["versions"]["transformers"] = version
        (folder / f"{pair.name}-{side}.json").write_text(json.dumps(record))
    found = script.measured(pair)["h100-sxm-80gb"]
    peak = record["peak_allocated_bytes"]
    assert [found[side].figures["allocated"] for side in ("before", "after")] == [peak, peak]

    shutil.copy(RUN, folder / f"{pair.name}-after.json")
    with pytest.raises(RecordError, match=r"was measured with transformers 5\.17\.0, not 5\.5\.0"):
        script.measured(pair)
