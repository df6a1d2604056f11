"""Many jobs on many cards: the same answers as one by one, and clear words where there are none."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vramplan.catalogue import find_model
from vramplan.cli.compare import form
from vramplan.close_up import chosen, look_closely
from vramplan.comparing import compare
from vramplan.comparison import COLUMNS, Comparison, cost_per_million_tokens
from vramplan.errors import UsageError
from vramplan.gpus import find_gpu
from vramplan.job import Job
from vramplan.prediction import job_for, judge, predict, usable_bytes
from vramplan.record import Record, parse_record
from vramplan.report.charts import grouped
from vramplan.report.comparison import comparison_page, speed
from vramplan.report.page import Toned, to_html, to_markdown
from vramplan.resources import profiles_dir

RUNS = profiles_dir() / "calibrations" / "h100-sxm-80gb" / "runs"
CARDS = ("rtx-3060-12gb", "t4-16gb", "v100-32gb", "rtx-5090-32gb", "h100-sxm-80gb")
JOBS = tuple(Job(method=method) for method in ("qlora", "lora", "full"))
TINY = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "max_position_embeddings": 2048,
}  # fmt: skip
NAME = "<img src=x onerror=alert(1)>'\"\n🚀 & $x$ | *b*"


def record(**values: Any) -> Record:
    document = {
        "schema_version": 1, "name": "one", "model": "tiny", "config": TINY,
        "job": {"method": "qlora", "seq_len": 256}, "status": "done",
    }  # fmt: skip
    return parse_record(document | values, "test")


def small(**names: str) -> Comparison:
    """One tiny model, under any name, on two cards."""
    model = replace(find_model("pythia-70m"), **names) if names else find_model("pythia-70m")
    return compare([model], ["3060", "t4"], [Job(seq_len=256)])


@pytest.fixture(scope="module")
def both() -> Comparison:
    return compare(["gpt-j-6b", "llama-3.1-8b"], CARDS, JOBS)


# -- the numbers ---------------------------------------------------------------------------------


def test_every_entry_is_what_fit_says(both: Comparison) -> None:
    assert len(both.entries) == 2 * 3 * len(CARDS)
    for entry in both.entries[:: len(CARDS) - 1]:  # sharing predictions must not show
        gpu = find_gpu(entry.gpu.slug)
        usable = usable_bytes(gpu)
        assert usable is not None
        alone = predict(entry.model, entry.job, gpu)
        verdict = judge(alone, gpu.slug, usable)
        assert (entry.verdict, entry.headroom_bytes) == (verdict.verdict, verdict.headroom_bytes)
        assert entry.device_peak_bytes == alone.device_peak_bytes
        assert entry.job == job_for(entry.job, gpu)


def test_parts_sum_to_the_device_peak(both: Comparison) -> None:
    for entry in both.entries:
        assert sum(entry.parts.values()) == entry.device_peak_bytes
        assert sum(grouped(entry.parts).values()) == entry.device_peak_bytes
        assert min(entry.parts.values()) > 0


def test_largest_batch_is_the_last_that_fits(both: Comparison) -> None:
    entry = next(e for e in both.entries if e.gpu.slug == "rtx-5090-32gb")
    assert entry.largest_batch_size is not None and entry.usable_bytes is not None
    like = predict(entry.model, entry.job, entry.gpu)

    def takes(batch_size: int) -> int:
        job = entry.job.but(batch_size=batch_size)
        return predict(entry.model, job, entry.gpu, like=like).device_peak_bytes

    assert takes(entry.largest_batch_size) <= entry.usable_bytes
    assert takes(entry.largest_batch_size + 1) > entry.usable_bytes


def test_nothing_fits_where_not_even_one_does(both: Comparison) -> None:
    entry = next(e for e in both.entries if e.job.method == "full" and e.gpu.slug == CARDS[0])
    assert entry.verdict == "no"
    assert entry.largest_batch_size is entry.largest_seq_len is None


def test_a_smaller_batch_than_the_one_asked_for_is_found() -> None:
    (entry,) = compare(["gpt-j-6b"], ["3060"], [Job(batch_size=8)]).entries
    assert entry.verdict == "no" and entry.largest_batch_size == 3


def test_rows_have_every_column(both: Comparison) -> None:
    kept = compare(records=[record()])
    for row in (*both.rows(), *kept.rows()):
        assert tuple(row) == COLUMNS


def test_a_frame_has_the_same_rows(both: Comparison) -> None:
    pandas = pytest.importorskip("pandas")
    frame = both.to_frame()
    assert list(frame.columns) == list(COLUMNS)
    rows = both.rows()
    assert [int(n) for n in frame["device_peak_bytes"]] == [r["device_peak_bytes"] for r in rows]
    assert frame["emulated_gpu"].isna().all() and pandas.isna(frame["run"][0])


def test_cost() -> None:
    assert cost_per_million_tokens(3.6, 1000.0) == pytest.approx(1.0)
    assert cost_per_million_tokens(None, 1000.0) is cost_per_million_tokens(1.0, None) is None


def test_speed_is_shown_where_it_is_predicted(both: Comparison) -> None:
    entries = tuple(
        replace(entry, step_time_s=None, tokens_per_s=None, extrapolated=False)
        for entry in both.entries[:2]
    )
    assert not speed(entries).headings and "not predicted" in speed(entries).text
    told = (replace(entries[0], tokens_per_s=1000.0, price_per_hour=3.6), entries[1])
    cells = [cell for row in speed(told).rows for cell in row[1:]]
    assert cells == ["1,000\nat 1.00", "not predicted"]


def test_jobs_are_named_by_what_tells_them_apart() -> None:
    jobs = [Job(lora_r=8), Job(lora_r=64), Job(method="full"), Job(method="full", dtype="fp32")]
    comparison = compare(["pythia-70m"], ["t4", "3060"], [job.but(seq_len=256) for job in jobs])
    assert len(comparison.entries) == 8
    rows = comparison_page(comparison, {}, draw=False).tables[0].rows
    assert [row[0] for row in rows] == [
        "pythia-70m QLoRA --lora-r 8", "pythia-70m QLoRA --lora-r 64",
        "pythia-70m full --dtype bf16", "pythia-70m full --dtype fp32",
    ]  # fmt: skip


# -- records -------------------------------------------------------------------------------------


def test_an_oom_record_says_where_it_ended() -> None:
    (run,) = compare(
        records=[record(status="oom", oom={"phase": "loss", "requested_bytes": 512})]
    ).runs
    assert run.ending == "out of memory in loss"
    measured, predicted = compare(records=[run.record]).rows()
    assert measured["status"] == "oom" and measured["note"] == "out of memory in loss"
    assert predicted["witness"] == "estimate" and predicted["peak_allocated_bytes"] > 0


def test_a_record_without_a_gpu_is_shown() -> None:
    comparison = compare(records=[record(run={"device": "cpu"})])
    page = comparison_page(comparison, {}, draw=False)
    assert comparison.runs[0].card == "no GPU"
    assert "no GPU" in to_markdown(page)


def test_a_record_of_an_unknown_family_says_why_nothing_is_predicted() -> None:
    comparison = compare(records=[record(config={"model_type": "nobody-knows"})])
    assert comparison.runs[0].why_not.startswith("not predicted: unknown")
    assert "nobody-knows" in to_markdown(comparison_page(comparison, {}, draw=False))
    (row,) = comparison.rows()
    assert row["witness"] == "measure" and "nobody-knows" in row["note"]


def test_records_on_cards_are_predicted_there() -> None:
    comparison = compare(gpus=["t4", "3060"], records=[record(), record(name="two")])
    assert [e.gpu.slug for e in comparison.entries] == ["t4-16gb", "rtx-3060-12gb"]
    assert len(comparison.runs) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to compare"),
        ((["gpt-j-6b"],), "--gpu"),
        ((["gpt-j-6b"], ["t4"], []), "nothing"),
    ],
)
def test_an_empty_selection_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compare(*arguments)


# -- the forms -----------------------------------------------------------------------------------


def test_names_are_text_everywhere() -> None:
    pytest.importorskip("matplotlib")
    comparison = small(name=NAME)
    comparison = replace(comparison, runs=compare(records=[record(name=NAME, model=NAME)]).runs)
    html = form(comparison, ".html")
    assert "<img" not in html and "&lt;img src=x" in html and "🚀" in html
    assert "\\<img" in form(comparison, ".md") and "\n🚀" not in form(comparison, ".md")
    rows = list(csv.DictReader(io.StringIO(form(comparison, ".csv"))))
    assert {row["model"] for row in rows} == {NAME}
    assert json.loads(form(comparison, ".json"))["rows"][0]["model"] == NAME


@pytest.mark.parametrize("name", ["=1+1", "@SUM(A1)", "+1 more", "-cmd"])
def test_no_name_becomes_a_formula(name: str) -> None:
    rows = list(csv.DictReader(io.StringIO(form(small(name=name), ".csv"))))
    assert {row["model"] for row in rows} == {f"'{name}"}


def test_csv_names_its_units(both: Comparison) -> None:
    first = next(csv.DictReader(io.StringIO(form(both, ".csv"))))
    sizes = {key for key, value in first.items() if key.endswith(", GiB")}
    assert {"usable, GiB", "device peak, GiB", "to spare, GiB"} <= sizes
    assert float(first["device peak, GiB"]) == pytest.approx(
        both.entries[0].device_peak_bytes / 1024**3, abs=1e-4
    )


def test_json_says_where_it_comes_from(both: Comparison) -> None:
    document = json.loads(form(both, ".json"))
    assert document["schema_version"] == 1
    assert {"command", "created", "commit", "vramplan"} <= document.keys()
    assert len(document["rows"]) == len(both.entries)
    assert document["rows"][0]["parts"]["weights"] > 0
    assert document["rows"][0]["tokens_per_s"] > 0
    assert document["rows"][0]["cost_per_million_tokens"] is None  # unknown is null, never 0


def test_more_cards_than_jobs_go_down(both: Comparison) -> None:
    entries = [e for e in both.entries if e.job.method == "qlora"]
    page = comparison_page(Comparison(tuple(entries)), {}, draw=False)
    assert page.tables[0].headings == ("card", "gpt-j-6b QLoRA", "llama-3.1-8b QLoRA")
    wide = comparison_page(both, {}, draw=False)
    assert wide.tables[0].headings == ("job", *CARDS)


def test_a_verdict_is_never_colour_alone(both: Comparison) -> None:
    for row in comparison_page(both, {}, draw=False).tables[0].rows:
        for cell in row[1:]:
            assert isinstance(cell, Toned) and cell.split()[1] == cell.tone


def test_the_page_asks_for_nothing_from_outside(both: Comparison) -> None:
    pytest.importorskip("matplotlib")
    html = to_html(comparison_page(both, {"command": "vramplan compare"}, draw=True))
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert "default-src 'none'" in html


# -- the command ---------------------------------------------------------------------------------


def command(folder: Path, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """``vramplan compare`` in a folder, as if a package were not installed."""
    code = (
        "import sys\n"
        f"for name in {without.split()!r}: sys.modules[name] = None\n"
        f"sys.argv = ['vramplan', 'compare', *{list(arguments)!r}]\n"
        "from vramplan.cli import main\nmain()"
    )
    run = [sys.executable, "-c", code]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)


WORDS = ("--model", "pythia-70m", "--gpu", "3060", "--method", "qlora,full", "--seq-len", "256")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to compare"),
        (("--model", "gpt-j-6b"), "--gpu"),
        ((*WORDS, "-o", "x.pdf"), "must end in .html, .md, .csv, .json"),
        ((*WORDS, "-o", "kept.md"), "replace it with --force"),
        ((*WORDS, "-o", "kept.md/x.md"), "cannot write"),
        ((*WORDS, "-o", "folder.md"), "it is a folder"),
        ((*WORDS, "--price", "3060:1"), "CARD=PRICE"),
        (("newer.json",), "schema_version 99"),
        (("kept.md",), "cannot be read as a record"),
        (("nowhere.json",), "cannot be read as a record"),
        (("folder.md",), "holds no records"),
    ],
)
def test_mistakes_get_one_clear_line(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "kept.md").write_text("kept")
    (tmp_path / "folder.md").mkdir()
    newer = record().model_dump(mode="json") | {"schema_version": 99}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    done = command(tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "kept.md").read_text() == "kept"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_a_page_says_what_to_install(tmp_path: Path, package: str) -> None:
    done = command(tmp_path, *WORDS, "-o", "x.html", without=package)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"needs {package}: pip install 'vramplan[report]'" in done.stderr


def test_the_core_alone_gives_a_table_and_every_other_form(tmp_path: Path) -> None:
    out = ("-o", "a.md", "-o", "a.csv", "-o", "a.json")
    heavy = "jinja2 matplotlib pandas torch numpy"
    shown = command(tmp_path, *WORDS, without=heavy)
    assert shown.returncode == 0 and "pythia-70m" in shown.stdout and "fits" in shown.stdout
    done = command(tmp_path, *WORDS, *out, without=heavy)
    assert done.returncode == 0 and not done.stdout
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 2
    assert "## Verdicts" in (tmp_path / "a.md").read_text()


def test_records_from_files(tmp_path: Path) -> None:
    names = ("gpt-j-6b-qlora-1x512-smallest", "gpt-j-6b-qlora-5x1024-as-rtx-3060-12gb")
    done = command(tmp_path, *(str(RUNS / f"{name}.json") for name in names))
    assert done.returncode == 0
    assert "done" in done.stdout and "out of memory" in " ".join(done.stdout.split())


def test_the_heat_map_says_what_fit_says(both: Comparison) -> None:
    entry = chosen(both)
    assert entry is not None and entry.usable_bytes is not None
    assert (entry.gpu.slug, entry.verdict) == (CARDS[0], "fits")
    close = look_closely(entry)
    seen = set()
    for line in close.tiles:
        for tile in line:
            job = entry.job.but(batch_size=tile.batch_size, seq_len=tile.seq_len)
            alone = judge(predict(entry.model, job, entry.gpu), "", entry.usable_bytes)
            assert tile.verdict == alone.verdict
            seen.add(tile.verdict)
    assert seen == {"fits", "tight", "no"}
