"""What is to be run: names, sweeps, the matrix, and which record is whose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import SHARED, record_of, spec_of
from hypothesis import given
from hypothesis import strategies as st

from vramplan.errors import RecordError, UsageError
from vramplan.job import Job, recorded_job
from vramplan.measure import sweep
from vramplan.measure.spec import RunSpec, expand, read_matrix, repeated, run_name
from vramplan.measure.sweep import Work, exit_code, finished, unused_name
from vramplan.record import write_record
from vramplan.units import GIB, MIB

EXPANDABLE = "expandable_segments:True"

# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "job", "extra", "name"),
    [
        ("gpt-j-6b", Job(), {}, "gpt-j-6b-qlora-1x1024"),
        ("me/My-Model", Job(batch_size=4, seq_len=64), {}, "my-model-qlora-4x64"),
        ("./folder/", Job(method="full"), {}, "folder-full-1x1024"),
        (".", Job(method="full"), {}, "model-full-1x1024"),
        ("m", Job(lora_r=64, optim="adamw_8bit"), {}, "m-qlora-1x1024-adamw-8bit-r64"),
        ("m", Job(gradient_checkpointing=False), {}, "m-qlora-1x1024-no-checkpointing"),
        ("m", Job(mixed_precision="no"), {}, "m-qlora-1x1024-autocast-no"),
        (
            "m",
            Job(target_modules=("q_proj", "v_proj")),
            {},
            "m-qlora-1x1024-targets-q-proj+v-proj",
        ),
        (
            "m",
            Job(alloc_conf="expandable_segments:True,max_split_size_mb:64"),
            {},
            "m-qlora-1x1024-expandable-segments-true-max-split-size-mb-64",
        ),
        ("m", Job(), {"limit_bytes": 12 * GIB}, "m-qlora-1x1024-limit12288"),
        ("m", Job(), {"emulated_gpu": "t4-16gb", "limit_bytes": None}, "m-qlora-1x1024-as-t4-16gb"),
        ("m", Job(), {"save": True, "paging": False, "cpu": True}, "m-qlora-1x1024-save-cpu"),
    ],
)
def test_run_names(model: str, job: Job, extra: dict[str, Any], name: str) -> None:
    assert run_name(model, job, **extra) == name


@given(st.text(max_size=300), st.sampled_from(["full", "lora", "qlora"]))
def test_run_names_are_file_names(model: str, method: str) -> None:
    name = run_name(model, Job(method=method))
    assert name and len(name) <= 120 and not name.startswith("-")
    assert name.isascii() and not set(name) & set("/\\ :*?\"'<>|\x00\n")


def test_run_names_are_not_hidden_files() -> None:
    assert not run_name("_.model", Job()).startswith(".")


# -- sweeps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "combinations"),
    [
        ({}, [{}]),
        ({"a": 1}, [{"a": 1}]),
        (
            {"a": [1, 2], "b": "x", "c": [3, 4]},
            [
                {"a": 1, "b": "x", "c": 3},
                {"a": 1, "b": "x", "c": 4},
                {"a": 2, "b": "x", "c": 3},
                {"a": 2, "b": "x", "c": 4},
            ],
        ),
        ({"target_modules": ["q", "v"]}, [{"target_modules": ["q", "v"]}]),
        ({"modules_to_save": [], "a": [1]}, [{"modules_to_save": [], "a": 1}]),
    ],
)
def test_expand(values: dict[str, Any], combinations: list[dict[str, Any]]) -> None:
    assert expand(values) == combinations


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UsageError, match="seq_len is an empty list"):
        expand({"batch_size": 1, "seq_len": []})


def test_repeats_are_numbered() -> None:
    spec = spec_of(name="x")
    assert [one.name for one in repeated([spec], 3)] == ["x-repeat1", "x-repeat2", "x-repeat3"]
    assert repeated([spec], 1) == [spec]
    with pytest.raises(UsageError, match="--repeat"):
        repeated([spec], 0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_steps": 1}, "--steps"),
        ({"num_steps": 10**6}, "--steps"),
        ({"eval_batch_size": 0}, "--eval-batch-size"),
        ({"timeout_s": 0.0}, "--timeout"),
        ({"timeout_s": -1.0}, "--timeout"),
        ({"timeout_s": float("nan")}, "--timeout"),
        ({"limit_bytes": 12}, "12GiB"),
        ({"paging": True, "history": True}, "--history"),
    ],
)
def test_impossible_runs_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(SHARED, **values)


def test_a_spec_survives_the_way_to_the_worker() -> None:
    spec = spec_of(target_modules=["dense"], limit_bytes=GIB, save=True, timeout_s=5.0)
    assert RunSpec.from_document(json.loads(json.dumps(spec.document()))) == spec


# -- the matrix ------------------------------------------------------------------------------------


def matrix(folder: Path, text: str, shared: RunSpec = SHARED) -> list[Any]:
    path = folder / "runs.toml"
    path.write_text(text)
    return read_matrix(path, shared)


def test_a_matrix(tmp_path: Path) -> None:
    rows = matrix(
        tmp_path,
        """
        [[run]]
        model = "pythia-160m"
        method = ["full", "lora"]
        seq_len = [64, 128]

        [[run]]
        name = "mine"
        model = "pythia-70m"
        target_modules = ["dense", "query_key_value"]
        steps = 3
        limit = "2GiB"
        find_limit = true
        repeat = 2
        skip = false

        [[run]]
        model = "pythia-70m"
        as_gpu = "t4-16gb"
        save = true
        eval_batch_size = 2
        """,
        replace(SHARED, num_steps=9, history=False, device="cpu"),
    )
    assert [spec.name for row in rows for spec in row.specs] == [
        "pythia-160m-full-1x64-cpu",
        "pythia-160m-full-1x128-cpu",
        "pythia-160m-lora-1x64-cpu",
        "pythia-160m-lora-1x128-cpu",
        "mine-repeat1",
        "mine-repeat2",
        "pythia-70m-qlora-1x1024-as-t4-16gb-save-cpu",
    ]
    first, second, third = rows
    assert all(spec.num_steps == 9 for spec in (*first.specs, *third.specs))
    assert (first.find_limit, first.skip) == (False, True)
    mine = second.specs[0]
    assert (mine.num_steps, mine.limit_bytes) == (3, 2 * GIB)
    assert mine.job.target_modules == ("dense", "query_key_value")
    assert (second.find_limit, second.skip) == (True, False)
    assert (third.specs[0].emulated_gpu, third.specs[0].save, third.specs[0].eval_batch_size) == (
        "t4-16gb", True, 2,
    )  # fmt: skip


MODEL = "[[run]]\nmodel = 'pythia-70m'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"no \[\[run\]\]"),
        ("[run]\nmodel = 'pythia-70m'", r"no \[\[run\]\]"),
        ("[[runs]]\nmodel = 'pythia-70m'", r"no \[\[run\]\]"),
        ("[[run]\n", "cannot be read"),
        ("[[run]]\nmethod = 'full'", "run 1: model is missing"),
        ("[[run]]\nmodel = 7", "run 1: model is missing"),
        ("[[run]]\nmodel = 'pythia-70'", "run 1: unknown model"),
        (MODEL + "batchsize = 4", "run 1: unknown key 'batchsize'"),
        (MODEL + "batch_size = []", "run 1: batch_size is an empty"),
        (MODEL + "batch_size = ['two']", "run 1: --batch-size"),
        (MODEL + "steps = 1", "run 1: --steps"),
        (MODEL + "limit = 'lots'", r"run 1: .*12GiB"),
        (MODEL + MODEL, "two runs are called"),
        (MODEL + "batch_size = [2, 2]", "two runs are called"),
        ("run = [1]", "run 1"),
        (MODEL + "repeat = '2'", "repeat"),
        (MODEL + "repeat = 2.5", "repeat"),
        (MODEL + "steps = 2.5", "steps"),
        (MODEL + "name = 5", "name"),
        (MODEL + "as_gpu = 3", "as_gpu"),
        (MODEL + "save = 'no'", "save"),
        (MODEL + "find_limit = 'false'", "find_limit"),
        (MODEL + "name = '../up'", "name"),
        (MODEL + "repeat = 0", "repeat"),
        (MODEL + "limit = '2GiB'\nas_gpu = 't4'", "limit"),
    ],
)
def test_a_matrix_with_a_mistake_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        matrix(tmp_path, text)
    assert "runs.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_matrix_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read"):
        read_matrix(tmp_path / "none.toml", SHARED)


# -- which record is whose -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"name": "otherwise"}, True),
        ({"timeout_s": 5.0}, True),
        ({"model": "called differently"}, True),
        ({"eval_batch_size": 3}, True),  # there is no evaluation
        ({"num_steps": 7}, False),
        ({"device": "cpu"}, False),
        ({"limit_bytes": GIB}, False),
        ({"weights": "/some/checkpoint"}, False),
        ({"evaluate": True}, False),
        ({"history": True}, False),
        ({"job": Job(lora_r=8, target_modules=("dense",))}, False),
        ({"job": Job(target_modules=("dense",), optim="paged_adamw_8bit")}, True),  # the default
        ({"config": {"model_type": "llama"}}, False),
    ],
)
def test_is_run_of(change: dict[str, Any], same: bool) -> None:
    spec = spec_of(target_modules=["dense"])
    assert replace(spec, **change).is_run_of(record_of(spec)) is same


def test_records_without_allocator_settings_are_still_runs_of_theirs() -> None:
    spec = spec_of()
    record = record_of(spec)
    older = record.model_copy(
        update={"job": {k: v for k, v in record.job.items() if k != "alloc_conf"}}
    )
    assert spec.is_run_of(older)
    assert not replace(spec, job=spec.job.but(alloc_conf=EXPANDABLE)).is_run_of(older)
    job = spec.job.but(optim=spec.job.optimizer_name)
    assert recorded_job(older) == job
    under = older.model_copy(update={"allocator_settings": EXPANDABLE})
    assert recorded_job(under) == job.but(alloc_conf=EXPANDABLE)


def test_a_matrix_sweeps_over_allocator_settings(tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text(f'[[run]]\nmodel = "pythia-70m"\nalloc_conf = ["", "{EXPANDABLE}"]\n')
    (row,) = read_matrix(path, SHARED)
    assert [spec.job.alloc_conf for spec in row.specs] == ["", EXPANDABLE]
    assert row.specs[1].name == "pythia-70m-qlora-1x1024-expandable-segments-true"


def test_a_matrix_refuses_wrong_allocator_settings(tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text('[[run]]\nmodel = "pythia-70m"\nalloc_conf = "max_split_size_mb:5"\n')
    with pytest.raises(UsageError, match="run 1: --alloc-conf max_split_size_mb must be at least"):
        read_matrix(path, SHARED)


@pytest.mark.parametrize(
    ("status", "again"),
    [
        ("done", False), ("oom", False), ("skipped", False),
        ("error", True), ("killed", True), ("timeout", True),
    ],
)  # fmt: skip
def test_what_did_not_end_is_tried_again(tmp_path: Path, status: str, again: bool) -> None:
    work = Work(spec_of())
    assert finished(tmp_path, work) is None
    record = record_of(work.spec, status)
    write_record(sweep.record_path(tmp_path, work.spec.name), record)
    assert finished(tmp_path, work) == (None if again else record)


def test_another_runs_record_is_not_taken(tmp_path: Path) -> None:
    spec = spec_of()
    write_record(sweep.record_path(tmp_path, spec.name), record_of(spec))
    for other in (Work(replace(spec, num_steps=9)), Work(spec, find_limit=True)):
        with pytest.raises(RecordError, match="another run"):
            finished(tmp_path, other)


def test_a_limit_that_was_looked_for_is_found_again(tmp_path: Path) -> None:
    spec = spec_of()
    search = {"smallest_running_bytes": GIB, "resolution_bytes": MIB}
    record = record_of(replace(spec, limit_bytes=GIB), limit_search=search)
    write_record(sweep.record_path(tmp_path, spec.name), record)
    assert finished(tmp_path, Work(spec, find_limit=True)) == record
    with pytest.raises(RecordError, match="another run"):
        finished(tmp_path, Work(spec))


def test_unused_names(tmp_path: Path) -> None:
    assert unused_name(tmp_path, "x") == "x"
    for taken, following in (("x", "x-2"), ("x-2", "x-3")):
        (tmp_path / f"{taken}.json").write_text("")
        assert unused_name(tmp_path, "x") == following


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([], 0),
        (["done", "skipped"], 0),
        (["done", "oom"], 1),
        (["oom", "error"], 2),
        (["killed"], 2),
        (["done", "timeout"], 2),
    ],
)
def test_exit_codes(statuses: list[str], code: int) -> None:
    assert exit_code(record_of(spec_of(), status) for status in statuses) == code
