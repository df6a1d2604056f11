"""The pytest plugin, on a card that is told what is allocated on it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeNvml

# loaded once, not again for every project that is run in this process
import vramplan.testing.fixture
import vramplan.testing.results
import vramplan.testing.verdict  # noqa: F401
from vramplan.errors import UsageError
from vramplan.testing.spread import choose_gpu

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CONFTEST = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from fake_card import FakeCard
CARD = FakeCard()

def pytest_vram_card(config):
    return CARD
"""
WITHOUT = ("vramplan", "cacheprovider", "hypothesispytest", "anyio")  # the first: by its module
PLUGIN = (*(word for name in WITHOUT for word in ("-p", f"no:{name}")),
          "-p", "vramplan.pytest_plugin")  # fmt: skip

HEAD = """
import pytest
from conftest import CARD
from vramplan.timeline import Kind
from vramplan.units import GIB, MIB

"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("VRAMPLAN_REQUIRE_GPU", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the projects' runs are not in one
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.setenv("FAKE_CARD", "{}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPOSITORY), str(HERE))))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose tests measure on the fake card."""
    pytester.makeconftest(CONFTEST)
    return pytester


def run(project: pytest.Pytester, *words: str, **card: object) -> pytest.RunResult:
    """Run its tests; ``card`` is how the fake card differs."""
    os.environ["FAKE_CARD"] = json.dumps(card)  # put back by _clean
    return project.runpytest_inprocess(*PLUGIN, *words)


def write(project: pytest.Pytester, body: str, name: str = "test_it") -> None:
    project.makepyfile(**{name: HEAD + body})


def between(lines: list[str], begin: str, end: str) -> list[str]:
    """The lines between one that fits a pattern and the next that fits another; no blank ends."""
    first = next(n for n, line in enumerate(lines) if re.fullmatch(begin, line))
    last = next(n for n in range(first + 1, len(lines)) if re.match(end, lines[n]))
    return "\n".join(lines[first + 1 : last]).strip("\n").splitlines()


def section(result: pytest.RunResult) -> list[str]:
    """What stands under "vram" in the summary."""
    return between(result.stdout.lines, r"=+ vram =+", r"=+ ")


def failure(result: pytest.RunResult, test: str) -> list[str]:
    """What is said of a test that failed."""
    return between(result.stdout.lines, rf"_+ (ERROR at setup of )?{test} _+", r"[=_]+ ")


def saved(project: pytest.Pytester, name: str = "main", torch: str = "2.11.0") -> Path:
    return project.path / f".vram/h100-sxm-80gb/{name}--torch-{torch}-transformers-5.17.0.json"


# -- limits ----------------------------------------------------------------------------------------

LIMITED = """
@pytest.mark.limit_vram("1 GiB", kind="KIND")
def test_step():
    weights = [CARD.alloc(100 * MIB, Kind.WEIGHTS, f"model.layers.{n}.mlp") for n in range(4)]
    CARD.at("forward", "model.layers.0.mlp")
    a = CARD.alloc(300 * MIB)
    CARD.at("backward", "lm_head", inside=False)
    b = CARD.alloc(SIZE * MIB)
    CARD.free(a), CARD.free(b)
"""


def test_within_the_limit(project: pytest.Pytester) -> None:
    write(project, LIMITED.replace("KIND", "allocated").replace("SIZE", "324"))
    result = run(project)
    result.assert_outcomes(passed=1)
    assert section(result) == [
        "test                   region      allocated  reserved",
        "test_it.py::test_step  whole test   1.00 GiB  1.00 GiB",
    ]


OWNERS = [
    "",
    "at the peak  kind         module",
    "   0.59 GiB  logits       lm_head",
    "   0.39 GiB  weights      model.layers.*.mlp",
    "   0.29 GiB  activations  model.layers.*.mlp",
]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "allocated",
            ["whole test: peak allocated 1.27 GiB is 0.27 GiB above the limit of 1.00 GiB, in "
             "backward."],
        ),
        (
            "reserved",
            ["whole test: peak reserved 1.27 GiB is 0.27 GiB above the limit of 1.00 GiB.",
             "Of it 1.27 GiB were allocated at most, in backward."],
        ),
        (
            "device",
            ["whole test: device peak 1.76 GiB is 0.76 GiB above the limit of 1.00 GiB.",
             "Of it 1.27 GiB were allocated at most, in backward."],
        ),
    ],
)  # fmt: skip
def test_above_the_limit(project: pytest.Pytester, kind: str, text: list[str]) -> None:
    write(project, LIMITED.replace("KIND", kind).replace("SIZE", "600"))
    result = run(project)
    result.assert_outcomes(failed=1)
    assert failure(result, "test_step") == text + OWNERS


