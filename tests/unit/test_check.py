"""What ``vramplan check`` finds in recorded runs and planted regressions, word for word."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from xml.etree import ElementTree

import planted
import pytest
from planted import NAME, RUNS, Run
from typer.testing import CliRunner, Result

import vramplan.cli
from vramplan.errors import RecordError, UnknownNameError, UsageError
from vramplan.evidence import measurement, merged, read_timeline, timeline_path
from vramplan.record import parse_record, read_record
from vramplan.regression import METRICS, Check, Checked, Measurement, check, growth, thresholds
from vramplan.report import findings
from vramplan.report.checks import code, prose, to_github, to_junit, to_markdown

UNCHANGED = ("tokens_per_s", "seconds")
HOSTILE = (
    "<img src=x onerror=alert(1)> | `x` \x1b[31m @you #1 \n::error::%0A 🚀 \u202e \ud800 &amp;]]>"
)


@pytest.fixture(autouse=True, scope="module")
def _commands() -> None:
    vramplan.cli._register([])


def run(*args: object) -> Result:
    return CliRunner().invoke(vramplan.cli.app, ["check", *map(str, args)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write(tmp_path_factory.mktemp("base"), planted.recorded()).parent


def text_of(tmp_path: Path, base: Path, variant: Run) -> str:
    planted.write(tmp_path / "now", variant)
    result = run(tmp_path / "now", base)
    assert result.exit_code == 1, result.output
    return "\n".join(line.rstrip() for line in result.output.splitlines())


# -- planted regressions ---------------------------------------------------------------------------


def test_an_extra_copy_of_the_logits(tmp_path: Path, base: Path) -> None:
    assert (
        text_of(tmp_path, base, planted.extra_logits())
        == f"""\
Worse: {NAME} needs more: peak allocated 3.90 GiB -> 4.09 GiB, +196.5 MiB (+4.9%) in backward.
Most of it: logits of loss.
Changed: transformers 5.17.0 -> 5.18.0.

at the fullest moment of backward  baseline       now      change
logits of loss                     0.58 GiB  0.77 GiB  +196.5 MiB

figure          baseline       now              change    allowed
peak allocated  3.90 GiB  4.09 GiB  +196.5 MiB (+4.9%)   20.0 MiB  worse
peak reserved   4.03 GiB  4.22 GiB  +196.5 MiB (+4.8%)  123.8 MiB  worse
device peak     4.78 GiB  4.97 GiB  +196.5 MiB (+4.0%)  244.7 MiB
As before: load peak, ready to train, growth a step, paged state.
Not judged: tokens/s, time (1 and 1 repeats; 3 each tell a difference)."""
    )


def test_the_readme_shows_it(tmp_path: Path, base: Path) -> None:
    told = text_of(tmp_path, base, planted.extra_logits())
    readme = (RUNS.parents[3] / "README.md").read_text(encoding="utf-8")
    assert f"$ vramplan check now baselines\n{told}\n```" in readme


def test_one_layer_that_keeps_its_activations(tmp_path: Path, base: Path) -> None:
    assert (
        text_of(tmp_path, base, planted.layer_keeps_activations())
        == f"""\
Worse: {NAME} needs more: peak allocated 3.90 GiB -> 3.95 GiB, +58.6 MiB (+1.5%) in backward.
Most of it: activations of gpt_neox.layers.7.

at the fullest moment of backward                           baseline       now     change
activations of gpt_neox.layers.7.attention                   8.1 MiB  20.6 MiB  +12.6 MiB
activations of gpt_neox.layers.7.mlp.dense_h_to_4h          10.0 MiB  20.0 MiB  +10.0 MiB
activations of gpt_neox.layers.7.input_layernorm             4.0 MiB  12.0 MiB   +8.0 MiB
activations of gpt_neox.layers.7.post_attention_layernorm    4.0 MiB  12.0 MiB   +8.0 MiB
activations of gpt_neox.layers.7.attention.query_key_value   8.0 MiB  16.0 MiB   +8.0 MiB
3 smaller ones                                               8.0 MiB  20.0 MiB  +12.0 MiB

