"""``vramplan measure`` for real, on the CPU: what every ending leaves behind (GPU fields are null).

A measuring process takes seconds to start, so the runs of a test share one where they can.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vramplan.evidence import read_timeline
from vramplan.measure.machine import locked
from vramplan.record import Record, read_record

TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEADLINE_S = 120.0
LONG = 10_000  # steps: many minutes
PLAIN = {"seq_len": 16, "steps": 3, "optim": "adamw_torch"}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "batch_size": 2},
    "qlora": {"method": "qlora"},
    "eval-save": {"method": "lora", "evaluate": True, "eval_batch_size": 2, "save": True},
    "history": {"method": "full", "history": True},
    "paging": {"method": "qlora", "paging": True},
    "oom": {
        "method": "full",
        "batch_size": 2048,
        "seq_len": 64,
        "gradient_checkpointing": False,
        "limit": "300MiB",
    },
}


# -- starting and waiting --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json of a model that trains in a blink."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def write_matrix(path: Path, model: Path, runs: dict[str, dict[str, Any]]) -> Path:
    tables = [
        "\n".join(
            f"{key} = {json.dumps(value)}"
            for key, value in ({"name": name, "model": str(model)} | PLAIN | own).items()
        )
        for name, own in runs.items()
    ]
    path.write_text("".join(f"[[run]]\n{table}\n\n" for table in tables))
    return path


class Call:
    """One ``vramplan measure`` under way, with a folder of its own for temporary files."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.out, self.temporary = folder / "out", folder / "tmp"
        self.orphan = 0
        self.temporary.mkdir(parents=True, exist_ok=True)
        if "-o" not in arguments:
            arguments += ("-o", self.out)
        command = [sys.executable, "-m", "vramplan.cli", "measure", *map(str, arguments)]
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "XDG_DATA_HOME": str(folder / "data"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def end(self) -> Call:
        """Wait for its end; then there are ``code``, ``stdout`` and ``stderr``."""
        self.stdout, self.stderr = self.process.communicate(timeout=DEADLINE_S)
        self.code = self.process.returncode
        return self

    def records(self) -> dict[str, Record]:
        return {path.stem: read_record(path) for path in sorted(self.out.glob("*.json"))}

    def left(self) -> list[str]:
        """Temporary folders of ours that are still there."""
        return [path.name for path in self.temporary.glob("vramplan-*") if path.is_dir()]

    @property
    def server(self) -> int:
        """The process that forks workers."""
        return until(lambda: children(self.process.pid), "a measuring process")[0]

    @property
    def worker(self) -> int:
        """The process of the run under way."""
        return until(lambda: children(self.server), "a worker")[0]

    def trains(self, name: str) -> None:
        """Wait until the run of that name has made its first step."""

        def begun() -> bool:
            for spec in self.temporary.glob("vramplan-*/run-*/spec.json"):
                with contextlib.suppress(OSError, ValueError):  # not yet, or no longer
                    record = json.loads(spec.with_name("record.json").read_text())
                    return record["name"] == name and record["phase"] == "step"
            assert self.process.poll() is None, f"it ended: {self.process.communicate()}"
            return False

        until(begun, f"the first step of {name}")


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {DEADLINE_S} s")


def processes() -> dict[int, int]:
    """Every process that runs, with its parent."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def children(pid: int) -> list[int]:
    return sorted(child for child, parent in processes().items() if parent == pid)


def gone(*pids: int) -> bool:
    """Wait until processes are no more."""
    return bool(until(lambda: not processes().keys() & set(pids), f"end of {pids}"))


def with_all(pid: int) -> list[int]:
    """A process and everything it started."""
    return [pid, *(one for child in children(pid) for one in with_all(child))]


@contextlib.contextmanager
def finally_dead(calls: dict[str, Call]) -> Iterator[None]:
    """Whatever happens, none of the calls is left running."""
    try:
        yield
    finally:
        for call in calls.values():
            for pid in reversed(with_all(call.process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            call.process.wait()


# -- runs that end by themselves -------------------------------------------------------------------


@pytest.fixture(scope="module")
def ending(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Call]]:
    """A matrix of runs, and a sweep over a checkpoint, side by side."""
    calls: dict[str, Call] = {}
    folder = tmp_path_factory.mktemp("campaign")
    matrix = write_matrix(folder / "runs.toml", tiny, RUNS)
    with finally_dead(calls):
        calls["campaign"] = Call(folder, "--matrix", matrix, "--device", "cpu")
        folder = tmp_path_factory.mktemp("sweep")
        checkpoint = make_checkpoint(folder / "my-llama")
        calls["sweep"] = Call(
            folder, checkpoint, "--weights", checkpoint, "--device", "cpu", "--method",
            "full,qlora", "--batch-size", "1,2", "--seq-len", "16", "--optim", "adamw_torch",
            "--steps", "2", "--json",
        )  # fmt: skip
        yield calls


def make_checkpoint(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {key: value for key, value in TINY.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def campaign(ending: dict[str, Call]) -> Call:
    return ending["campaign"].end()


def test_every_run_ends_in_its_own_way(campaign: Call) -> None:
    statuses = {name: record.status for name, record in campaign.records().items()}
    assert statuses == dict.fromkeys(RUNS, "done") | {"oom": "oom"}
    assert campaign.code == 1
    assert "Traceback" not in campaign.stderr
    lines = [line.split(":")[0] for line in campaign.stderr.splitlines()]
    assert lines == [*RUNS, "records"]
    assert campaign.left() == []


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_a_record_says_what_it_is(campaign: Call, name: str) -> None:
    record = campaign.records()[name]
    for package in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "python"):
        assert record.versions[package]
    assert record.command is not None and record.command.startswith("vramplan measure --matrix")
    assert record.created
    assert (record.run.device, record.run.num_steps, record.run.weights) == ("cpu", 3, "random")
    assert (record.job["method"], record.job["optim"]) == (name, "adamw_torch")
    assert record.config == TINY
    assert len(record.steps) == 3 and all((step.time_s or 0) > 0 for step in record.steps)
    assert record.step_time_s is not None and record.step_time_s.count == 2
    assert record.step_time_s.median in [
        pytest.approx(sum(step.time_s or 0 for step in record.steps[1:]) / 2)
    ]
    tokens = record.job["batch_size"] * 16
    assert record.tokens_per_s is not None
    assert record.tokens_per_s.maximum == pytest.approx(tokens / record.step_time_s.minimum)
    assert (record.wall_s or 0) > 0 and (record.host_rss_peak_bytes or 0) > 0


def test_the_method_decides_what_is_trained(campaign: Call) -> None:
    found = campaign.records()
    full, lora = found["full"].num_trainable, found["lora"].num_trainable
    assert full is not None and lora is not None and full > lora > 0
    assert found["qlora"].num_trainable == lora


@pytest.mark.parametrize(
    "field",
    [
        "context_bytes", "after_load_bytes", "load_peak_bytes", "ready_bytes",
        "first_step_peak_allocated_bytes", "first_step_peak_reserved_bytes",
        "peak_allocated_bytes", "peak_reserved_bytes", "peak_requested_bytes",
        "reserved_at_end_bytes", "device_used_at_end_bytes", "device_peak_bytes",
        "num_alloc_retries", "num_ooms", "cublas_workspace_bytes", "rates", "sampling",
        "optimizer_bytes", "paged_bytes", "unpaged_bytes",
    ],
)  # fmt: skip
def test_what_no_gpu_showed_is_null(campaign: Call, field: str) -> None:
    for name in ("full", "lora", "qlora", "eval-save"):
        record = campaign.records()[name]
        assert getattr(record, field) is None
        assert all(peak.peak_allocated_bytes is None for peak in record.phases.values())
        assert record.gpu.name is None


def test_evaluation_and_save_are_phases_of_their_own(campaign: Call) -> None:
    found = campaign.records()
    training = {"load", "prepare", "forward", "loss", "backward", "step"}
    assert found["lora"].phases.keys() == training
    assert found["eval-save"].phases.keys() == training | {"evaluate", "save"}
    assert len(found["eval-save"].steps) == 3
    assert found["eval-save"].run.eval_batch_size == 2 and found["lora"].run.eval_batch_size is None


def test_nothing_but_records_is_left(campaign: Call) -> None:
    names = {f"{name}.json" for name in RUNS} | {"history.timeline.json.gz"}
    assert {path.name for path in campaign.out.iterdir()} == names


def test_a_history_reads_back(campaign: Call) -> None:
    timeline = read_timeline(campaign.out / "history.timeline.json.gz")
    assert list(timeline.events()) == []  # the CPU's allocator keeps none


def test_paging_that_cannot_be_counted_is_not_measured(campaign: Call) -> None:
    paging = campaign.records()["paging"].paging
    assert paging is not None and not paging.measured and paging.windows == []
    assert paging.reason is not None and "no GPU" in paging.reason
    assert campaign.records()["full"].paging is None  # nobody asked


def test_out_of_memory_is_a_result(campaign: Call) -> None:
    record = campaign.records()["oom"]
    assert record.run.limit_bytes == 300 * 2**20
    failed = record.oom
    assert failed is not None
    assert failed.phase == record.phase == "forward"
    assert failed.requested_bytes is not None and 2**20 <= failed.requested_bytes < 300 * 2**20
    assert failed.module is not None and failed.module.startswith("model.")
    assert failed.where is not None
    assert re.fullmatch(r"(torch|transformers)/\S+\.py:\d+:\w+", failed.where)
    assert "Traceback" not in (record.error or "")
    assert record.steps == [] and record.step_time_s is None


# -- going on where it stopped ---------------------------------------------------------------------


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files there are, and when they were written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_nothing_is_measured_twice(campaign: Call, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(campaign.out, tmp_path / "out")
    before = files(tmp_path / "out")
    matrix = write_matrix(tmp_path / "runs.toml", tiny, RUNS)
    again = Call(tmp_path, "--matrix", matrix, "--device", "cpu").end()
    assert again.code == 1
    assert again.stderr.splitlines()[0] == f"{len(RUNS)} of {len(RUNS)} are there already"
    assert files(tmp_path / "out") == before
    assert again.stdout == campaign.stdout


def test_only_what_is_missing_is_measured(campaign: Call, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(campaign.out, out)
    (out / "lora.json").unlink()
    for name, status in (("qlora", "killed"), ("full", "error"), ("eval-save", "timeout")):
        path = out / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": status}))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    matrix = write_matrix(tmp_path / "runs.toml", tiny, RUNS)
    again = Call(tmp_path, "--matrix", matrix, "--device", "cpu").end()
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    measured = {"full.json", "lora.json", "qlora.json", "eval-save.json"}
    assert {name for name in after if after[name] != before.get(name)} == measured
    assert {record.status for record in again.records().values()} == {"done", "oom"}
    assert again.stderr.startswith(f"{len(RUNS) - 4} of {len(RUNS)} are there already\n")


# -- a sweep over a real checkpoint ----------------------------------------------------------------


def test_a_sweep_of_a_checkpoint(ending: dict[str, Call]) -> None:
    done = ending["sweep"].end()
    assert done.code == 0, done.stderr
    names = [
        f"my-llama-{method}-{batch}x16-adamw-torch-cpu"
        for method in ("full", "qlora")
        for batch in (1, 2)
    ]
    document = json.loads(done.stdout)
    assert [record["name"] for record in document["records"]] == names
    assert [row["name"] for row in document["comparisons"]] == names
    for name, record in done.records().items():
        assert (record.status, record.run.weights) == ("done", "my-llama")
        assert f"-{record.job['method']}-{record.job['batch_size']}x16-" in name
        assert len(record.steps) == 2


# -- runs that are ended ---------------------------------------------------------------------------

QUICK = {"method": "full", "steps": 2}
ENDLESS = {"method": "full", "steps": LONG}


@pytest.fixture(scope="module")
def doomed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Call]]:
    """Calls that will be ended by force, started together."""
    matrices = {
        "worker": {"quick": QUICK, "first": ENDLESS, "second": ENDLESS, "last": QUICK},
        "parent": {"quick": QUICK, "long": ENDLESS},
        "SIGTERM": {"quick": QUICK, "long": ENDLESS},
        "SIGINT": {"quick": QUICK, "long": ENDLESS},
        "loading": {"quick": QUICK, "long": ENDLESS},
    }
    calls: dict[str, Call] = {}
    with finally_dead(calls):
        for name, runs in matrices.items():
            folder = tmp_path_factory.mktemp(name)
            matrix = write_matrix(folder / "runs.toml", tiny, runs)
            calls[name] = Call(folder, "--matrix", matrix, "--device", "cpu")
        calls["timeout"] = Call(
            tmp_path_factory.mktemp("timeout"), tiny, "--device", "cpu", "--seq-len", "16",
            "--timeout", "0.01",
        )  # fmt: skip
        early = calls["loading"]
        early.orphan = early.server
        early.process.kill()  # while the measuring process still imports
        yield calls


def test_a_parent_killed_early_leaves_nothing(doomed: dict[str, Call]) -> None:
    call = doomed["loading"]
    assert gone(call.orphan)
    assert call.left() == []


def test_a_run_that_takes_too_long_is_ended(doomed: dict[str, Call]) -> None:
    call = doomed["timeout"].end()
    (record,) = call.records().values()
    assert (call.code, record.status) == (2, "timeout")
    assert (record.error or "").startswith("killed after 0.01 s, in ")
    assert call.stdout.startswith("Timeout on the CPU")
    assert "Traceback" not in call.stderr and call.left() == []


def test_a_killed_parent_takes_all_with_it(
    doomed: dict[str, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = doomed["parent"]
    call.trains("long")
    server, worker = call.server, call.worker
    call.process.kill()
    assert gone(server, worker)
    assert call.left() == []
    assert {name: record.status for name, record in call.records().items()} == {"quick": "done"}
    monkeypatch.setattr("tempfile.tempdir", str(call.temporary))
    with locked("cpu"):  # and its lock is free
        pass


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_being_stopped_keeps_what_is_finished(
    doomed: dict[str, Call], name: str, code: int
) -> None:
    call = doomed[name]
    call.trains("long")
    server, worker = call.server, call.worker
    if name == "SIGINT":  # a terminal sends it to all that it can
        os.killpg(call.process.pid, signal.SIGINT)
    else:
        call.process.terminate()
    call.end()
    assert call.code == code
    assert "Traceback" not in call.stderr and call.stdout == ""
    assert gone(server, worker)
    assert call.left() == []
    assert {name: record.status for name, record in call.records().items()} == {"quick": "done"}


def test_a_killed_worker_or_server_costs_one_run(doomed: dict[str, Call]) -> None:
    call = doomed["worker"]
    call.trains("first")
    os.kill(call.worker, signal.SIGKILL)
    call.trains("second")
    server, worker = call.server, call.worker
    os.kill(server, signal.SIGKILL)
    assert gone(server, worker)
    call.end()
    found = call.records()
    assert {name: record.status for name, record in found.items()} == {
        "quick": "done", "first": "killed", "second": "killed", "last": "done",
    }  # fmt: skip
    assert call.code == 2
    assert "SIGKILL" in (found["first"].error or "")
    assert "measuring process ended" in (found["second"].error or "")
    for name in ("first", "second"):
        assert found[name].phase == "step" and found[name].versions["torch"]  # what was kept
    assert call.left() == []


# -- what is in the way ----------------------------------------------------------------------------


def refused(call: Call, words: str) -> None:
    call.end()
    assert (call.code, call.stdout) == (2, "")
    assert call.stderr.count("\n") == 1 and words in call.stderr
    assert call.left() == []


def test_two_at_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with locked("cpu"):
        refused(Call(tmp_path, tiny, "--device", "cpu"), "another vramplan measures")


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is a GPU here")
def test_no_gpu(tiny: Path, tmp_path: Path) -> None:
    refused(Call(tmp_path, tiny), "--device cpu")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the least that the command asks for, and little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=17m", "tmpfs", str(folder)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root can mount a file system here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up(tiny: Path, tmp_path: Path, small_disk: Path) -> None:
    out = small_disk / "records"
    call = Call(tmp_path, tiny, "--device", "cpu", "--seq-len", "16", "-o", out)
    assert call.server  # it had seen enough room
    with (small_disk / "others").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    refused(call, "No space left on device")
    assert list(out.iterdir()) == []