def test_a_limit_that_cannot_be_judged_fails(project: pytest.Pytester) -> None:
    write(project, LIMITED.replace("KIND", "device").replace("SIZE", "1")
          .replace("def test_step():", "def test_step():\n    CARD.own_known = False"))  # fmt: skip
    result = run(project)
    result.assert_outcomes(failed=1)
    assert failure(result, "test_step") == [
        "device peak of this test is not known (whole test), so its limit of 1.00 GiB cannot be "
        "judged."
    ]


def test_the_closest_limit_of_a_kind_holds(project: pytest.Pytester) -> None:
    write(
        project,
        """
@pytest.mark.limit_vram("1 MiB")
class TestIt:
    @pytest.mark.limit_vram("3 MiB")
    def test_own(self):
        CARD.free(CARD.alloc(2 * MIB))

    @pytest.mark.limit_vram("9 MiB", kind="reserved")
    def test_both(self):
        CARD.free(CARD.alloc(2 * MIB))
""",
    )
    result = run(project)
    result.assert_outcomes(passed=1, failed=1)
    assert failure(result, "TestIt.test_both")[0].startswith("whole test: peak allocated 2.0 MiB")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "limit_vram takes one size, a text or a number of bytes: "
             '@pytest.mark.limit_vram("11 GiB", kind="allocated")'),
        ('"1 GiB", "reserved"', "limit_vram takes one size, a text or a number of bytes: "
             '@pytest.mark.limit_vram("11 GiB", kind="allocated")'),
        ("True", "limit_vram takes one size, a text or a number of bytes: "
             '@pytest.mark.limit_vram("11 GiB", kind="allocated")'),
        ('"lots"', "limit_vram: cannot read 'lots' as a size; write for example 12GiB, 24GB or "
             "512MiB"),
        ("-5", "limit_vram: cannot read '-5' as a size; write for example 12GiB, 24GB or 512MiB"),
        ('"1 GiB", kind="alocated"', "unknown kind of limit_vram 'alocated'; did you mean "
             "allocated?"),
        ('"1 GiB", kin="reserved"', "limit_vram has no argument 'kin'; write "
             '@pytest.mark.limit_vram("11 GiB", kind="allocated")'),
    ],
)  # fmt: skip
def test_a_wrong_marker(project: pytest.Pytester, arguments: str, text: str) -> None:
    write(project, f"@pytest.mark.limit_vram({arguments})\ndef test_it(): pass\n")
    result = run(project)
    result.assert_outcomes(errors=1)
    assert failure(result, "test_it") == [text]


def test_an_expected_failure_may_be_a_limit(project: pytest.Pytester) -> None:
    write(project, "@pytest.mark.xfail(strict=True)" + LIMITED.replace("KIND", "allocated")
          .replace("SIZE", "600"))  # fmt: skip
    run(project).assert_outcomes(xfailed=1)


# -- regions and jobs ------------------------------------------------------------------------------


def test_what_a_region_tells(project: pytest.Pytester) -> None:
    write(
        project,
        """
def test_it(vram):
    old = CARD.alloc(10 * MIB)
    with vram.measure("step") as m:
        assert m.peak_allocated_bytes is None
        CARD.at("forward", "mlp")
        CARD.workspace = CARD.alloc(8 * MIB)
        a, b = CARD.alloc(3 * MIB), CARD.alloc(2 * MIB)
        CARD.at("step")
        CARD.free(a)
        CARD.alloc(MIB, Kind.OPTIMIZER, "mlp")
    assert m.peak_allocated_bytes == 23 * MIB
    assert m.peak_reserved_bytes == 24 * MIB
    assert m.device_peak_bytes == 524 * MIB
    assert m.leaked_bytes == 3 * MIB
    assert m.phase == "forward"
    assert m.phases == {"forward": 23 * MIB, "step": 21 * MIB}
    assert m.owners == {("held before", ""): 10 * MIB, ("workspace", "cublas"): 8 * MIB,
                        ("activations", "mlp"): 5 * MIB}
    assert m.by_module() == {"held before": 10 * MIB, "cublas": 8 * MIB, "mlp": 5 * MIB}
    assert m.left == {("activations", "mlp"): 2 * MIB, ("optimizer", "mlp"): MIB}
    assert vram.regions == [m]
""",
    )
    run(project).assert_outcomes(passed=1)