figure          baseline       now             change    allowed
peak allocated  3.90 GiB  3.95 GiB  +58.6 MiB (+1.5%)   20.0 MiB  worse
peak reserved   4.03 GiB  4.09 GiB  +58.6 MiB (+1.4%)  123.8 MiB
device peak     4.78 GiB  4.84 GiB  +58.6 MiB (+1.2%)  244.7 MiB
As before: load peak, ready to train, growth a step, paged state.
Not judged: tokens/s, time (1 and 1 repeats; 3 each tell a difference)."""
    )


def test_a_doubled_load_peak(tmp_path: Path, base: Path) -> None:
    assert (
        text_of(tmp_path, base, planted.load_doubled())
        == f"""\
Worse: {NAME} needs more: load peak 0.75 GiB -> 1.51 GiB, +773.1 MiB (+100.0%) in load.
Most of it: weights of load.

at the fullest moment of load  baseline       now      change
weights of load                     0 B  0.75 GiB  +773.1 MiB

figure     baseline       now                change  allowed
load peak  0.75 GiB  1.51 GiB  +773.1 MiB (+100.0%)  7.7 MiB  worse
As before: ready to train, peak allocated, peak reserved, device peak, growth a step, paged state.
Not judged: tokens/s, time (1 and 1 repeats; 3 each tell a difference)."""
    )


def test_a_leak_of_one_percent_a_step(tmp_path: Path, base: Path) -> None:
    assert (
        text_of(tmp_path, base, planted.leaking())
        == f"""\
Worse: {NAME} needs more: growth a step 0 B -> 39.9 MiB.
Most of it: logits of loss.

left behind by a step  baseline       now     change
logits of loss              0 B  39.9 MiB  +39.9 MiB

figure          baseline       now              change    allowed
peak allocated  3.90 GiB  4.01 GiB  +119.7 MiB (+3.0%)   20.0 MiB  worse
peak reserved   4.03 GiB  4.15 GiB  +119.7 MiB (+2.9%)  123.8 MiB
device peak     4.78 GiB  4.90 GiB  +119.7 MiB (+2.4%)  244.7 MiB
growth a step        0 B  39.9 MiB           +39.9 MiB    4.0 MiB  worse
As before: load peak, ready to train, paged state.
Not judged: tokens/s, time (1 and 1 repeats; 3 each tell a difference)."""
    )


@pytest.mark.parametrize("share, outcome", [(0.0049, "same"), (0.0051, "worse"), (0.01, "worse")])
def test_the_smallest_growth_that_is_told(share: float, outcome: str) -> None:
    record, _ = planted.recorded()
    then = measurement(parse_record(record, "then"))
    record["peak_allocated_bytes"] = round(record["peak_allocated_bytes"] * (1 + share))
    assert check(measurement(parse_record(record, "now")), then, thresholds("")).outcome == outcome


# -- runs that nothing happened to -----------------------------------------------------------------


JOBS = ("gpt-j-6b-qlora-2x512", "llama-3.2-1b-qlora-4x512", "pythia-410m-full-4x512")


@pytest.mark.parametrize("job", JOBS)
def test_repeats_are_the_same(job: str) -> None:
    repeats = [measurement(read_record(RUNS / f"{job}-repeat{n}.json")) for n in range(1, 6)]
    for one in repeats:
        for other in repeats:
            assert check(one, other, thresholds("")).outcome == "same"
    early, late = merged(job, repeats[:3]), merged(job, repeats[2:])
    found = check(late, early, thresholds(""))
    assert found.outcome == "same"
    judged = {change.metric for change in found.changes if change.outcome != "not judged"}
    assert {*UNCHANGED, "allocated", "reserved", "device", "per_step"} <= judged


def test_every_record_is_as_it_is() -> None:
    for path in RUNS.glob("*.json"):
        found = measurement(read_record(path))
        assert check(found, found, thresholds("")).outcome in ("same", "not judged"), path


def test_the_same_is_told_briefly(tmp_path: Path) -> None:
    names = [f"{JOBS[2]}-repeat{n}" for n in (1, 2)]
    result = run(*(RUNS / f"{name}.json" for name in names))
    assert result.exit_code == 0
    assert (
        result.output
        == f"""\
Same: {names[0]} is as it was: peak allocated 3.59 GiB.
As before: load peak, ready to train, peak allocated, peak reserved, device peak, growth a step, \

