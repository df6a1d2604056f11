"""``vramplan measure`` in this process, with a harness that runs nothing."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from fakes import FakeHarness, record_of, spec_of

from vramplan.cli import main
from vramplan.record import read_record, write_record
from vramplan.units import MIB

TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROW = "[[run]]\nmodel = 'pythia-70m'\n"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Measure = Callable[..., Done]


@pytest.fixture
def harness() -> FakeHarness:
    return FakeHarness()


@pytest.fixture
def measure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    harness: FakeHarness,
) -> Measure:
    """Runs the command as a shell would, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gc.disable", lambda: None)
    import vramplan.cli.measure as command

    monkeypatch.setattr(command, "Harness", lambda *_, **__: harness)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["vramplan", "measure", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Done(int(end.value.code or 0), printed.out, printed.err)

    return call


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(done: Done, words: str) -> None:
    """Exit code 2, and one line that says what to do."""
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert words in done.err
    assert "in a way it should not" not in done.err


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--matrix"),
        (("gpt-j-6b", "--matrix", "runs.toml"), "one of the two"),
        (("gpt-j-6b", "--device", "tpu"), "--device"),
        (("gpt-j-6b", "--steps", "1"), "--steps"),
        (("gpt-j-6b", "--explain"), "--history"),
        (("gpt-j-6b", "--limit", "8GiB", "--as-gpu", "3060"), "--as-gpu"),
        (("gpt-j-6b", "--limit", "lots"), "12GiB"),
        (("gpt-j-6b", "--limit", "12"), "12GiB"),
        (("gpt-j-6b", "--as-gpu", "rtx-3061-12gb"), "did you mean"),
        (("gpt-j-6b", "--find-limit", "--resolution", "0"), "size"),
        (("gpt-j-6b", "--eval", "--eval-batch-size", "0"), "--eval-batch-size"),
        (("gpt-j-6b", "--timeout", "0"), "--timeout"),
        (("gpt-j-6b", "--repeat", "0"), "--repeat"),
        (("gpt-j-6b", "--paging", "--history"), "--history"),
        (("gpt-j-6b", "--seq-len", ","), "empty"),
        (("gpt-j-6b", "--batch-size", "1,two"), "--batch-size"),
        (("gpt-j-6b", "--method", "full,prefix"), "--method"),
        (("gpt-j-6b", "--optim", "adamw8bit"), "adamw_8bit"),
        (("gpt-j-6b", "--seq-len", "512,4096"), "positions"),
        (("gptj-6b",), "did you mean"),
        (("gpt-j-6b", "--weights", "."), "safetensors"),
        (("gpt-j-6b", "--weights", "nowhere"), "safetensors"),
        (("--matrix", "nowhere.toml"), "nowhere.toml"),
        (("--matrix", "empty.toml"), "no [[run]] tables"),
        (("--matrix", "unknown.toml"), "unknown key 'batchsize'"),
        (("--matrix", "runs.toml", "--batch-size", "4"), "--matrix"),
        (("--matrix", "runs.toml", "--as-gpu", "t4"), "--matrix"),
        (("--matrix", "runs.toml", "--find-limit"), "--matrix"),
        (("--matrix", "runs.toml", "--repeat", "2"), "--matrix"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant_is_refused(
    measure: Measure,
    harness: FakeHarness,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    (tmp_path / "runs.toml").write_text(ROW)
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "unknown.toml").write_text(ROW + "batchsize = 4")
    before = left_in(tmp_path)
    refused(measure(*arguments), words)
    assert harness.runs == [] and left_in(tmp_path) == before


def test_a_job_that_no_model_can_have_is_refused_before_anything_runs(
    measure: Measure, harness: FakeHarness, tmp_path: Path
) -> None:
    (tmp_path / "runs.toml").write_text(ROW + ROW + "target_modules = ['no_such_layer']")
    refused(measure("--matrix", "runs.toml", "--json"), "no_such_layer")
    assert harness.runs == []


def test_weights_of_another_model_are_refused(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"")
    (tmp_path / "weights" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 9}))
    refused(measure(".", "--weights", "weights"), "weights")


# -- records ---------------------------------------------------------------------------------------