def test_a_region_needs_a_name(project: pytest.Pytester) -> None:
    write(project, "def test_it(vram):\n    with vram.measure(' '): pass\n")
    result = run(project)
    result.stdout.fnmatch_lines(
        ['E *UsageError: vram.measure needs a name, such as vram.measure("step")']
    )


def test_out_of_memory_in_a_region(project: pytest.Pytester) -> None:
    write(
        project,
        """
def test_it(vram):
    with vram.measure("step"):
        CARD.at("backward", "model.layers.7.mlp")
        for n in range(9):
            CARD.alloc(GIB)

def test_history_is_off():
    assert CARD._trace is None and CARD.notes is None and CARD.closed == 1
""",
    )
    result = run(project, capacity=4 << 30)
    result.assert_outcomes(failed=1, passed=1)
    text = between(result.stdout.lines, r"-+ Captured vram call -+", r"=+ ")
    assert text == [
        "step: out of memory in backward of model.layers.7.mlp, asking for 1.00 GiB.",
        "",
        "at the peak  kind         module",
        "   4.00 GiB  activations  model.layers.*.mlp",
    ]


@pytest.mark.parametrize("error", ["ValueError", "KeyboardInterrupt", "pytest.skip.Exception"])
def test_recording_ends_with_the_test(project: pytest.Pytester, error: str) -> None:
    write(
        project,
        f"""
import atexit, pathlib
atexit.register(lambda: pathlib.Path("end").write_text(f"{{CARD._trace}} {{CARD.closed}}"))

@pytest.mark.limit_vram("1 GiB")
def test_it(vram):
    with vram.measure("step"):
        raise {error}
""",
    )
    project.runpytest_subprocess(*PLUGIN)
    assert (project.path / "end").read_text() == "None 1"


def test_a_history_of_the_users(project: pytest.Pytester) -> None:
    write(
        project,
        """
def test_it(vram):
    CARD.history_of_user = True
    with vram.measure("step") as m:
        CARD.alloc(MIB)
    assert m.peak_allocated_bytes == MIB and not m.owners
""",
    )
    result = run(project)
    result.assert_outcomes(passed=1)
    assert section(result)[-1] == (
        "Note: test_it.py::test_it, step: modules unknown, the program records the allocator's "
        "history itself."
    )


JOB = """
@pytest.mark.limit_vram("6 GiB")
def test_job(vram):
    CARD.runner.status = STATUS
    CARD.runner.more = dict(
        peak_allocated_bytes=5 * GIB + CARD.extra, peak_reserved_bytes=6 * GIB,
        ready_bytes=2 * GIB, load_peak_bytes=3 * GIB,
        versions=CARD.versions, gpu={"slug": CARD.where["GPU"]},
        oom={"phase": "backward", "requested_bytes": GIB},
    )
    record = vram.run("pythia-160m", batch_size=2, MORE)
    assert record.job["batch_size"] == 2 and record.status == CARD.runner.status
    assert vram.records[-1] is record
    assert CARD.runner.runs == RUNS
"""


def job(status: str = '"done"', more: str = "", runs: str | None = None) -> str:
    names = runs or '["pythia-160m-qlora-2x512"]'
    return JOB.replace("STATUS", status).replace("MORE", more).replace("RUNS", names)


def test_a_job(project: pytest.Pytester) -> None:
    write(project, job(more="name='small', repeats=2", runs="['small-repeat1', 'small-repeat2']"))
    result = run(project)
    result.assert_outcomes(passed=1)
    assert section(result) == [
        "test                  region      allocated  reserved",
        "test_it.py::test_job  small        5.00 GiB  6.00 GiB",
        "test_it.py::test_job  whole test        0 B       0 B",
    ]


def test_a_job_counts_for_the_limit(project: pytest.Pytester) -> None:
    write(project, job(more="name='small'", runs="['small']"))
    result = run(project, extra=2 << 30)
    assert failure(result, "test_job") == [
        "small: peak allocated 7.00 GiB is 1.00 GiB above the limit of 6.00 GiB.",
    ]


def test_a_job_out_of_memory(project: pytest.Pytester) -> None:
    write(project, job('"oom"', "name='small'"))
    result = run(project)
    result.stdout.fnmatch_lines(
        ["E *EnvironmentProblem: small: out of memory in backward, asking for 1.00 GiB"]
    )
    write(project, job('"oom"', "name='small', allow_oom=True", "['small']"))
    run(project).assert_outcomes(passed=1)