paged state.
Not judged: tokens/s, time (1 and 1 repeats; 3 each tell a difference).
"""
    )


def test_a_slower_program_is_told_from_a_slower_moment() -> None:
    fast, slow = (Measurement("x", {"ready": 1}, {"seconds": times}) for times in
                  ((1.0, 1.1, 1.2), (1.15, 1.5, 1.6)))  # fmt: skip
    assert check(slow, fast, thresholds("")).outcome == "same"  # the repeats overlap
    slower = Measurement("x", {"ready": 1}, {"seconds": (1.3, 1.5, 1.6)})
    found = check(slower, fast, thresholds(""))
    assert findings.headline(found) == "x is slower: time 1.10 s -> 1.50 s, +400 ms (+36.4%)."
    assert check(slower, fast, thresholds("seconds:40%")).outcome == "same"


# -- what cannot be compared, and what ran out of memory -------------------------------------------


@pytest.mark.parametrize(
    "now, then, code, told",
    [
        ("gpt-j-6b-qlora-5x1024-as-rtx-3060-12gb", "gpt-j-6b-qlora-4x1024-as-rtx-3060-12gb", 1,
         "Worse: gpt-j-6b-qlora-5x1024-as-rtx-3060-12gb no longer runs: out of memory in backward, "
         "asking for 0.31 GiB.\nChanged: job.batch_size 4 -> 5."),
        ("gpt-j-6b-qlora-4x1024-as-rtx-3060-12gb", "gpt-j-6b-qlora-5x1024-as-rtx-3060-12gb", 0,
         "Better: gpt-j-6b-qlora-4x1024-as-rtx-3060-12gb runs; the baseline ran out of memory in "
         "backward, asking for 0.31 GiB.\nChanged: job.batch_size 5 -> 4."),
        ("gpt-j-6b-qlora-4x1024-as-rtx-3060-12gb", "gpt-j-6b-qlora-4x1024", 2,
         "Not compared: gpt-j-6b-qlora-4x1024-as-rtx-3060-12gb: measured elsewhere (limit: none "
         "then, as rtx-3060-12gb now)."),
        ("mistral-small-24b-qlora-4x512-no-prepare-kbit-as-rtx-4080",
         "mistral-small-24b-qlora-2x512-no-prepare-kbit-as-rtx-4080", 0, "Same: "),
        ("llama-3.2-3b-qlora-2x1024-no-prepare-kbit", "llama-3.2-1b-qlora-2x1024-smallest", 2,
         "Not compared: llama-3.2-3b-qlora-2x1024-no-prepare-kbit: measured elsewhere (limit: "
         "the smallest then, none now)."),
        ("qwen2.5-0.5b-full-2x1024-expandable-segments-true", "qwen2.5-0.5b-full-2x1024", 2,
         "Not compared: qwen2.5-0.5b-full-2x1024-expandable-segments-true: measured elsewhere "
         "(allocator: default then, expandable_segments:True now)."),
    ],
)  # fmt: skip
def test_two_records(now: str, then: str, code: int, told: str) -> None:
    result = run(RUNS / f"{now}.json", RUNS / f"{then}.json")
    assert result.output.startswith(told)
    assert result.exit_code == code


def test_the_module_that_ran_out_of_memory_is_named() -> None:
    name = "gpt-neox-20b-qlora-5x1024-as-rtx-3090-24gb"
    assert measurement(read_record(RUNS / f"{name}.json")).failed == (
        "out of memory in backward of gpt_neox.layers.43.mlp.dense_4h_to_h, asking for 0.28 GiB"
    )


@pytest.mark.parametrize(
    "status, error, told",
    [
        ("timeout", None, "timeout in load"),
        ("error", "Traceback\nValueError: no\n", "error in load: ValueError: no"),
        ("skipped", "the estimate needs more", "skipped: the estimate needs more"),
        ("skipped", None, "skipped: no reason given"),
        ("oom", None, "out of memory in load"),
    ],
)
def test_runs_that_did_not_end_well(status: str, error: str | None, told: str) -> None:
    record, _ = planted.recorded()
    good = measurement(parse_record(record, "then"))
    failed = record | {"status": status, "error": error, "phase": "load"}
    now = measurement(parse_record(failed, "now"))
    assert now.failed == told
    found = check(now, good, thresholds(""))
    assert found.outcome == ("worse" if status == "oom" else "not judged")


def test_nothing_in_common_is_no_pass() -> None:
    record, _ = planted.recorded()
    bare = {name: record[name] for name in ("schema_version", "name", "model", "config", "job",
                                            "run", "gpu", "status")}  # fmt: skip
    found = measurement(parse_record(bare, "bare"))
    result = check(found, found, thresholds(""))
    assert (result.outcome, result.refused) == ("not judged", "no figure that both have")


def test_a_changed_job_and_version_are_named() -> None:
    record, _ = planted.recorded()
    then = measurement(parse_record(record, "then"))
    record["versions"] |= {"transformers": "5.18.0", "peft": None}
    record["job"]["prepare_kbit"] = False
    record["config"]["vocab_size"] = 50305
    record["gpu"]["driver"] = "590.1"
    record["run"]["history"] = False
    found = check(measurement(parse_record(record, "now")), then, thresholds(""))
    assert findings.versions_text(found) == (
        "transformers 5.17.0 -> 5.18.0, peft 0.21.0 -> none, driver 580.159.04 -> 590.1, "
        "config.vocab_size 50304 -> 50305, job.prepare_kbit True -> False, "
        "run.history True -> False"
    )


def test_a_record_older_than_an_option_differs_in_nothing() -> None:
    record, _ = planted.recorded()
    assert "alloc_conf" not in record["job"]
    now = json.loads(json.dumps(record))
    now["job"] |= {"alloc_conf": "", "evaluate": False}
    found = [measurement(parse_record(document, "it")) for document in (now, record)]
    assert found[0].versions == found[1].versions


# -- evidence --------------------------------------------------------------------------------------


def test_what_a_timeline_knows() -> None:
    path = RUNS / f"{NAME}.json"
    record = read_record(path)
    found = measurement(record, read_timeline(timeline_path(path)))
    held = {name: sum(sizes.values()) for name, sizes in found.moments.items()}
    assert held == {
        "load": 810669056, "prepare": 810703872, "forward": 3673244672, "loss": 4085353472,
        "backward": 4184164864, "step": 3312074240,
    }  # fmt: skip
    assert record.ready_bytes == 810669568
    assert sum(found.ready.values()) - 810669568 == 25088  # the first batch
    assert sum(found.peak.values()) == held["backward"]
    assert not found.left


def test_no_recorded_run_leaks() -> None:
    for path in sorted(RUNS.glob("*.timeline.json.gz")):
        record = read_record(path.with_name(path.name.replace(".timeline.json.gz", ".json")))
        found = measurement(record, read_timeline(path))
        assert sum(found.left.values()) <= 1024, path
        assert abs(found.figures["per_step"]) <= 25600, path


def test_paging_is_compared_only_where_it_was_measured() -> None:
    record = read_record(RUNS / "gpt-j-6b-qlora-1x512-save-paging.json")
    assert record.paging is not None
    assert measurement(record).figures["paging"] > 0
    blind = record.paging.model_copy(update={"measured": False})
    assert "paging" not in measurement(record.model_copy(update={"paging": blind})).figures


def test_repeats_must_be_of_one_run() -> None:
    record, _ = planted.recorded()
    one = measurement(parse_record(record, "one"))
    record["job"]["batch_size"] = 4
    with pytest.raises(RecordError, match=r"they differ in job\.batch_size"):
        merged("x", [one, measurement(parse_record(record, "two"))])


def test_one_repeat_that_ran_out_of_memory_is_not_hidden() -> None:
    good = Measurement("x-repeat1", {"ready": 5})
    bad = Measurement("x-repeat2", {"ready": 4}, failed="out of memory in loss", oom=True)
    error = Measurement("x-repeat3", failed="timeout")
    found = merged("x", [good, error, bad])
    assert (found.figures, found.failed, found.oom) == ({"ready": 5}, bad.failed, True)


def test_layers_that_grow_alike_are_one() -> None:
    after = {("activations", f"m.layers.{n}.mlp"): 30 for n in range(4)} | {("logits", "head"): 5}
    before = {("activations", f"m.layers.{n}.mlp"): 20 for n in range(4)} | {("logits", "head"): 9}
    (found,) = growth(after, before)
    assert findings.growth_name(found) == "activations of m.layers.*.mlp (4 layers)"
    assert (found.before_bytes, found.after_bytes) == (80, 120)


@pytest.mark.parametrize(
    "grown, told",
    [
        ({("logits", "loss"): 100}, "logits of loss"),
        ({("logits", "loss"): 95, ("activations", "m.norm"): 5}, "logits of loss"),
        ({("logits", "loss"): 50, ("activations", "m.norm"): 50}, ""),
        ({("weights", "m.layers.0.a"): 50, ("activations", "m.layers.0.b"): 50}, "m.layers.0"),
        ({("weights", "m.norm"): 50, ("weights", "m.head"): 50}, ""),
    ],
)
def test_the_culprit_is_what_most_is_in(grown: dict[tuple[str, str], int], told: str) -> None:
    assert findings.culprit(growth(grown, {})) == told


@pytest.mark.parametrize("text", ["allocated", "allocated:x", "tokens_per_s:10%,", "paged:-5%"])
def test_thresholds_that_cannot_be_read(text: str) -> None:
    if text.startswith("tokens"):
        assert thresholds(text)
        return
    with pytest.raises(UsageError):
        thresholds(text)


def test_fail_words(tmp_path: Path, base: Path) -> None:
    now = planted.write(tmp_path, planted.extra_logits())
    assert run(now, base / now.name, "--fail", "allocated:5%,reserved:200MiB").exit_code == 0
    assert run(now, base / now.name, "--fail", "allocated:off,reserved:196MiB").exit_code == 1
    with pytest.raises(UnknownNameError, match="did you mean allocated"):
        thresholds("alocated:1%")
    assert set(thresholds("")) == set(METRICS)


# -- folders ---------------------------------------------------------------------------------------


def test_folders_are_compared_by_name(tmp_path: Path) -> None:
    then, now = tmp_path / "then", tmp_path / "now"
    for job in JOBS:
        for number in range(1, 6):
            name = f"{job}-repeat{number}"
            record = json.loads((RUNS / f"{name}.json").read_text())
            for folder in (then, now):
                folder.mkdir(exist_ok=True)
                if folder is now and job == JOBS[1] and number == 3:
                    record["peak_allocated_bytes"] += 2**28  # one repeat is enough
                (folder / f"{number} {job}.json").write_text(json.dumps(record))
    assert run(now, then).exit_code == 1
    assert "its own baseline" in str(run(then, then).exception)
    lone = json.loads((RUNS / "gpt2-full-8x512.json").read_text())
    (then / "lone.json").write_text(json.dumps(lone))
    (now / "more.json").write_text(json.dumps(lone | {"name": "more"}))
    result = run(now, then)
    assert result.exit_code == 1
    assert [line.rstrip() for line in result.output.splitlines()] == [
        "Of 5 measurements 1 is worse, 2 are as they were, 1 is missing, 1 is new.",
        "",
        "Worse: llama-3.2-1b-qlora-4x512 needs more: peak allocated 5.25 GiB -> 5.50 GiB, "
        "+256.0 MiB (+4.8%) in backward.",
        "",
        "figure          baseline       now              change   allowed",
        "peak allocated  5.25 GiB  5.50 GiB  +256.0 MiB (+4.8%)  26.9 MiB  worse",
        "As before: load peak, ready to train, peak reserved, device peak, growth a step, paged "
        "state,",
        "tokens/s, time.",
        "",
        "Missing",
        "gpt2-full-8x512",
        "",
        "New",
        "more",
    ]
    for number in range(1, 6):
        (now / f"{number} {JOBS[1]}.json").write_text(
            (then / f"{number} {JOBS[1]}.json").read_text()
        )
    assert run(now, then).exit_code == 2  # a baseline without its measurement is no pass
    (then / "lone.json").unlink()
    assert run(now, then).exit_code == 0


# -- formats ---------------------------------------------------------------------------------------


def test_markdown(tmp_path: Path, base: Path) -> None:
    planted.write(tmp_path, planted.extra_logits())
    result = run(tmp_path, base, "--format", "markdown")
    assert result.exit_code == 1
    assert (
        result.output
        == f"""\
