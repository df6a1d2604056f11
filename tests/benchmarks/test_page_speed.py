"""How long a comparison takes, and how much memory. Shown, never asserted as such.

Run as a program it makes the large one, 200 records on 45 cards; predicting its jobs takes minutes.
"""

from __future__ import annotations

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

LARGE = 200, 45  # records, cards
SMALL = 20, 9
RUNS = profiles_dir() / "calibrations" / "h100-sxm-80gb" / "runs"


def records(count: int) -> Iterator[Record]:
    """So many records of different jobs: the shipped ones, then the same with another rank."""
    shipped = [read_record(path) for path in sorted(RUNS.glob("*.json"))]
    for number, record in enumerate(islice(cycle(shipped), count)):
        again = number // len(shipped)
        job = record.job | ({"lora_r": 24 + again, "seq_len": 320 + again} if again else {})
        name = f"{record.name}-{again}" if again else record.name
        yield record.model_copy(update={"name": name, "job": job})


def made(num_records: int, num_cards: int) -> Comparison:
    """Every record's job on so many cards, and the records."""
    cards = list(load_gpus().values())[:num_cards]
    return compare(gpus=cards, records=records(num_records))


@pytest.mark.benchmark(group="page")
@pytest.mark.parametrize("suffix", [".html", ".md", ".csv", ".json"])
def test_render_20_records_on_9_cards(benchmark, comparison: Comparison, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    text = benchmark.pedantic(form, (comparison, suffix), rounds=1)
    assert text.count("bloom-560m") > 2


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return made(*SMALL)


def main() -> None:
    """Predict, render and say how long and how much."""
    import resource

    start = time.perf_counter()
    found = made(*LARGE)
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
