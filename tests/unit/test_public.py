"""What is promised to importers: the public names, and that planning needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import vramplan

HEAVY = (
    "torch", "transformers", "peft", "pandas", "matplotlib", "jinja2", "numpy",
    "huggingface_hub",
)  # fmt: skip


def loaded_after(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after running ``code``."""
    probe = (
        f"{code}\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light() -> None:
    assert loaded_after("import vramplan; vramplan.Job") == []


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "gpt-j-6b", "--gpu", "3060"],
        ["estimate", "gpt-j-6b"],
        ["compare", "--model", "gpt-j-6b", "--gpu", "3060"],
    ],
)
def test_planning_is_light(words: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['vramplan', *{words!r}]\n"
        "from vramplan.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert loaded_after(code) == []


def test_public_names() -> None:
    assert sorted(vramplan.__all__) == [
        "Comparison",
        "Gpu",
        "Job",
        "Model",
        "Prediction",
        "Verdict",
        "VramplanError",
        "__version__",
        "compare",
        "find_gpu",
        "find_model",
        "job_for",
        "judge",
        "predict",
        "read_record",
        "usable_bytes",
    ]
    for name in vramplan.__all__:
        assert getattr(vramplan, name) is not None
    assert not [name for name in dir(vramplan) if name not in vramplan.__all__ and name[0] != "_"]


def test_library_answers_as_the_readme_says() -> None:
    card = vramplan.find_gpu("3060")
    prediction = vramplan.predict(vramplan.find_model("gpt-j-6b"), vramplan.Job(), card)
    assert vramplan.judge(prediction, card.slug, vramplan.usable_bytes(card)).verdict == "fits"


def test_compare_gives_a_frame() -> None:
    pytest.importorskip("pandas")
    frame = vramplan.compare(["gpt-j-6b"], ["3060", "t4"]).to_frame()
    assert list(frame["verdict"]) == ["fits", "fits"]
    assert frame["device_peak_bytes"].dtype == "Int64"
