"""Files of lengths, friendly and hostile, and what is said of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan import lengths as module
from vramplan.errors import UsageError
from vramplan.lengths import Lengths, read_lengths

FOUR = '{"length": 10}\n{"input_ids": [1, 2, 3]}\n\n{"length": 700, "text": "x"}\n{"length": 10}\n'


def write(folder: Path, text: str | bytes, name: str = "data.jsonl") -> Path:
    """A file of that content."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", FOUR),
        ("a.csv", "id,length\nx,10\ny,3\nz,700\nw, 10\n"),
        ("a.CSV", '\ufefflength\r\n10\r\n"3"\r\n\r\n700\r\n10'),
        ("a", FOUR.strip()),
    ],
)
def test_read(tmp_path: Path, name: str, text: str) -> None:
    found = read_lengths(write(tmp_path, text, name))
    assert found == Lengths(name, ((3, 1), (10, 2), (700, 1)))
    assert (found.num_samples, found.mean, found.longest) == (4, 180.75, 700)
    assert [found.percentile(p) for p in (1, 25, 50, 75, 76, 100)] == [3, 3, 10, 10, 700, 700]
    assert [found.share_above(n) for n in (0, 3, 10, 700)] == [1.0, 0.75, 0.25, 0.0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 100))
def test_percentile_is_the_nearest_rank(values: list[int], percent: int) -> None:
    counts = tuple((n, values.count(n)) for n in sorted(set(values)))
    rank = -(-percent * len(values) // 100)
    assert Lengths("x", counts).percentile(percent) == sorted(values)[rank - 1]


DEEP = '{"a": ' + "[" * 100_000
HOSTILE: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", "", "has no samples"),
    ("a.jsonl", "\n \n", "has no samples"),
    ("a.jsonl", FOUR + "{", "line 6: is not JSON"),
    ("a.jsonl", DEEP, "line 1: is not JSON"),
    ("a.jsonl", "[1]", "line 1: is not a JSON object"),
    ("a.jsonl", "{}", "line 1: has neither a length nor a list of input_ids"),
    ("a.jsonl", '{"input_ids": 7}', "line 1: has neither a length nor a list of input_ids"),
    ("a.jsonl", '{"input_ids": []}', "line 1: length must be from 1 to 100,000,000"),
    ("a.jsonl", '{"length": -1}', "line 1: length must be from 1 to 100,000,000"),
    ("a.jsonl", '{"length": 10000000000000}', "line 1: length must be from 1 to 100,000,000"),
    ("a.jsonl", '{"length": ' + "9" * 5000 + "}", "line 1: is not JSON"),
    ("a.jsonl", '{"length": 1.5}', "line 1: length is not a whole number"),
    ("a.jsonl", '{"length": NaN}', "line 1: length is not a whole number"),
    ("a.jsonl", '{"length": true}', "line 1: length is not a whole number"),
    ("a.jsonl", '{"length": null}', "line 1: length is not a whole number"),
    ("a.jsonl", '{"length": "7"}', "line 1: length is not a whole number"),
    ("a.jsonl", b'{"length": 1}\n\xff\xfe', "line 2: is not UTF-8"),
    ("a.jsonl", b"\x1f\x8b\x08\x00", "line 1: is not UTF-8"),
    ("a.csv", "a,b\n1,2\n", "line 1: the header has no column length"),
    ("a.csv", "length\n", "has no samples"),
    ("a.csv", "a,length\n1\n", "line 2: length is not a whole number"),
    ("a.csv", "length\n1e3\n", "line 2: length is not a whole number"),
    ("a.csv", "length\n" + "9" * 5000, "line 2: length is not a whole number"),
    ("a.csv", "length\n" + "٣", "line 2: length is not a whole number"),
    ("a.csv", "length\n0\n", "line 2: length must be from 1 to 100,000,000"),
    ("a.csv", 'length\n"' + "x" * 200_000, "is not CSV"),
]


@pytest.mark.parametrize(("name", "text", "message"), HOSTILE)
def test_refused_with_file_and_line(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(UsageError) as caught:
        read_lengths(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["nothing.jsonl", ".", "a\0b"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"not a file|cannot be read"):
        read_lengths(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match="is not a file"):
        read_lengths(tmp_path / "pipe.jsonl")


def test_no_line_and_no_file_is_read_beyond_its_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, '{"length": 5}\n' * 100)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 140)
    with pytest.raises(UsageError, match=r"line 11: the file is larger than 140 bytes"):
        read_lengths(path)
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 10)
    with pytest.raises(UsageError, match=r"line 1: is longer than 10 bytes"):
        read_lengths(path)