❌ **vramplan check:** {NAME} needs more: peak allocated 3.90 GiB -> 4.09 GiB, +196.5 MiB (+4.9%) \
in backward.

| measurement | figure | baseline | now | change | allowed | |
|---|---|--:|--:|--:|--:|---|
| `{NAME}` | peak allocated | 3.90 GiB | 4.09 GiB | +196.5 MiB (+4.9%) | 20.0 MiB | worse |
|  | peak reserved | 4.03 GiB | 4.22 GiB | +196.5 MiB (+4.8%) | 123.8 MiB | worse |
|  | device peak | 4.78 GiB | 4.97 GiB | +196.5 MiB (+4.0%) | 244.7 MiB |  |

<details>
<summary>Details</summary>

Most of it: `logits of loss`

| at the fullest moment of backward | baseline | now | change |
|---|--:|--:|--:|
| `logits of loss` | 0.58 GiB | 0.77 GiB | +196.5 MiB |

| differs | baseline | now |
|---|---|---|
| `transformers` | `5.17.0` | `5.18.0` |

Not judged: tokens/s, time (1 and 1 repeats; 3 each tell a difference).

</details>
"""
    )
    assert run(base / f"{NAME}.json", RUNS / f"{NAME}.json", "--format", "markdown").output == (
        f"✅ **vramplan check:** {NAME} is as it was: peak allocated 3.90 GiB.\n"
    )


def test_github(tmp_path: Path, base: Path) -> None:
    planted.write(tmp_path, planted.extra_logits())
    assert run(tmp_path, base, "--format", "github").output == (
        f"::error title=Needs more memory::{NAME} needs more: peak allocated 3.90 GiB -> 4.09 GiB, "
        "+196.5 MiB (+4.9%25) in backward.%0AMost of it: logits of loss.%0A+196.5 MiB logits of "
        "loss%0AChanged: transformers 5.17.0 -> 5.18.0.%0Apeak allocated: 3.90 GiB -> 4.09 GiB, "
        "+196.5 MiB (+4.9%25), allowed 20.0 MiB, worse%0Apeak reserved: 4.03 GiB -> 4.22 GiB, "
        "+196.5 MiB (+4.8%25), allowed 123.8 MiB, worse%0Adevice peak: 4.78 GiB -> 4.97 GiB, "
        "+196.5 MiB (+4.0%25), allowed 244.7 MiB\n"
    )
    both = Checked((Check("a"), Check("b")), missing=("c",), new=("d",))
    assert to_github(both) == (
        "::error title=Missing::c: only the baseline has it\n"
        "::notice title=New::d has no baseline yet\n"
        "::error title=vramplan check::Of 4 measurements 2 are as they were, 1 is missing, "
        "1 is new.\n"
    )


def test_junit() -> None:
    checks = (Check("a", failed="out of memory in loss"), Check("b"), Check("c", refused="why"))
    assert (
        to_junit(Checked(checks, missing=("d",), new=("e",)))
        == """\
