"""Regressions planted on an H100 by ``tests/gpu/planted.py``: all caught, the guilty one named.

``tests/data/planted/baselines`` holds what the program took as it is and with each planted; they
are compared anew with today's thresholds and words.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vramplan.regression import Check, check, thresholds
from vramplan.report import findings
from vramplan.testing.baselines import Baseline, read_all
from vramplan.testing.measured import UNSTEADY

FOLDER = Path(__file__).parents[1] / "data" / "planted" / "baselines"
TEST = "test_train.py::test_training"
FOUND: dict[str, Baseline] = {baseline.name: baseline for baseline in read_all(FOLDER)}
# planted -> region, figures that must be worse, who must be named first
GUILTY = {
    "logits_copy": ("train", {"allocated"}, "logits of loss"),
    "unchecked_layer": ("train", {"allocated"}, "activations of model.layers.5"),
    "fp32_adapter": ("train", {"allocated", "leaked"}, "optimizer of model.layers.*"),
    "extra_state": ("train", {"allocated", "leaked"}, "optimizer of model.layers.*"),
    "leak": ("train", {"allocated", "leaked", "per_step"}, "outside modules"),
    "kbit": ("build", {"allocated", "leaked"}, "weights of lm_head"),
    "load_doubled": ("build", {"allocated", "reserved"}, "outside modules"),
}


def compared(name: str, region: str) -> Check:
    now, then = (FOUND[side].measurement(TEST, region) for side in (name, "main"))
    assert now is not None and then is not None
    return check(replace(now, unsteady=UNSTEADY), then, thresholds(""))


def peak(name: str, region: str = "train") -> int:
    found = FOUND[name].measurement(TEST, region)
    assert found is not None
    return found.figures["allocated"]


@pytest.mark.parametrize("planted", GUILTY)
def test_caught_and_named(planted: str) -> None:
    region, figures, owner = GUILTY[planted]
    found = compared(planted, region)
    assert found.outcome == "worse"
    assert figures <= {change.metric for change in found.changes if change.outcome == "worse"}
    assert findings.growth_name(found.grown[0]).startswith(owner)


def test_only_the_guilty_layer_is_named() -> None:
    grown = compared("unchecked_layer", "train").grown
    most = sum(growth.nbytes for growth in grown)
    assert sum(g.nbytes for g in grown if g.owner.startswith("model.layers.5")) > 0.9 * most


@pytest.mark.parametrize("region", ["build", "train"])
def test_unchanged_is_the_same(region: str) -> None:
    assert compared("again", region).outcome == "same"


def test_half_a_percent_more_is_caught() -> None:
    """What was held on top is a share of 1 GiB; the peak is a little more than that."""
    caught = {}
    for name in FOUND:
        if name.startswith("grown-"):
            share = peak(name) / peak("main") - 1
            caught[share] = compared(name, "train").outcome == "worse"
    assert len(caught) == 5 and min(caught) < 0.005 < max(caught)
    assert all(worse == (share > 0.005) for share, worse in caught.items())


@pytest.mark.parametrize(
    ("planted", "region"),
    [(name, "train") for name in ("logits_copy", "unchecked_layer", "fp32_adapter", "extra_state")]
    + [("load_doubled", "build")],
)
def test_the_page_tells_what_was_measured(planted: str, region: str) -> None:
    page = FOLDER.parents[3] / "docs" / "keep-your-fine-tune-within-12-gb.md"
    grown = peak(planted, region) / peak("main", region) - 1
    told = f"{100 * grown:+.0f} %" if grown > 1 else f"{100 * grown:+.1f} %"
    assert told in page.read_text(encoding="utf-8")