def test_a_single_run_never_overwrites(
    measure: Measure, harness: FakeHarness, tmp_path: Path
) -> None:
    for _ in range(2):
        assert measure("pythia-70m", "-o", "out").code == 0
    names = ["pythia-70m-qlora-1x1024.json", "pythia-70m-qlora-1x1024-2.json"]
    assert left_in(tmp_path / "out") == sorted(names)
    (tmp_path / "out" / names[0]).write_text("{")  # not even what cannot be read
    measure("pythia-70m", "-o", "out")
    assert (tmp_path / "out" / names[0]).read_text() == "{"
    measure("pythia-70m", "-o", "out", "--force")
    assert read_record(tmp_path / "out" / names[0]).status == "done"
    assert len(harness.runs) == 4


def test_a_sweep_is_resumed(measure: Measure, harness: FakeHarness, tmp_path: Path) -> None:
    arguments = ("pythia-70m", "--method", "full,lora", "--seq-len", "64,128", "-o", "out")
    names = [f"pythia-70m-{method}-1x{n}" for method in ("full", "lora") for n in (64, 128)]
    assert measure(*arguments).code == 0 and harness.runs == names

    harness.runs.clear()
    again = measure(*arguments)
    assert (again.code, harness.runs) == (0, []) and "4 of 4 are there already" in again.err

    (tmp_path / "out" / f"{names[1]}.json").unlink()
    for name, status in ((names[2], "killed"), (names[3], "oom")):
        spec = spec_of("pythia-70m", method="lora", seq_len=int(name.rpartition("x")[2]))
        write_record(tmp_path / "out" / f"{name}.json", record_of(spec, status))
    again = measure(*arguments)
    assert harness.runs == names[1:3] and "2 of 4 are there already" in again.err
    assert again.code == 1  # the one that ran out of memory is an answer
    assert [line.split()[:2] for line in again.out.splitlines()[1:]] == [
        [name, status] for name, status in zip(names, ("done", "done", "done", "oom"), strict=True)
    ]


def test_force_measures_all_again(measure: Measure, harness: FakeHarness) -> None:
    for _ in range(2):
        measure("pythia-70m", "--seq-len", "64,128", "--force")
    assert len(harness.runs) == 4


def test_a_matrix_of_one_run_is_resumed(
    measure: Measure, harness: FakeHarness, tmp_path: Path
) -> None:
    (tmp_path / "runs.toml").write_text(ROW)
    for _ in range(2):
        measure("--matrix", "runs.toml")
    assert len(harness.runs) == 1


@pytest.mark.parametrize("content", ["{", "", '{"schema_version": 9}'])
def test_a_corrupt_record_stops_a_sweep(
    measure: Measure, harness: FakeHarness, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "out" / "pythia-70m-full-1x128.json"
    path.parent.mkdir()
    path.write_text(content)
    arguments = ("pythia-70m", "--method", "full", "--seq-len", "64,128", "-o", "out")
    refused(measure(*arguments), str(path.relative_to(tmp_path)))
    assert harness.runs == [] and path.read_text() == content
    assert measure(*arguments, "--force").code == 0
    assert read_record(path).status == "done"


def test_another_runs_record_stops_a_sweep(
    measure: Measure, harness: FakeHarness, tmp_path: Path
) -> None:
    arguments = ("pythia-70m", "--method", "full", "--seq-len", "64,128", "-o", "out")
    measure(*arguments)
    path = tmp_path / "out" / "pythia-70m-full-1x64.json"
    before = path.read_bytes()
    harness.runs.clear()
    refused(measure(*arguments, "--steps", "9"), "--force")
    assert harness.runs == [] and path.read_bytes() == before
    measure(*arguments, "--steps", "9", "--force")
    assert read_record(path).run.num_steps == 9


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch-size", "1,1"),
        ("--target-modules", ",".join(["dense"] * 30), "--quant-type", "nf4,fp4"),
    ],
    ids=["twice", "a name cut off"],
)
def test_two_runs_of_one_name_are_refused(
    measure: Measure, harness: FakeHarness, arguments: tuple[str, ...]
) -> None:
    refused(measure("pythia-70m", *arguments), "name")