def test_a_job_with_an_unknown_field(project: pytest.Pytester) -> None:
    write(project, job(more="batchsize=4"))
    result = run(project)
    result.stdout.fnmatch_lines(
        ["E *UnknownNameError: unknown field of a job 'batchsize'; did you mean batch_size*"]
    )


# -- baselines -------------------------------------------------------------------------------------

REGION = """
def test_step(vram):
    with vram.measure("step"):
        weights = [CARD.alloc(100 * MIB, Kind.WEIGHTS, f"layers.{n}.mlp") for n in range(4)]
        CARD.at("forward", "lm_head")
        logits = CARD.alloc(100 * MIB + CARD.extra)
        CARD.free(logits)
    for block in weights:
        CARD.free(block)
"""


def test_saved_and_compared(project: pytest.Pytester) -> None:
    write(project, REGION)
    result = run(project, "--vram-save", "main")
    assert section(result)[2:] == [
        "Saved 1 test in .vram/h100-sxm-80gb/main--torch-2.11.0-transformers-5.17.0.json."
    ]
    document = json.loads(saved(project).read_text())
    assert document["schema_version"] == 1 and document["name"] == "main"
    assert document["command"] == "pytest"
    found = document["tests"]["test_it.py::test_step"]["step"]
    assert found["figures"]["allocated"] == 500 << 20
    assert found["peak"] == [
        ["logits", "lm_head", 100 << 20],
        ["weights", "layers.*.mlp", 100 << 20, "0-3"],
    ]
    result = run(project, "--vram-compare")
    result.assert_outcomes(passed=1)
    assert [re.sub(r"\d{4}-..-..", "DATE", line) for line in section(result)] == [
        "test                   region  allocated  reserved  against baseline",
        "test_it.py::test_step  step     0.49 GiB  0.49 GiB  as it was",
        "Baseline: main of DATE.",
    ]


def test_a_regression(project: pytest.Pytester) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    result = run(project, "--vram-compare=main", extra=50 << 20, torch="2.12.0")
    result.assert_outcomes(failed=1)
    text = [re.sub(r"\d{4}-..-..", "DATE", line) for line in failure(result, "test_step")]
    assert text == [
        "Against main of DATE:",
        "step needs more: peak allocated 0.49 GiB -> 0.54 GiB, +50.0 MiB (+10.0%) in forward.",
        "Most of it: logits of lm_head.",
        "+50.0 MiB logits of lm_head",
        "Changed: torch 2.11.0 -> 2.12.0.",
        "peak allocated: 0.49 GiB -> 0.54 GiB, +50.0 MiB (+10.0%), allowed 2.5 MiB, worse",
        "peak reserved: 0.49 GiB -> 0.54 GiB, +50.0 MiB (+10.0%), allowed 15.0 MiB, worse",
        "device peak: 0.98 GiB -> 1.03 GiB, +50.0 MiB (+5.0%)",
    ]
    assert section(result)[1].endswith("0.54 GiB  0.54 GiB  +50.0 MiB (+10.0%), worse")
    assert section(result)[2].endswith(" (torch 2.11.0 -> 2.12.0).")


@pytest.mark.parametrize(
    ("thresholds", "passed"),
    [("allocated:20%,reserved:60MiB", 1), ("allocated:9%", 0), ("allocated:off,reserved:off", 1)],
)
def test_thresholds(project: pytest.Pytester, thresholds: str, passed: int) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    result = run(project, "--vram-compare", f"--vram-fail={thresholds}", extra=50 << 20)
    result.assert_outcomes(passed=passed, failed=1 - passed)


def test_a_job_against_its_baseline(project: pytest.Pytester) -> None:
    write(project, job(more="name='small'", runs="['small']"))
    run(project, "--vram-save", "main")
    run(project, "--vram-compare").assert_outcomes(passed=1)
    result = run(project, "--vram-compare", extra=100 << 20)
    assert failure(result, "test_job")[1:3] == [
        "small needs more: peak allocated 5.00 GiB -> 5.10 GiB, +100.0 MiB (+2.0%).",
        "peak allocated: 5.00 GiB -> 5.10 GiB, +100.0 MiB (+2.0%), allowed 25.6 MiB, worse",
    ]


