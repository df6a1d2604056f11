"""The accuracy record is what its command makes, and the README quotes it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vramplan import foretold
from vramplan.accuracy import rows
from vramplan.accuracy_tables import accuracy_page, beforehand, repeats, summary
from vramplan.cli.accuracy import FORMS, form
from vramplan.cli.measured import print_run
from vramplan.errors import RecordError
from vramplan.evidence import read_timeline
from vramplan.ratchet import read_errors, worse
from vramplan.record import read_record
from vramplan.report.page import Page, Table, table_to_markdown, to_html, to_markdown
from vramplan.resources import profiles_dir

ROOT = profiles_dir().parent
FOLDER = profiles_dir() / "calibrations" / "h100-sxm-80gb"
ROWS = rows(FOLDER)


def test_committed_report_is_up_to_date() -> None:
    page = accuracy_page(FOLDER)
    for suffix in FORMS:
        committed = (ROOT / "reports" / f"accuracy{suffix}").read_text(encoding="utf-8")
        assert form(page, suffix) == committed


def test_no_figure_got_worse_than_committed() -> None:
    assert worse(ROWS, read_errors(ROOT / "reports" / "accuracy.csv")) == []


def test_a_figure_that_got_worse_is_named() -> None:
    """Half a percent better before: the change is found, and on which figure."""
    committed = read_errors(ROOT / "reports" / "accuracy.csv")
    name = max(committed["peak reserved"], key=lambda run: abs(committed["peak reserved"][run]))
    error = committed["peak reserved"][name]
    committed["peak reserved"] = {name: error / 2}
    found = worse(ROWS, {"peak reserved": committed["peak reserved"]})
    assert {each.statistic for each in found} >= {"median", "90 % within", "worst"}
    assert str(found[0]).startswith("peak reserved, median: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("run,a\nx,1\n", "is not an accuracy record"),
        ('run,"ready, MiB",error\nx,1.0,much\n', "cannot be read"),
        ('run,"ready, MiB",error\nx\n', "cannot be read"),
        ("\0", "is not an accuracy record"),
    ],
)
def test_a_broken_record_is_no_ratchet(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "record.csv"
    path.write_text(text)
    with pytest.raises(RecordError, match=words):
        read_errors(path)


def test_predictions_written_beforehand_are_compared_as_they_stood() -> None:
    """The table holds the committed numbers, not today's."""
    for written in foretold.rounds(FOLDER):
        table = {row[0]: row for row in beforehand(ROWS, written).rows}
        names = {row.record.name for row in ROWS} & written.predictions.keys()
        assert len(names) >= 20 and int(table["peak allocated"][1]) <= len(names)
        name = table["peak reserved"][-1]
        record = next(row.record for row in ROWS if row.record.name == name)
        assert record.peak_reserved_bytes is not None
        error = written.predictions[name].peak_reserved_bytes / record.peak_reserved_bytes - 1
        assert f"{100 * error:+.2f} %" == table["peak reserved"][-2]


def test_predicting_a_matrix_leaves_out_what_is_measured(tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.toml"
    matrix.write_text(
        '[[run]]\nmodel = "gpt-j-6b"\nbatch_size = 4\n[[run]]\nmodel = "pythia-70m"\n'
    )
    out = tmp_path / "predictions.json"
    done = subprocess.run(
        [sys.executable, "-m", "vramplan.cli", "accuracy", "--predict", matrix, "-o", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(foretold.read(out).predictions) == {"pythia-70m-qlora-1x1024"}


def test_readme_quotes_the_summary() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in table_to_markdown(summary(ROWS)):
        assert line in readme


def test_readme_shows_a_recorded_run() -> None:
    """What the README prints of a measurement is what the command prints of its record."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    name = "gpt-j-6b-qlora-4x1024-as-rtx-3060-12gb"
    shown = io.StringIO()
    print_run(Console(file=shown, width=100), read_record(FOLDER / "runs" / f"{name}.json"))
    assert "\n".join(line.rstrip() for line in shown.getvalue().splitlines()) in readme


def test_readme_quotes_the_largest_model_that_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    record = read_record(FOLDER / "runs" / "llama-65b-qlora-1x512.json")
    assert record.peak_allocated_bytes is not None
    assert f"{record.peak_allocated_bytes / 1024**3:.1f} GiB allocated at 1 x 512" in readme


def test_enough_is_recorded() -> None:
    """Breadth of the shipped measurements, and that each says where it comes from."""
    found = [row.record for row in ROWS]
    done = [record for record in found if record.status == "done"]

    def seen(key: str) -> set[object]:
        return {record.job[key] for record in done if isinstance(record.job[key], (str, int))}

    assert len(found) >= 40 and len({r.config["model_type"] for r in done}) >= 5
    assert seen("method") == {"full", "lora", "qlora"}
    assert seen("gradient_checkpointing") == seen("prepare_kbit") == {True, False}
    assert seen("batch_size") >= {1, 2, 4, 8} and seen("seq_len") >= {256, 512, 1024, 2048, 4096}
    assert len(seen("optim")) >= 6 and len(seen("lora_r")) >= 3
    assert "eager" in {record.job["attn_implementation"] for record in done}
    assert sum(record.limit_search is not None for record in done) >= 8
    assert sum(record.paging is not None and record.paging.measured for record in done) >= 4
    assert sum(record.run.evaluate and record.run.save for record in done) >= 4
    assert sum(record.run.history for record in done) >= 10
    for record in found:
        assert record.versions["torch"] and record.gpu.driver and record.command and record.commit


def test_every_history_is_there_and_reads() -> None:
    for row in ROWS:
        path = FOLDER / "runs" / f"{row.record.name}.timeline.json.gz"
        assert path.exists() == row.record.run.history
        if row.record.run.history:
            assert read_timeline(path).peak().nbytes > 0


def test_repeated_runs_agree_to_the_byte() -> None:
    found = repeats(ROWS).rows
    assert len(found) == 3
    assert all(cell.endswith("equal") for row in found for cell in row[2:4])


def test_paging_that_was_asked_for_moved_the_paged_bytes() -> None:
    """After a save read them on the host, the next step brings back exactly the paged bytes."""
    for row in ROWS:
        seen = row.record.paging
        if seen is None or not seen.measured or not row.record.run.save:
            continue
        save, after = seen.windows[-2:]
        assert save.window == "save"
        assert sum(after.host_to_device_bytes.values()) == row.record.paged_bytes
        assert sum(save.device_to_host_bytes.values()) >= (row.record.paged_bytes or 0)
        assert save.cpu_faults == save.major_faults


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "x.pdf"), "must end in .md, .html, .csv"),
        (("-o", "there.md"), "replace it with --force"),
        (("nowhere",), "holds no records"),
    ],
)
def test_mistakes_get_one_clear_error(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "there.md").write_text("kept")
    done = subprocess.run(
        [sys.executable, "-m", "vramplan.cli", "accuracy", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "there.md").read_text() == "kept"


def test_names_are_text_in_html() -> None:
    page = Page("<b>", "a & b", (Table("t|", ("h",), (("<script>\"'|\n",),)),))
    html, markdown = to_html(page), to_markdown(page)
    assert '<script>"' not in html and "&lt;script&gt;&#34;" in html and "&lt;b&gt;" in html
    assert "| \\<script>\"'\\|  |" in markdown