def test_no_more_lengths_are_kept_than_a_data_set_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "length\n1\n2\n1\n3\n", "a.csv")
    monkeypatch.setattr(module, "MAX_DIFFERENT", 2)
    with pytest.raises(UsageError, match=r"line 5: more than 2 different lengths"):
        read_lengths(path)


# -- the command line ------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    done = subprocess.run(
        [sys.executable, "-m", "vramplan.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def samples(folder: Path) -> Path:
    """A hundred samples: 90 short ones, 9 of medium length, one long one."""
    lengths = [100] * 90 + [600] * 9 + [2000]
    return write(folder, "".join(f'{{"length": {n}}}\n' for n in lengths))


def test_fit_plans_the_longest_sample(tmp_path: Path) -> None:
    code, out, _ = run(
        "fit", "pythia-410m", "--memory", "4GiB", "--batch-size", "2",
        "--max-seq-len-of", str(samples(tmp_path)),
    )  # fmt: skip
    assert code in (0, 1)
    assert "Batch 2 x 2000 tokens" in out
    said = " ".join(out[out.index("Lengths in") :].split())
    said = re.sub(r"sample: [0-9.]+ GiB", "sample: N GiB", said)  # what is predicted may change
    said = re.sub(r"holds [0-9,]+ tokens", "holds N tokens", said)
    assert said == (
        "Lengths in data.jsonl 100 samples, mean 164 tokens; 50 % up to 100, 95 % up to 600, 99 % "
        "up to 600; longest 2,000. Planned: 2,000 tokens, the longest sample: N GiB. A batch is "
        "padded to its longest sample: 2 x 2,000 tokens at worst, 8% filled by samples of mean "
        "length. 4.00 GiB holds N tokens at ease; 1.0% of the samples are longer."
    )


def test_seq_len_is_where_samples_are_cut(tmp_path: Path) -> None:
    arguments = ("pythia-410m", "--json", "--max-seq-len-of", str(samples(tmp_path)))
    code, out, _ = run("estimate", *arguments, "--seq-len", "512")
    assert code == 0
    found = json.loads(out)
    assert found["job"]["seq_len"] == 512
    assert found["lengths"] == {
        "file": "data.jsonl",
        "num_samples": 100,
        "mean": 164.0,
        "p50": 100,
        "p95": 600,
        "p99": 600,
        "longest": 2000,
        "planned_seq_len": 512,
        "share_cut": 0.1,
        "padded_batch_tokens": 512,
        "padded_batch_filled": (90 * 100 + 10 * 512) / 100 / 512,
        "ceilings": [],
    }
    # a ceiling that no sample reaches does not lengthen them
    longer = json.loads(run("estimate", *arguments, "--seq-len", "2048")[1])
    assert longer["job"]["seq_len"] == 2000
    assert longer["lengths"]["share_cut"] == 0.0


def test_the_ceiling_of_a_card_fits_it_and_the_next_does_not(tmp_path: Path) -> None:
    arguments = ("fit", "pythia-410m", "--memory", "4GiB", "--json")
    found = json.loads(run(*arguments, "--max-seq-len-of", str(samples(tmp_path)))[1])
    ceiling = found["lengths"]["ceilings"][0]["seq_len"]
    assert ceiling % 64 == 0
    assert (
        json.loads(run(*arguments, "--seq-len", str(ceiling))[1])["verdicts"][0]["verdict"]
        == "fits"
    )
    assert found["lengths"]["ceilings"][0]["share_above"] in (0.0, 0.01, 0.1)


@pytest.mark.parametrize("command", ["fit", "estimate"])
@pytest.mark.parametrize(("name", "text", "message"), HOSTILE[:6])
def test_hostile_files_end_with_two_and_one_line(
    tmp_path: Path, command: str, name: str, text: str, message: str
) -> None:
    path = write(tmp_path, text, name)
    card = ("--memory", "4GiB") if command == "fit" else ()
    code, out, err = run(command, "pythia-70m", *card, "--max-seq-len-of", str(path))
    assert (code, out) == (2, "")
    assert "Traceback" not in err