def test_emulated_cards_are_in_the_name(measure: Measure, harness: FakeHarness) -> None:
    for gpu in ("t4-16gb", "rtx-3090-24gb"):
        measure("pythia-70m", "--as-gpu", gpu)
    assert ["t4-16gb" in harness.runs[0], "rtx-3090-24gb" in harness.runs[1]] == [True, True]


# -- what is in the way ----------------------------------------------------------------------------


def test_a_file_in_place_of_the_folder(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(measure("pythia-70m", "-o", "out"), "cannot make out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_is_seen_before(
    measure: Measure, harness: FakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=MIB))
    refused(measure("pythia-70m"), "has 1.0 MiB free")
    assert harness.runs == []


def test_what_a_killed_call_left_half_written_goes(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".some-run.json.4242").write_text('{"half')
    measure("pythia-70m", "-o", "out")
    assert left_in(tmp_path / "out") == ["pythia-70m-qlora-1x1024.json"]


# -- what is shown ---------------------------------------------------------------------------------


OOM = {"phase": "loss", "requested_bytes": 3 * MIB, "module": "lm_head", "where": "a.py:7:f"}


@pytest.mark.parametrize(
    ("status", "more", "code", "told", "first"),
    [
        ("done", {}, 0, ": done", "It ran on the CPU."),
        (
            "oom",
            {"oom": OOM},
            1,
            ": out of memory in loss",
            "Out of memory on the CPU: in loss asking for 3.0 MiB in lm_head (a.py:7:f).",
        ),
        (
            "timeout",
            {"phase": "load", "error": "killed after 5 s, in load"},
            2,
            ": timeout: killed after 5 s, in load",
            "Timeout on the CPU, in load.",
        ),
        (
            "error",
            {"phase": "prepare", "error": "Traceback\n  File\nValueError: no [bold] layer"},
            2,
            ": error: ValueError: no [bold] layer",
            "Error on the CPU, in prepare.",
        ),
    ],
    ids=lambda value: value if value in ("done", "oom", "timeout", "error") else "",
)
def test_every_ending_is_told(
    measure: Measure,
    harness: FakeHarness,
    status: str,
    more: dict[str, Any],
    code: int,
    told: str,
    first: str,
) -> None:
    harness.status, harness.more = status, more
    done = measure("pythia-70m", "--device", "cpu")
    assert (done.code, done.out.splitlines()[0]) == (code, first)
    name = "pythia-70m-qlora-1x1024-cpu"
    assert done.err.splitlines() == [f"{name}{told}", f"record: vramplan-records/{name}.json"]


def test_json_is_one_document(measure: Measure) -> None:
    done = measure("pythia-70m", "--seq-len", "64,128", "--json")
    document = json.loads(done.out)
    assert document["schema_version"] == 1
    assert [record["job"]["seq_len"] for record in document["records"]] == [64, 128]
    figures = document["comparisons"][0]["figures"]
    assert figures["ready"]["measured_bytes"] is None and figures["ready"]["error"] is None
    assert figures["ready"]["predicted_bytes"] > 0


def test_explain_without_a_gpu_has_nothing_to_compare(
    measure: Measure, harness: FakeHarness
) -> None:
    empty = {
        "schema_version": 1, "kinds": [], "phases": [], "owners": [],
        "sections": [{"repeats": 1, "events": []}],
    }  # fmt: skip
    harness.timeline = gzip.compress(json.dumps(empty).encode())
    done = measure("pythia-70m", "--device", "cpu", "--history", "--explain")
    assert "-1 B" not in done.out and " 0 B" not in done.out


def test_a_gpu_run_is_compared_figure_by_figure(measure: Measure, harness: FakeHarness) -> None:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "slug": "h100-sxm-80gb"}
    harness.more = {"gpu": gpu, "ready_bytes": 2**30, "peak_reserved_bytes": None}
    rows = {line[:14].strip(): line for line in measure("pythia-70m").out.splitlines()}
    assert "1.00 GiB" in rows["ready"] and "%" in rows["ready"]
    assert "not measured" in rows["peak reserved"] and "%" not in rows["peak reserved"]