def test_what_a_fixture_measures_while_it_is_taken_down(project: pytest.Pytester) -> None:
    write(
        project,
        """
@pytest.fixture
def model(vram):
    yield
    with vram.measure("end"):
        CARD.free(CARD.alloc(MIB + CARD.extra))

def test_it(model): pass
""",
    )
    result = run(project, "--vram-save", "main")
    assert "test_it.py::test_it  end       1.0 MiB   2.0 MiB" in section(result)
    result = run(project, "--vram-compare", extra=1 << 20)
    result.assert_outcomes(passed=1, errors=1)


def test_a_leak_is_told_with_its_place(project: pytest.Pytester) -> None:
    write(
        project,
        """
def test_it(vram):
    CARD.alloc(100 * MIB)
    with vram.measure("steps"):
        CARD.at("outside modules")
        for _ in range(4):
            if CARD.extra:
                CARD.alloc(CARD.extra)
            CARD.step()
""",
    )
    run(project, "--vram-save", "main")
    result = run(project, "--vram-compare", extra=1 << 20)
    text = failure(result, "test_it")
    assert text[1:4] == [
        "steps needs more: growth a step 0 B -> 1.0 MiB.",
        "Most of it: outside modules.",
        "+4.0 MiB outside modules",
    ]


def test_a_whole_test_repeats_nothing(project: pytest.Pytester) -> None:
    write(project, '@pytest.mark.limit_vram("1 GiB")' + REGION)
    run(project, "--vram-save", "main")
    result = run(project, "--vram-compare", extra=50 << 20)
    told = [line for line in failure(result, "test_step") if "needs more" in line]
    assert [line.split(":")[0] for line in told] == ["step needs more"]
    assert [line.split()[1] for line in section(result)[1:3]] == ["step", "whole"]


def test_not_in_the_baseline(project: pytest.Pytester) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    write(project, REGION + REGION.replace("test_step", "test_new"))
    result = run(project, "--vram-compare")
    result.assert_outcomes(passed=2)
    lines = [re.sub(r"\d{4}-..-..", "DATE", line) for line in section(result)]
    assert lines[-1] == "Not compared: test_it.py::test_new, step: not in main of DATE."


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ({"gpu": "a100-sxm-80gb"}, "main of DATE: made with GPU h100-sxm-80gb, not a100-sxm-80gb."),
        (
            {"conf": "expandable_segments:True"},
            "main of DATE: made with allocator default, not expandable_segments:True.",
        ),
    ],
)
def test_made_elsewhere(project: pytest.Pytester, card: dict[str, str], text: str) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    result = run(project, "--vram-compare", extra=50 << 20, **card)
    result.assert_outcomes(passed=1)
    lines = [re.sub(r"\d{4}-..-..", "DATE", line) for line in section(result)]
    assert lines[-1] == f"Not compared: {text}"


def test_a_limit_of_the_users_own_is_elsewhere(project: pytest.Pytester) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    write(project, REGION.replace("(vram):", '(vram):\n    CARD.fraction = "0.5 of the card"'))
    assert section(run(project, "--vram-compare"))[-1] == (
        "Not compared: test_it.py::test_step, step: measured elsewhere (limit: none then, 0.5 of "
        "the card now)."
    )


def test_the_same_versions_come_before_the_newest(project: pytest.Pytester) -> None:
    write(project, REGION)
    run(project, "--vram-save", "old", torch="2.10.0")
    run(project, "--vram-save", "main", torch="2.11.0")
    assert "Baseline: old" in section(run(project, "--vram-compare", torch="2.10.0"))[-1]
    assert "Baseline: main" in section(run(project, "--vram-compare", torch="2.11.0"))[-1]
    assert "Baseline: old" in section(run(project, "--vram-compare=old", torch="2.11.0"))[-1]


def test_a_name_that_is_taken(project: pytest.Pytester) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    before = saved(project).read_text()
    result = run(project, "--vram-save", "main")
    assert result.ret == 4
    assert error_of(result) == (
        f"ERROR: vramplan: --vram-save: {saved(project)} is there already; choose another name, or "
        "add --vram-overwrite"
    )
    assert saved(project).read_text() == before
    write(project, REGION.replace("test_step", "test_other"))
    result = run(project, "--vram-save", "main", "--vram-overwrite")
    assert section(result)[-1] == "1 test of the replaced file is no longer in it."
    assert list(json.loads(saved(project).read_text())["tests"]) == ["test_it.py::test_other"]


