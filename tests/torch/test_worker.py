"""The measuring worker for real, on the CPU: orchestration and records (GPU fields are null)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RUNS = """
[[run]]
name = "full"
model = "MODEL"
method = "full"
batch_size = 2
seq_len = 16
optim = "adamw_torch"

[[run]]
name = "qlora"
model = "MODEL"
method = "qlora"
seq_len = 16
optim = "adamw_torch"

[[run]]
name = "broken"
model = "MODEL"
method = "lora"
seq_len = 16
optim = "adamw_torch"
target_modules = ["no_such_layer"]
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "runs.toml").write_text(RUNS.replace("MODEL", str(folder)))
    command = [sys.executable, "-m", "vramplan.measure.batch"]
    arguments = [str(folder / "runs.toml"), str(folder / "out")]
    first = subprocess.run(command + arguments, capture_output=True, text=True, check=True)
    again = subprocess.run(command + arguments, capture_output=True, text=True, check=True)
    found = {p.stem: json.loads(p.read_text()) for p in (folder / "out").glob("*.json")}
    return found, first.stdout, again.stdout


def test_every_end_is_a_record(records) -> None:
    found, printed, _ = records
    assert {name: record["status"] for name, record in found.items()} == {
        "full": "done",
        "qlora": "done",
        "broken": "error",
    }
    assert "no_such_layer" in found["broken"]["error"]
    assert "full: done" in printed


def test_records_say_what_they_are(records) -> None:
    record = records[0]["full"]
    assert record["schema_version"] == 1
    assert record["versions"]["transformers"] and record["versions"]["torch"]
    assert record["gpu"]["name"] is None and record["peak_allocated_bytes"] is None
    assert len(record["steps"]) == 3 and all(step["time_s"] > 0 for step in record["steps"])


def test_finished_runs_are_not_repeated(records) -> None:
    assert records[2] == ""
