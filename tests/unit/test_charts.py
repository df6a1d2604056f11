"""Charts: what they draw is what the timeline says, and the same bytes every time."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from vramplan.catalogue import find_model
from vramplan.comparing import parts_of
from vramplan.job import Job
from vramplan.prediction import predict
from vramplan.report.charts import Bar, Line, bytes_chart, job_chart, labelled, timeline_chart
from vramplan.report.drawing import Chart
from vramplan.report.measured_charts import PhaseBar, Point, phases_chart, residual_chart
from vramplan.report.series import stretches
from vramplan.units import GIB

pytest.importorskip("matplotlib")
CLI = [sys.executable, "-m", "vramplan.cli"]


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.parametrize("model", ["gpt-j-6b", "gemma-2-9b", "mixtral-8x7b"])
@pytest.mark.parametrize(
    "more", [{}, {"gradient_checkpointing": False}, {"gradient_accumulation_steps": 3}]
)
def test_the_curve_reaches_the_peak(model: str, method: str, more: dict[str, int]) -> None:
    timeline = predict(find_model(model), Job(method=method, **more)).estimate.timeline
    peak = timeline.peak()
    for most in (7, 120, 10**6):
        fullest = max((s.fullest for s in stretches(timeline, most)), key=lambda m: m.nbytes)
        assert (fullest.nbytes, fullest.phase) == (peak.nbytes, peak.phase)
        assert {k: n for k, n in fullest.by_kind.items() if n} == peak.by_kind
    for stretch in stretches(timeline, 50):
        assert len(stretch.moments) <= 50
        assert all(sum(m.by_kind.values()) == m.nbytes for m in stretch.moments)


def charts(name: str = "gpt-j-6b") -> list[Chart]:
    prediction = predict(find_model("gpt-j-6b"), Job())
    bars = [Bar(name, parts_of(prediction)), Bar("huge", {"weights": 900 * GIB})]
    lines = [Line("12 GB", 12 * GIB), Line("24 GB", 24 * GIB)]
    step = stretches(prediction.estimate.timeline)
    return [
        bytes_chart("a", name, bars, lines),
        timeline_chart("b", name, step, Line(name, 5 * GIB)),
        job_chart("c", name, bars[0], step, lines),
        residual_chart("d", name, [Point(name, "ready", GIB, GIB), Point("x", name, GIB, 2 * GIB)]),
        phases_chart("e", name, [PhaseBar("load", GIB, None, None)], Line(name, GIB)),
    ]


NAME = "<b>&\"'\n🚀$x$\x00"


def test_charts_are_well_formed_whatever_the_names() -> None:
    for chart in charts(NAME):
        root = ET.fromstring(chart.standalone().split("\n", 1)[1])
        words = root.findtext("{http://www.w3.org/2000/svg}title")
        assert words is not None and words.startswith("<b>&\"' 🚀$x$")
        assert root.findtext("{http://www.w3.org/2000/svg}desc")


def test_charts_do_not_share_ids() -> None:
    ids = [name for chart in charts() for name in re.findall(r'\bid="([^"]*)"', chart.svg)]
    assert len(ids) == len(set(ids))
    for chart in charts():
        own = set(re.findall(r'\bid="([^"]*)"', chart.svg))
        assert set(re.findall(r"url\(#([^)]*)\)", chart.svg)) <= own
        assert set(re.findall(r'href="#([^"]*)"', chart.svg)) <= own


def test_the_same_figures_give_the_same_bytes() -> None:
    assert charts() == charts()


def test_parts_say_their_figure_when_pointed_at() -> None:
    assert "<title>gpt-j-6b: weights 4.26 GiB</title>" in charts()[0].svg


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((8, 12, 24, 80), ["8\u201312 GB", "24 GB", "80 GB"]),
        ((24, 24, 80), ["24 GB", "80 GB"]),
        ((12, 14, 16, 18, 80), ["12\u201318 GB", "80 GB"]),
        ((), []),
    ],
)
def test_names_of_lines_do_not_overlap(sizes: tuple[int, ...], names: list[str]) -> None:
    lines = [Line(f"{size} GB", size * GIB) for size in sizes]
    assert [line.name for line in labelled(lines, 100 * GIB)] == names


def test_estimate_draws_its_job(tmp_path: Path) -> None:
    words = [*CLI, "estimate", "pythia-70m", "--gpu", "3060", "--plot"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, *more], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    assert run("job.svg").returncode == 0
    assert "rtx-3060-12gb" in (tmp_path / "job.svg").read_text()
    again = run("job.svg")
    assert again.returncode == 2 and "--force" in again.stderr
    assert run("job.svg", "--force").returncode == 0
    assert "must end in .svg" in run("job.png").stderr
