"""Baselines of predictions: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import EnvironmentProblem, RecordError
from vramplan.job import Job
from vramplan.predicted import (
    MAX_BYTES,
    Planned,
    Predicted,
    conditions,
    read_predictions,
    where,
    write_predictions,
)
from vramplan.regression import Measurement

VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.17.0"}
HELD = {
    ("weights", "lm_head"): 8192,
    **{("weights", f"model.layers.{n}.mlp"): 1024 for n in (0, 1, 2, 4)},
    ("weights", "model.layers.3.mlp"): 2048,
    **{("adapters", f"model.layers.{n}.experts.{e}.w1"): 512 for n in (0, 1) for e in (0, 1)},
}


def prediction(name: str = "tiny", **changes: Any) -> Predicted:
    planned = Planned(
        name, "./model", {"model_type": "llama"}, Job(method="lora"), "t4-16gb", 2**30
    )
    told = {
        "figures": {"ready": 9216, "allocated": 12288},
        "phases": {"forward": 12288},
        "ready": HELD,
        "left": {("batch", "batch"): 512},
        "moments": {"forward": HELD},
    }
    measurement = Measurement(
        name, where=where(planned), versions=conditions(planned, VERSIONS), **told | changes
    )
    return Predicted(planned, measurement, {"ready": 9216})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = [
        prediction(),
        prediction("oom", failed="out of memory: it needs 2.00 GiB of 1.00 GiB", oom=True),
    ]
    write_predictions(tmp_path / "memory.json", found, VERSIONS)
    assert read_predictions(tmp_path / "memory.json") == found
    assert [p.name for p in tmp_path.iterdir()] == ["memory.json"]


def test_equal_layers_are_one_row(tmp_path: Path) -> None:
    write_predictions(tmp_path / "memory.json", [prediction()], VERSIONS)
    (entry,) = json.loads((tmp_path / "memory.json").read_text())["predictions"]
    assert entry["held"]["ready"] == [
        "8192 weights lm_head",
        "1024 weights model.layers.*.mlp 0-2,4",
        "2048 weights model.layers.*.mlp 3",
        "512 adapters model.layers.*.experts.0.w1 0-1",
        "512 adapters model.layers.*.experts.1.w1 0-1",
    ]


def test_conditions_are_told_but_do_not_forbid() -> None:
    planned = prediction().planned
    card = {"card": "t4-16gb", "limit": "as t4-16gb", "allocator": "default"}
    assert where(planned) == card
    assert where(replace(planned, gpu=None))["limit"] == "1.00 GiB"
    told = conditions(planned, VERSIONS)
    assert told["transformers"] == "5.17.0"
    assert told["config.model_type"] == "llama"
    assert (told["job.method"], told["job.lora_r"], told["job.optim"]) == ("lora", "16", "null")


# -- files of others -------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def entry(**changes: Any) -> Change:
    return lambda document: document["predictions"][0].update(changes)


def row(text: Any) -> Change:
    return entry(held={"ready": [text]})


def top(**changes: Any) -> Change:
    return lambda document: document.update(changes)


HOSTILE: dict[str, tuple[Change, str]] = {
    "newer": (
        top(schema_version=2),
        "schema_version 2 is of a newer vramplan (this one reads up to 1, update it)",
    ),
    "no version": (top(schema_version="1"), "schema_version is missing"),
    "true version": (top(schema_version=True), "schema_version is missing"),
    "no predictions": (top(predictions=[]), "it has no predictions"),
    "an object": (top(predictions={}), "it has no predictions"),
    "a number": (top(predictions=[7]), "prediction 1 is not an object"),
    "twice": (
        lambda document: document["predictions"].append(document["predictions"][0]),
        "two predictions are called 'tiny'",
    ),
    "versions": (top(versions={"torch": 2}), "torch of versions is not a text"),
    "nameless": (entry(name=""), "name of prediction 1 is not a text"),
    "listed name": (entry(name=["a"]), "name of prediction 1 is not a text"),
    "job": (entry(job=[]), "job of tiny is not an object"),
    "method": (entry(job={"method": "lor"}), "unknown value for --method 'lor'"),
    "text batch": (entry(job={"batch_size": "2"}), "--batch-size must be a whole number"),
    "config": (entry(config="llama"), "config of tiny is not an object"),
    "gpu": (entry(gpu=3), "gpu of tiny is not a text"),
    "limit": (entry(limit_bytes=1.5), "limit_bytes of tiny is not a number of bytes"),
    "negative": (entry(figures={"ready": -1}), "ready of figures of tiny is not a number of bytes"),
    "infinite": (entry(figures={"ready": 1e999}), "ready of figures of tiny is not a number"),
    "boolean": (entry(figures={"ready": True}), "ready of figures of tiny is not a number"),
    "absurd": (entry(figures={"ready": 2**61}), "ready of figures of tiny is not a number"),
    "no figure": (entry(figures={"vram": 1}), "figures of tiny: there is no 'vram'"),
    "no phase": (entry(phases={"lunch": 1}), "phases of tiny: there is no 'lunch'"),
    "estimate": (entry(estimate=[1]), "estimate of tiny is not an object"),
    "failed": (entry(failed=None), "failed of tiny is not a text"),
    "held": (entry(held=[]), "held of tiny is not an object"),
    "rows": (entry(held={"ready": "x"}), "held, ready of tiny, is not a list"),
    "row": (row("1 weights"), "held, ready of tiny: '1 weights' is not a row of ours"),
    "kind": (row("1 money lm_head"), "'1 money lm_head' is not a row of ours"),
    "no text": (row(1), "a row of held, ready of tiny, is not a text"),
    "layers": (row("1 weights a.*.b 0-"), "is not a row of ours"),
    "digits": (row("9999999999999999999 weights a"), "is not a number of bytes"),
    "long": (row("1 weights " + "a" * 100_000), "is not a row of ours"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_we_would_not_write_is_refused(case: str, tmp_path: Path) -> None:
    change, said = HOSTILE[case]
    path = tmp_path / "memory.json"
    write_predictions(path, [prediction()], VERSIONS)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError) as error:
        read_predictions(path)
    message = str(error.value)
    assert message.startswith(f"{path} is no baseline of predictions: ")
    assert said in message
    assert message.endswith("; make it again with --update")
    assert len(message) < 1000


def test_many_layers_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    write_predictions(path, [prediction()], VERSIONS)
    document = json.loads(path.read_text())
    rows = [f"1 weights model.layers.*.a{n} 0-99999" for n in range(1000)]
    document["predictions"][0]["held"] = {"ready": rows}
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match="more modules than any model has"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no JSON"),
        (b'{"schema_version": 1, "predictions": [{"na', "is no JSON"),
        (b"\xff\xfe\x00\x00", "is no JSON"),
        (b"[" * 200_000, "is no JSON"),
        (b"[]", "is no baseline of predictions: the file is not an object"),
        (b" " * (MAX_BYTES + 1), "is larger than any file of predictions"),
    ],
)
def test_broken_files_are_one_line(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    path.write_bytes(data)
    with pytest.raises(RecordError) as error:
        read_predictions(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        read_predictions(tmp_path / "memory.json")
    with pytest.raises(RecordError, match="cannot be read: Is a directory"):
        read_predictions(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        write_predictions(tmp_path / "file" / "memory.json", [prediction()], VERSIONS)
