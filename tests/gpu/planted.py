"""Plants regressions in a small program and looks whether its memory tests catch them.

Needs a GPU: ``python tests/gpu/planted.py OUT``. In OUT: the baselines of the program as it is
(``main``, ``again``), with each regression planted and with a share of the peak held on top; what
pytest printed when each was compared with ``main``; and what measuring a region costs in time.
``tests/unit/test_planted.py`` judges the baselines anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent / "planted"
GROWN = (0.0025, 0.005, 0.0075, 0.01, 0.02)
ROUNDS = 7


def session(*options: str) -> tuple[int, str]:
    """One pytest session of the project: exit code and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = pytest.main([str(PROJECT), f"--rootdir={PROJECT}", "-q", "-p", "no:cacheprovider",
                            "--color=no", *plugin(), *options])  # fmt: skip
    return int(code), printed.getvalue()


def plugin() -> list[str]:
    """Load the plugin by name where vramplan is on the path and not installed."""
    import importlib.metadata

    names = {point.name for point in importlib.metadata.entry_points(group="pytest11")}
    return [] if "vramplan" in names else ["-p", "vramplan.pytest_plugin"]


def overhead() -> dict[str, float]:
    """Seconds of some steps bare and measured, medians of alternating rounds."""
    import torch
    import train

    from vramplan.measure.card import open_card
    from vramplan.measure.region import Meter

    folder = tempfile.mkdtemp()
    train.make_checkpoint(folder)
    model = train.build(folder)
    optimizer = train.make_optimizer(model)
    meter = Meter(open_card())
    train.train(model, optimizer)
    found: dict[str, list[float]] = {"bare_s": [], "measured_s": []}
    for _ in range(ROUNDS):
        for name, around in (
            ("bare_s", contextlib.nullcontext()),
            ("measured_s", meter.measure("train")),
        ):
            torch.cuda.synchronize()
            began = time.perf_counter()
            with around:
                train.train(model, optimizer)
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()} | {
        "rounds": ROUNDS, "steps": train.STEPS,
    }  # fmt: skip


def main(out: Path) -> None:
    """Everything, one after another; each result is written as soon as it is there."""
    sys.path.insert(0, str(PROJECT))
    import train

    out.mkdir(parents=True, exist_ok=True)
    storage = f"--vram-storage={out / 'baselines'}"

    def told(name: str, *options: str) -> None:
        code, text = session(storage, *options)
        (out / f"{name}.txt").write_text(text.replace(str(PROJECT), "planted"), encoding="utf-8")
        print(name, code, flush=True)

    told("save-main", "--vram-save=main")
    told("save-again", "--vram-save=again")
    told("compare-unchanged", "--vram-compare=main")
    for name in train.PLANTS:
        os.environ["PLANT"] = name
        told(f"save-{name}", f"--vram-save={name}")
        told(f"compare-{name}", "--vram-compare=main")
    os.environ["PLANT"] = ""
    for share in GROWN:
        os.environ["GROWN"] = str(share)
        told(f"save-grown-{share}", f"--vram-save=grown-{share}")
    os.environ["GROWN"] = "0"
    (out / "overhead.json").write_text(json.dumps(overhead(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