def test_failed_tests_are_not_saved(project: pytest.Pytester) -> None:
    bad = REGION.replace("test_step", "test_bad") + "    assert False\n"
    limited = '@pytest.mark.limit_vram("1 MiB")' + REGION.replace("test_step", "test_big")
    write(project, REGION + bad + limited)
    result = run(project, "--vram-save", "main")
    result.assert_outcomes(passed=1, failed=2)
    assert section(result)[-1] == "1 test that did not pass is not in it."
    assert list(json.loads(saved(project).read_text())["tests"]) == ["test_it.py::test_step"]


def test_nothing_to_save(project: pytest.Pytester) -> None:
    write(project, "def test_it(): pass")
    assert section(run(project, "--vram-save", "main")) == [
        "main was not saved: no passing test measured anything."
    ]
    assert not (project.path / ".vram").exists()


def error_of(result: pytest.RunResult) -> str:
    return next(line for line in result.stderr.lines if line.startswith("ERROR"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--vram-fail=allocated:1%"], "--vram-fail is about a comparison: add --vram-compare"),
        (["--vram-overwrite"], "--vram-overwrite is about --vram-save NAME: add it"),
        (
            ["--vram-compare=main"],
            "--vram-compare: there is no baseline 'main' in ROOT/.vram (it has none); save one "
            "with --vram-save main",
        ),
        (
            ["--vram-compare"],
            "--vram-compare: there is no baseline in ROOT/.vram (it has none); save one with "
            "--vram-save NAME",
        ),
        (
            ["--vram-compare", "test_it.py"],
            "--vram-compare took 'test_it.py' for the name of a baseline; write "
            "--vram-compare=NAME, or the files before it",
        ),
        (
            ["--vram-save", "../main"],
            "--vram-save: '../main' cannot be a name; use letters, digits, '.', '_' and single '-'",
        ),
        (
            ["--vram-compare", "--vram-fail=alocated:1%"],
            "unknown figure 'alocated'; did you mean allocated or load or evaluate?",
        ),
        (
            ["--vram-compare", "--vram-fail=allocated:much"],
            "cannot read allocated:much as a threshold; write for example 1%, 200MiB, 0, off",
        ),
    ],
)
def test_options_that_do_not_go(project: pytest.Pytester, words: list[str], text: str) -> None:
    write(project, REGION)
    result = run(project, *words)
    assert result.ret == 4
    assert error_of(result) == f"ERROR: vramplan: {text}".replace("ROOT", str(project.path))


REMEDY = "; take it back from version control, or save it again with --vram-overwrite"


def _figures(change: object) -> object:
    """A baseline whose figures were edited by hand."""

    def edit(text: str) -> str:
        document = json.loads(text)
        document["tests"]["test_it.py::test_step"]["step"] |= change
        return json.dumps(document)

    return edit


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda t: t[: t.index("main") + 2],
            "PATH cannot be read as a baseline: Unterminated string*" + REMEDY,
        ),
        (lambda _: "[" * 100_000, "PATH cannot be read as a baseline: *" + REMEDY),
        (lambda _: "[]", "PATH is not a baseline of vramplan: it has no schema_version"),
        (lambda _: "\0", "PATH cannot be read as a baseline: *" + REMEDY),
        (lambda _: " " * (64 * 1024**2 + 1), "PATH is larger than any baseline (67108864 bytes)"),
        (
            lambda t: t.replace('"schema_version": 1', '"schema_version": 2'),
            "PATH has schema_version 2; this vramplan reads up to 1, update it",
        ),
        (
            _figures({"figures": {"allocated": "12"}}),
            "PATH is no usable baseline: tests.test_it.py::test_step.step.figures.allocated: Input "
            "should be a valid integer" + REMEDY,
        ),
        (
            _figures({"figures": {"allocated": -1}}),
            "PATH is no usable baseline: tests.test_it.py::test_step.step.figures.allocated: Input "
            "should be greater than or equal to 0" + REMEDY,
        ),
        (
            _figures({"figures": {"alocated": 1}}),
            "PATH is no usable baseline: tests.test_it.py::test_step.step.figures: Value error, "
            "there is no figure 'alocated'" + REMEDY,
        ),
        (
            _figures({"peak": [["weights", "layers.*.mlp", 1, "0-99999"]]}),
            "PATH is no usable baseline: tests.test_it.py::test_step.step.peak: Value error, "
            "cannot read '0-99999' as the layers of 'layers.*.mlp'" + REMEDY,
        ),
        (
            lambda t: t.replace('"tests": {', '"tests": [], "x": {'),
            "PATH is no usable baseline: tests: Input should be a valid dictionary" + REMEDY,
        ),
    ],
)
def test_a_broken_baseline(project: pytest.Pytester, edit: object, text: str) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    path = saved(project)
    path.write_text(edit(path.read_text()))
    result = run(project, "--vram-compare")
    assert result.ret == 4
    want = re.escape(f"ERROR: vramplan: {text}".replace("PATH", str(path))).replace(r"\*", ".*")
    assert re.fullmatch(want, error_of(result)), error_of(result)