<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="vramplan" tests="5" failures="1" errors="2" skipped="1">
<testsuite name="vramplan check" tests="5" failures="1" errors="2" skipped="1">
<testcase classname="vramplan.check" name="a"><failure message="a no longer runs: out of memory in \
loss.">a no longer runs: out of memory in loss.</failure></testcase>
<testcase classname="vramplan.check" name="b"><system-out>b is as it was.</system-out></testcase>
<testcase classname="vramplan.check" name="c"><error message="c: why.">c: why.</error></testcase>
<testcase classname="vramplan.check" name="d"><error message="missing">only the baseline has it\
</error></testcase>
<testcase classname="vramplan.check" name="e"><skipped message="no baseline yet"></skipped>\
</testcase>
</testsuite>
</testsuites>
"""
    )


def test_json(tmp_path: Path, base: Path) -> None:
    planted.write(tmp_path, planted.extra_logits())
    result = run(tmp_path, base, "--json")
    document = json.loads(result.output)
    assert document == json.loads(run(tmp_path, base, "--format", "json").output)
    assert (document["schema_version"], document["outcome"]) == (1, "worse")
    (found,) = document["checks"]
    assert found["phase"] == "backward"
    assert found["grown"] == [
        {"kind": "logits", "owner": "loss", "num_layers": 0, "before_bytes": 618137600,
         "after_bytes": 824182784}
    ]  # fmt: skip
    allocated = next(change for change in found["changes"] if change["metric"] == "allocated")
    assert allocated["after"] - allocated["before"] == planted.LOGITS_BYTES


def hostile() -> Checked:
    """Names, reasons, modules and versions that want to be markup."""
    record = planted.extra_logits()[0]
    record["name"] = record["model"] = HOSTILE
    record["versions"][HOSTILE] = HOSTILE
    then = measurement(parse_record(planted.recorded()[0], "then"))
    now = measurement(parse_record(record, "now"))
    grown = growth({(HOSTILE, HOSTILE): 9}, {})
    found = check(now, then, thresholds(""))
    return Checked(
        (Check(found.name, found.changes, grown, found.versions, HOSTILE),
         Check(HOSTILE, refused=HOSTILE), Check(HOSTILE, failed=HOSTILE)),
        missing=(HOSTILE,), new=(HOSTILE,),
    )  # fmt: skip


def test_hostile_names_are_only_text() -> None:
    xml = to_junit(hostile())
    assert "<img" not in xml
    cases = ElementTree.fromstring(xml.encode()).findall(".//testcase")
    assert [case.get("name", "")[:10] for case in cases] == [HOSTILE[:10]] * 5
    github = to_github(hostile())
    assert all(line.startswith(("::error title=", "::notice title="))
               for line in github.splitlines())  # fmt: skip
    markdown = to_markdown(hostile())
    for text in (xml, github, markdown):
        text.encode()
        assert not {"\x1b", "\u202e", "\ud800", "\r"} & set(text)
    outside = "".join(part for n, part in enumerate(markdown.split("`")) if n % 2 == 0)
    assert "<img" not in outside and "@you" not in outside.replace("&#64;you", "")
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in tables} == {5, 4, 8}


@pytest.mark.parametrize(
    "text, told",
    [
        ("plain-1.5", "`plain-1.5`"),
        ("a|b", "<code>a&#124;b</code>"),
        ("a`b<i>", "<code>a&#96;b&#60;i&#62;</code>"),
        ("", "<code>(no name)</code>"),
        ("two\nlines", "`two\N{REPLACEMENT CHARACTER}lines`"),
    ],
)
def test_names_in_markdown(text: str, told: str) -> None:
    assert code(text) == told


def test_prose_in_markdown() -> None:
    assert prose("@me *see* http://x") == "@&#8203;me &#42;see&#42; http&#58;//x"


def test_files_of_every_format(tmp_path: Path, base: Path) -> None:
    now = planted.write(tmp_path, planted.extra_logits())
    paths = [tmp_path / f"out.{suffix}" for suffix in ("md", "xml", "json")]
    args = [word for path in paths for word in ("-o", path)]
    result = run(now, base / now.name, *args, "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert paths[0].read_text() == run(now, base / now.name, "--format", "markdown").stdout
    assert ElementTree.parse(paths[1]).getroot().get("failures") == "1"
    assert json.loads(paths[2].read_text())["outcome"] == "worse"
    again = run(now, base / now.name, *args)
    assert isinstance(again.exception, RecordError) and "--force" in str(again.exception)
    assert run(now, base / now.name, *args, "--force").exit_code == 1


@pytest.mark.parametrize(
    "args, told",
    [
        (["--format", "html"], "unknown format 'html'"),
        (["--json", "--format", "junit"], "choose one"),
        (["-o", "report.txt"], "must end in .md, .xml, .json"),
        (["--fail", "allocated:-1%"], "cannot read allocated:-1%"),
    ],
)
def test_usage(args: list[str], told: str, base: Path) -> None:
    result = run(base, RUNS, *args)
    assert isinstance(result.exception, UsageError) and told in str(result.exception)


def test_a_timeline_is_optional(tmp_path: Path, base: Path) -> None:
    now = planted.write(tmp_path, planted.extra_logits())
    timeline_path(now).unlink()
    result = run(tmp_path, base)
    assert result.exit_code == 1
    assert "Most of it" not in result.output
    with gzip.open(timeline_path(now), "wt") as file:  # folded, as an estimate
        json.dump(planted.extra_logits()[1] | {"sections": [{"repeats": 2, "events": []}]}, file)
    assert run(tmp_path, base).exit_code == 1
