"""How long a large comparison takes, and how much memory. Shown, never asserted as such."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice

import pytest

from vramplan.cli.compare import form
from vramplan.comparing import compare
from vramplan.comparison import Comparison
from vramplan.gpus import load_gpus
from vramplan.record import Record, read_record
from vramplan.resources import profiles_dir

NUM_RECORDS, NUM_CARDS = 200, 45
RUNS = profiles_dir() / "calibrations" / "h100-sxm-80gb" / "runs"


def records() -> Iterator[Record]:
    """So many records of different jobs: the shipped ones, then the same with another rank."""
    shipped = [read_record(path) for path in sorted(RUNS.glob("*.json"))]
    for number, record in enumerate(islice(cycle(shipped), NUM_RECORDS)):
        again = number // len(shipped)
        job = record.job | ({"lora_r": 24 + again, "seq_len": 320 + again} if again else {})
        name = f"{record.name}-{again}" if again else record.name
        yield record.model_copy(update={"name": name, "job": job})


def large() -> Comparison:
    """Every record's job on so many cards, and the records."""
    cards = list(load_gpus().values())[:NUM_CARDS]
    return compare(gpus=cards, records=records())


@pytest.mark.benchmark(group="page")
@pytest.mark.parametrize("suffix", [".html", ".md", ".csv", ".json"])
def test_render_200_records_on_45_cards(benchmark, comparison: Comparison, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    text = benchmark.pedantic(form, (comparison, suffix), rounds=1)
    assert text.count("gpt-j-6b") > 10


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return large()


def test_time_and_memory_of_all_of_it() -> None:
    """In a process of its own, so that the memory is this alone."""
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    print(done.stdout)


def main() -> None:
    """Predict, render and say how long and how much."""
    import resource

    start = time.perf_counter()
    found = large()
    predicted = time.perf_counter()
    text = form(found, ".html")
    alone = form(replace(found, entries=()), ".html")
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{len(found.runs)} records, {len(found.entries)} predictions: predicted in "
        f"{predicted - start:.1f} s, rendered in {done - predicted:.1f} s, "
        f"{len(text) / 1e6:.1f} MB ({len(alone) / 1e6:.1f} MB without cards), {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()