def test_a_number_edited_by_hand_is_believed(project: pytest.Pytester) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    saved(project).write_text(
        _figures({"figures": {"allocated": 1000}})(saved(project).read_text())
    )
    run(project, "--vram-compare").assert_outcomes(failed=1)


def test_hostile_names_are_shown_harmless(project: pytest.Pytester) -> None:
    write(project, REGION)
    run(project, "--vram-save", "main")
    evil = json.dumps("\x1b[31mevil\n" + "x" * 1000)
    saved(project).write_text(
        saved(project).read_text().replace('"torch": "2.11.0"', f'"torch": {evil}')
    )
    result = run(project, "--vram-compare")
    assert "\x1b[31mevil" not in result.stdout.str()
    assert max(map(len, section(result))) < 300


# -- saving where it is hard -----------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(project: pytest.Pytester) -> None:
    write(project, REGION)
    (project.path / ".vram").write_text("a file")
    result = run(project, "--vram-save", "main")
    assert result.ret == 4
    assert error_of(result) == (
        f"ERROR: vramplan: --vram-save: {project.path / '.vram'} cannot be written"
    )


def test_a_folder_that_turns_bad_loses_nothing(project: pytest.Pytester) -> None:
    write(project, REGION + "    import pathlib; pathlib.Path('.vram').write_text('a file')\n")
    result = run(project, "--vram-save", "main")
    assert result.ret == 4
    told = re.fullmatch(
        r"main could not be saved: (cannot .*)\. It is in (/.*\.json)\.", section(result)[-1]
    )
    assert told is not None
    assert json.loads(Path(told[2]).read_text())["tests"]


def test_two_runs_that_save_at_once(project: pytest.Pytester) -> None:
    """The other run saves while this one's tests are running."""
    write(project, REGION)
    other = (
        REGION
        + f"""
    import os, subprocess, sys
    if "INNER" not in os.environ:
        subprocess.run([sys.executable, "-m", "pytest", {", ".join(map(repr, PLUGIN))},
                        "test_it.py", "--vram-save", "main"],
                       env=os.environ | {{"INNER": "1"}}, check=True)
"""
    )
    write(project, other, "test_outer")
    result = run(project, "test_outer.py", "--vram-save", "main")
    assert section(result)[-2:] == [
        "Saved 1 test in .vram/h100-sxm-80gb/main-2--torch-2.11.0-transformers-5.17.0.json.",
        "main--torch-2.11.0-transformers-5.17.0.json is another run's, made meanwhile; it was left "
        "alone.",
    ]
    assert list(json.loads(saved(project).read_text())["tests"]) == ["test_it.py::test_step"]
    assert json.loads(saved(project, "main-2").read_text())["name"] == "main-2"


# -- without a GPU ---------------------------------------------------------------------------------

NEEDS_GPU = """
def test_fixture(vram): pass

@pytest.mark.limit_vram("1 GiB")
def test_marker(): pass

def test_late(request):
    request.getfixturevalue("vram")

def test_plain(): pass
"""
NO_CARD = """
from vramplan.errors import EnvironmentProblem
def pytest_vram_card(config):
    raise EnvironmentProblem("no card today")
"""


