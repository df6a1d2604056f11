"""Calibration: records become constants with their residuals, and answers say whose they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vramplan.calibrate import confidence, find_records, fit_profiles, write_profile
from vramplan.errors import RecordError, UsageError
from vramplan.profile import (
    BORROWED_DOUBT_BYTES,
    REFERENCE_GPU,
    own_profile,
    profile_for,
    read_profile,
)
from vramplan.record import Record, parse_record, write_record
from vramplan.resources import user_calibrations_dir
from vramplan.units import MIB

RTX = {
    "name": "NVIDIA GeForce RTX 3060",
    "slug": "rtx-3060-12gb",
    "driver": "570.1",
    "total_bytes": 11_800 * MIB,
    "nvml_total_bytes": 12_288 * MIB,
}
TITAN = RTX | {"name": "NVIDIA TITAN X  (Pascal)", "slug": None}
BESIDE = 300 * MIB  # what others held on the card


def record(
    name: str,
    *,
    beyond_mib: float = 700,
    method: str = "full",
    optim: str = "adamw_torch",
    torch: str = "2.11.0",
    gpu: dict[str, Any] = RTX,
    **figures: Any,
) -> Record:
    """A finished run that held ``beyond_mib`` on the card beyond its reserved memory."""
    document: dict[str, Any] = {
        "schema_version": 1,
        "name": name,
        "model": "tiny",
        "config": {"model_type": "llama"},
        "job": {"method": method, "optim": optim},
        "versions": {"torch": torch, "peft": None},
        "gpu": gpu,
        "status": "done",
        "context_bytes": 400 * MIB,
        "host_rss_peak_bytes": 1500 * MIB,
        "reserved_at_end_bytes": 2000 * MIB,
        "device_used_at_end_bytes": BESIDE + 2000 * MIB + int(beyond_mib * MIB),
        "sampling": {"interval_s": 0.05, "count": 9, "card_before_bytes": BESIDE},
    }
    return parse_record(document | figures, name)


def three(**options: Any) -> list[Record]:
    return [record(name, **options) for name in ("one", "two", "three")]


def paged(name: str, paged_mib: float, beyond_mib: float) -> Record:
    return record(
        name,
        method="qlora",
        optim="paged_adamw_8bit",
        beyond_mib=beyond_mib,
        paged_bytes=int(paged_mib * MIB),
    )


# -- constants -------------------------------------------------------------------------------------


def test_median_residual_and_range() -> None:
    contexts = (400, 404, 410)
    records = [record(str(n), context_bytes=n * MIB) for n in contexts]
    (fitted,) = fit_profiles(records)
    found = fitted.profile.constants["context_bytes"]
    assert (found.value, found.low, found.high) == (404 * MIB, 400 * MIB, 410 * MIB)
    assert found.residual == 4 * MIB  # distances 4, 0, 6
    assert (found.unit, found.num_observations) == ("bytes", 3)
    assert fitted.observations["context_bytes"] == {str(n): n * MIB for n in contexts}


def test_each_constant_is_read_off_its_own_figure() -> None:
    rates = {"copy_bytes_per_s": 3e11, "launch_overhead_s": 4e-6}
    plain = three(cublas_workspace_bytes=16 * MIB, rates=rates)
    bitsandbytes = [record("four", method="qlora", optim="adamw_8bit", beyond_mib=800)]
    (fitted,) = fit_profiles(plain + bitsandbytes)
    values = {name: constant.value for name, constant in fitted.profile.constants.items()}
    assert values == {
        "context_bytes": 400 * MIB,
        "process_bytes": 700 * MIB,
        "process_bitsandbytes_bytes": 800 * MIB,
        "cublas_workspace_bytes": 16 * MIB,
        "driver_reserved_bytes": 488 * MIB,
        "host_bytes": 1500 * MIB,
        "copy_bytes_per_s": 3e11,
        "launch_overhead_s": 4e-6,
        "managed_step_bytes": profile_for(None).constants["managed_step_bytes"].value,
    }
    assert fitted.profile.process_bytes(bitsandbytes=False) == 700 * MIB
    assert fitted.profile.process_bytes(bitsandbytes=True) == 800 * MIB


def test_an_8bit_optimizer_loads_bitsandbytes_whatever_the_method() -> None:
    eight = record("four", method="full", optim="adamw_8bit", beyond_mib=780)
    (fitted,) = fit_profiles([*three(), eight])
    assert fitted.observations["process_bitsandbytes_bytes"] == {"four": 780 * MIB}
    assert "four" not in fitted.observations["process_bytes"]


def test_without_a_plain_run_bitsandbytes_stands_in() -> None:
    (fitted,) = fit_profiles(three(method="qlora", optim="adamw_8bit", beyond_mib=800))
    assert fitted.profile.process_bytes(bitsandbytes=False) == 800 * MIB


@pytest.mark.parametrize(
    ("num_observations", "share", "word"),
    [
        (10, 0.02, "high"),
        (500, 0.0, "high"),
        (9, 0.0, "medium"),
        (10, 0.03, "medium"),
        (3, 0.10, "medium"),
        (3, 0.11, "low"),
        (2, 0.0, "low"),
        (1, 0.0, "low"),
    ],
)
def test_confidence_words(num_observations: int, share: float, word: str) -> None:
    assert confidence(num_observations, share) == word


def test_confidence_of_a_profile() -> None:
    records = [record(str(n)) for n in range(9)]
    records.append(record("ten", method="qlora", optim="adamw_8bit", beyond_mib=800))
    (fitted,) = fit_profiles(records)
    words = {name: constant.confidence for name, constant in fitted.profile.constants.items()}
    assert words["context_bytes"] == "high"
    assert words["process_bytes"] == "medium"
    assert words["process_bitsandbytes_bytes"] == "low"


# -- managed memory --------------------------------------------------------------------------------

PLAIN = [record("none", method="qlora", optim="adamw_8bit", beyond_mib=700)]


@pytest.mark.parametrize("step_mib", [2, 32, 128, 512])
def test_the_managed_step_is_found(step_mib: int) -> None:
    sizes = (0.7 * step_mib, 1.3 * step_mib, 2.6 * step_mib, 3.1 * step_mib)
    steps = (1, 2, 3, 4)
    runs = [
        paged(f"run {n}", size, 700 + n * step_mib) for n, size in zip(steps, sizes, strict=True)
    ]
    (fitted,) = fit_profiles(PLAIN + runs)
    found = fitted.profile.constants["managed_step_bytes"]
    assert (found.value, found.residual, found.num_observations) == (step_mib * MIB, 0, 4)
    for n, size in zip(steps, sizes, strict=True):
        assert fitted.profile.managed_bytes(int(size * MIB)) == n * step_mib * MIB


def test_one_odd_run_does_not_move_the_managed_step() -> None:
    runs = [paged(str(size), size, 700 + 128) for size in (10, 20, 100, 120)]
    runs.append(paged("odd", 100, 700 + 256))
    (fitted,) = fit_profiles(PLAIN + runs)
    assert fitted.profile.constants["managed_step_bytes"].value == 128 * MIB
    assert fitted.observations["managed_step_bytes"]["odd"] == 256 * MIB


def test_paged_runs_do_not_count_as_plain_ones() -> None:
    runs = [paged(str(n), 100, 700 + 128) for n in range(3)]
    (fitted,) = fit_profiles(PLAIN + runs)
    assert set(fitted.observations["process_bitsandbytes_bytes"]) == {"none"}


def test_without_paged_runs_the_step_is_assumed() -> None:
    (fitted,) = fit_profiles(three())
    found = fitted.profile.constants["managed_step_bytes"]
    assert (found.num_observations, found.confidence) == (0, "low")


# -- which records make which profile --------------------------------------------------------------


def test_one_profile_per_gpu_driver_and_torch() -> None:
    records = [
        *three(),
        *three(torch="2.12.0"),
        *three(gpu=RTX | {"driver": "575.2"}),
        *three(gpu=TITAN),
    ]
    found = [(p.gpu, p.driver, p.torch) for p, _, _ in fit_profiles(records)]
    assert found == [
        ("rtx-3060-12gb", "570.1", "2.11.0"),
        ("rtx-3060-12gb", "570.1", "2.12.0"),
        ("rtx-3060-12gb", "575.2", "2.11.0"),
        ("nvidia-titan-x-(pascal)", "570.1", "2.11.0"),
    ]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "none of 0 records"),
        (three(gpu={"name": None}), "none of 3 records"),
        (three(status="oom"), "none of 3 records"),
        (three(gpu=RTX | {"driver": None}), "none of 3 records"),
        (three()[:2], r"RTX 3060, driver 570\.1, torch 2\.11\.0: 2 .*too few"),
        (three() + three(torch="2.12.0")[:1], r"torch 2\.12\.0: 1 .*too few"),
        ([*three()[:2], record("cpu", gpu={"name": None})], "2 .*too few"),
        ([*three()[:2], record("late", status="timeout")], "2 .*too few"),
        (three(context_bytes=None), "no record tells context_bytes"),
        (three(device_used_at_end_bytes=None), "no record tells process_bytes"),
        ([paged(str(n), 100, 900) for n in range(3)], "without a paged optimizer"),
    ],
)
def test_too_little_is_refused(records: list[Record], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        fit_profiles(records)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("figure", ["context_bytes", "cublas_workspace_bytes"])
def test_disagreeing_observations_are_refused_by_name(figure: str) -> None:
    records = three(cublas_workspace_bytes=16 * MIB)
    records.append(
        record("beside-a-game", **{"cublas_workspace_bytes": 16 * MIB} | {figure: 2**30})
    )
    with pytest.raises(UsageError, match=rf"{figure} .* in beside-a-game"):
        fit_profiles(records)


def test_a_tenth_may_be_off() -> None:
    many = [record(str(n)) for n in range(19)]
    (fitted,) = fit_profiles([*many, record("odd", beyond_mib=1400)])
    found = fitted.profile.constants["process_bytes"]
    assert (found.value, found.high, found.residual) == (700 * MIB, 1400 * MIB, 0)


def test_records_of_one_name_all_count() -> None:
    (fitted,) = fit_profiles([*three(), record("one", context_bytes=410 * MIB)])
    assert fitted.profile.constants["context_bytes"].num_observations == 4


# -- files -----------------------------------------------------------------------------------------


def test_records_are_found(tmp_path: Path) -> None:
    for one in three():
        write_record(tmp_path / f"{one.name}.json", one)
    (tmp_path / "one.timeline.json.gz").write_bytes(b"not a record")
    names = [one.name for one in find_records([tmp_path, tmp_path / "two.json"])]
    assert names == ["one", "three", "two"]  # each once


def test_missing_empty_and_broken_records(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="does not exist"):
        find_records([tmp_path / "none"])
    with pytest.raises(RecordError, match="vramplan measure"):
        find_records([tmp_path])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RecordError, match=r"bad\.json"):
        find_records([tmp_path])


def test_a_profile_is_written_and_reads_back(tmp_path: Path) -> None:
    (fitted,) = fit_profiles(three(cublas_workspace_bytes=16 * MIB))
    path = write_profile(tmp_path, fitted)
    assert path == tmp_path / "rtx-3060-12gb" / "driver-570.1-torch-2.11.0.json"
    assert read_profile(path) == fitted.profile
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1 and document["num_records"] == 3
    assert document["command"] and document["created"] and "commit" in document
    assert document["versions"] == {"torch": ["2.11.0"]}
    context = document["constants"]["context_bytes"]
    assert context["observations"] == dict.fromkeys(("one", "two", "three"), 400 * MIB)


def test_a_profile_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (fitted,) = fit_profiles(three())
    path = write_profile(tmp_path, fitted)
    path.write_text("mine")
    with pytest.raises(RecordError, match="--force"):
        write_profile(tmp_path, fitted)
    assert path.read_text() == "mine"
    assert read_profile(write_profile(tmp_path, fitted, force=True)) == fitted.profile


@pytest.mark.parametrize(
    "change",
    [
        {"driver": "570.1/../../.."},
        pytest.param(
            {"slug": "../../outside"},
        ),
        pytest.param(
            {"slug": None, "name": "../../outside"},
        ),
    ],
)
def test_a_profile_stays_in_its_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    """Records come from other people, too."""
    folder = tmp_path / "a" / "b" / "calibrations"
    (fitted,) = fit_profiles(three(gpu=RTX | change))
    try:
        path = write_profile(folder, fitted)
    except (UsageError, RecordError):
        return
    assert path.resolve().is_relative_to(folder)


Edit = Callable[[dict[str, Any]], Any]


def constant(**values: Any) -> Edit:
    return lambda document: document["constants"]["managed_step_bytes"].update(values)


BROKEN: dict[str, tuple[Edit, str]] = {
    "newer": (lambda d: d.update(schema_version=2), "update it"),
    "no version": (lambda d: d.pop("schema_version"), "vramplan calibrate"),
    "version is text": (lambda d: d.update(schema_version="1"), "vramplan calibrate"),
    "no constants": (lambda d: d.pop("constants"), "vramplan calibrate"),
    "constants are a list": (lambda d: d.update(constants=[1]), "vramplan calibrate"),
    "a constant is a number": (lambda d: d["constants"].update(x=1), "vramplan calibrate"),
    "one is missing": (lambda d: d["constants"].pop("context_bytes"), "lacks context_bytes"),
    "a value is text": (constant(value="much"), "vramplan calibrate"),
    "a value is null": (constant(value=None), "vramplan calibrate"),
    "a count is infinite": (constant(num_observations=float("inf")), "vramplan calibrate"),
    "a value is nan": (constant(value=float("nan")), "vramplan calibrate"),
    "a value is infinite": (constant(value=float("inf")), "vramplan calibrate"),
    "a step is zero": (constant(value=0), "vramplan calibrate"),
    "a value is negative": (constant(value=-1.0), "vramplan calibrate"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_profiles_are_refused(tmp_path: Path, name: str) -> None:
    (fitted,) = fit_profiles(three())
    path = write_profile(tmp_path, fitted)
    document = json.loads(path.read_text())
    edit, words = BROKEN[name]
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(RecordError, match=words) as caught:
        read_profile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"[" * 100_000, b" " * (4 * MIB + 1)]
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "driver-1.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"driver-1\.json"):
        read_profile(path)


# -- whose constants an answer rests on ------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of calibrations, empty."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    user_calibrations_dir.cache_clear()
    own_profile.cache_clear()
    yield user_calibrations_dir()
    user_calibrations_dir.cache_clear()
    own_profile.cache_clear()


def save(folder: Path, created: str = "", **options: Any) -> None:
    """Write a profile as if it had been made at another time."""
    (fitted,) = fit_profiles(three(**options))
    path = write_profile(folder, fitted)
    if created:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created": created}))
    own_profile.cache_clear()


def test_a_card_without_a_profile_borrows(own: Path) -> None:
    profile = profile_for("rtx-3060-12gb")
    assert profile.gpu == REFERENCE_GPU and profile.borrowed and not profile.own
    assert profile.doubt_bytes >= BORROWED_DOUBT_BYTES
    assert profile.cublas_workspace_bytes is None  # it depends on the generation


def test_the_users_own_wins_over_the_shipped_one(own: Path) -> None:
    assert not profile_for(REFERENCE_GPU).own
    save(own, "2000-01-01T00:00:00+00:00", gpu=RTX | {"slug": REFERENCE_GPU})
    profile = profile_for(REFERENCE_GPU)
    assert profile.own and not profile.borrowed
    assert profile.context_bytes == 400 * MIB
    assert profile.name == f"your profile of {REFERENCE_GPU} (driver 570.1, torch 2.11.0)"


def test_the_newest_of_several_wins(own: Path) -> None:
    save(own, "2026-02-01T00:00:00+00:00", torch="2.9.0", context_bytes=2)
    save(own, "2026-01-01T00:00:00+00:00", torch="2.11.0", context_bytes=1)
    assert profile_for("rtx-3060-12gb").torch == "2.9.0"


def test_own_cublas_workspaces_are_used(own: Path) -> None:
    save(own, cublas_workspace_bytes=16 * MIB)
    assert profile_for("rtx-3060-12gb").cublas_workspace_bytes == 16 * MIB


# -- the command line ------------------------------------------------------------------------------


def vramplan(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vramplan.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_DATA_HOME": str(home)},
        check=False,
        timeout=60,
    )


def fit(home: Path) -> subprocess.CompletedProcess[str]:
    return vramplan(home, "fit", "gpt-j-6b", "--gpu", "rtx-3060-12gb", "--json")


def test_calibrate_and_then_fit(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "records"
    for one in three():
        write_record(folder / f"{one.name}.json", one)
    before = json.loads(fit(home).stdout)["prediction"]
    assert before["calibration"].startswith(REFERENCE_GPU) and before["calibration_borrowed"]

    dry = vramplan(home, "calibrate", str(folder), "--dry-run")
    assert dry.returncode == 0 and "context" in dry.stdout and not home.exists()

    done = vramplan(home, "calibrate", str(folder), "--json")
    assert done.returncode == 0
    (document,) = json.loads(done.stdout)["profiles"]
    path = Path(done.stderr.removeprefix("profile: ").strip())
    assert path.is_relative_to(home) and json.loads(path.read_text()) == document

    after = json.loads(fit(home).stdout)["prediction"]
    assert after["calibration"] == "your profile of rtx-3060-12gb (driver 570.1, torch 2.11.0)"
    assert not after["calibration_borrowed"]
    assert after["context_bytes"] == 400 * MIB and after["process_bytes"] == 700 * MIB

    again = vramplan(home, "calibrate", str(folder))
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert "--force" in again.stderr
    assert vramplan(home, "calibrate", str(folder), "--force").returncode == 0

    path.write_text("{")
    broken = fit(home)
    assert (broken.returncode, broken.stdout, broken.stderr.count("\n")) == (2, "", 1)
    assert str(path) in broken.stderr


def test_an_output_that_is_no_folder(tmp_path: Path) -> None:
    for one in three():
        write_record(tmp_path / f"{one.name}.json", one)
    (tmp_path / "file").write_text("mine")
    done = vramplan(tmp_path, "calibrate", str(tmp_path), "-o", str(tmp_path / "file"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "should not" not in done.stderr