def test_skipped_without_a_gpu(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(NO_CARD)
    pytester.makepyfile("import pytest" + NEEDS_GPU)
    result = pytester.runpytest_subprocess(*PLUGIN, "-rs")
    result.assert_outcomes(skipped=3, passed=1)
    result.stdout.fnmatch_lines(["SKIPPED *: no GPU memory can be measured: no card today"])


def test_required_gpu(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_REQUIRE_GPU", "1")
    pytester.makeconftest(NO_CARD)
    pytester.makepyfile("import pytest" + NEEDS_GPU)
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(errors=2, failed=1, passed=1)
    assert failure(result, "test_marker") == [
        "VRAMPLAN_REQUIRE_GPU=1, but no GPU memory can be measured: no card today"
    ]


def test_skipped_without_torch(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makeconftest(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'torch' else find(name)"
    )
    pytester.makepyfile("import pytest" + NEEDS_GPU)
    result = pytester.runpytest_subprocess(*PLUGIN, "-rs")
    result.assert_outcomes(skipped=3, passed=1)
    result.stdout.fnmatch_lines(
        ["SKIPPED *: no GPU memory can be measured: measuring needs torch: pip install "
         "'vramplan?measure?'"]
    )  # fmt: skip


# -- pytest-xdist, pytest-benchmark ----------------------------------------------------------------


def test_xdist(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    log = project.path / "log"
    body = "".join(
        REGION.replace("test_step", f"test_{n}") + "    import time; time.sleep(0.3)\n"
        for n in range(4)
    )
    write(project, body)
    card = {"log": str(log), "lock": f"fake-{project.path.name}"}
    result = run(project, "-n2", "--vram-save", "main", **card)
    result.assert_outcomes(passed=4)
    assert section(result)[-1].startswith("Saved 4 tests in .vram/")
    assert len(json.loads(saved(project).read_text())["tests"]) == 4
    events = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for _, pid in events}) == 2
    for (first, holder), (second, other) in zip(events[::2], events[1::2], strict=True):
        assert (first, second) == ("acquired", "released") and holder == other
    result = run(project, "-n2", "--vram-compare", extra=50 << 20, **card)
    result.assert_outcomes(failed=4)
    assert "Most of it: logits of lm_head." in result.stdout.str()


def test_benchmark(project: pytest.Pytester) -> None:
    pytest.importorskip("pytest_benchmark")
    write(
        project,
        """
def test_it(vram, benchmark):
    with vram.measure("step"):
        CARD.free(CARD.alloc(MIB))
    benchmark.pedantic(lambda: None)
""",
    )
    run(project, "--benchmark-json=times.json").assert_outcomes(passed=1)
    times = json.loads((project.path / "times.json").read_text())
    assert times["benchmarks"][0]["extra_info"]["vram"]["step"]["allocated"] == 1 << 20


# -- being a guest ---------------------------------------------------------------------------------


def test_nothing_heavy_is_loaded_where_nothing_is_measured(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys
        def test_it():
            heavy = {"torch", "pydantic", "numpy", "transformers", "rich", "vramplan.record"}
            assert not heavy & set(sys.modules)
        """
    )
    result = pytester.runpytest_subprocess(*PLUGIN, "-p", "no:xdist", "-p", "no:benchmark")
    result.assert_outcomes(passed=1)
    assert "vram" not in result.stdout.str().replace("vramplan", "").replace("test_", "")


def test_markers(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(*PLUGIN, "--markers")
    (line,) = (line for line in result.stdout.lines if "limit_vram" in line)
    assert line == (
        '@pytest.mark.limit_vram(size, kind="allocated"): fail the test if its peak of GPU memory '
        'is above the size, such as "11 GiB". kind: "allocated" (torch\'s max_memory_allocated), '
        '"reserved" (max_memory_reserved) or "device" (what the process holds on the card). '
        "Skipped without a GPU, unless VRAMPLAN_REQUIRE_GPU=1. (vramplan)"
    )


def test_help(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(*PLUGIN, "--help")
    lines = between(result.stdout.lines, r"GPU memory: limits and baselines \(vramplan\):", r"\S")
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert options == [
        "--vram-save=NAME", "--vram-compare=[NAME]", "--vram-fail=FIGURE:MORE,...",
        "--vram-storage=DIR", "--vram-overwrite", "--vram-spread",
    ]  # fmt: skip
    text = " ".join(" ".join(lines).split())
    assert "allocated:1%,reserved:200MiB,device:off" in text
    assert "relative to rootdir [default: .vram]." in text


# -- several GPUs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "visible", "chosen"),
    [
        ("gw0", None, "GPU-aaaa-1"),
        ("gw1", None, "GPU-bbbb-2"),
        ("gw2", None, "GPU-aaaa-1"),
        ("gw1", "1", "GPU-bbbb-2"),
        ("gw0", "", ""),
    ],
)
def test_workers_are_spread(
    monkeypatch: pytest.MonkeyPatch, worker: str, visible: str | None, chosen: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # put back afterwards
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    choose_gpu(worker)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_too_late_to_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", begun)
    with pytest.raises(UsageError, match="used CUDA before the GPU could be chosen"):
        choose_gpu("gw0")
