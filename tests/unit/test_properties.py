"""What must hold of every prediction, whatever the model and the job; and of hostile configs.

Examples are drawn anew for each version of this file and alike on every run (``derandomize``).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import vramplan.cli
from vramplan.catalogue import find_model, model_from_config
from vramplan.errors import UsageError
from vramplan.estimate import estimate
from vramplan.families import NAMES
from vramplan.job import Job
from vramplan.model import Model
from vramplan.prediction import predict


def thorough(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def sampled(draw: st.DrawFn) -> tuple[Model, Job]:
    def choose(values: Any) -> Any:
        return draw(st.sampled_from(list(values)))

    return samples.sample(choose, draw(st.sampled_from(NAMES)))


@thorough(250)
@given(sampled())
def test_a_prediction_or_one_clear_line(both: tuple[Model, Job]) -> None:
    model, job = both
    try:
        made = predict(model, job)
    except UsageError as error:
        assert str(error) and "\n" not in str(error)
        return
    parts = made.breakdown()
    assert all(size > 0 for size in parts.values()), parts
    assert sum(parts.values()) == made.peak_allocated_bytes
    assert 0 < made.ready_bytes <= made.peak_allocated_bytes <= made.peak_reserved_bytes
    assert made.estimate.peak_allocated_bytes <= made.min_limit_bytes <= made.peak_reserved_bytes
    for number in (made.context_bytes, made.device_peak_bytes, made.paged_bytes,
                   made.load_peak_bytes, made.host_ram_bytes, made.disk_bytes):  # fmt: skip
        assert number >= 0


# what grows -> the larger job; None: the model itself
GROWTH = {
    "batch_size": lambda job: job.but(batch_size=job.batch_size + 1),
    "seq_len": lambda job: job.but(seq_len=job.seq_len + 64),
    "lora_r": lambda job: job.but(lora_r=job.lora_r + 8),
    "num_layers": None,
}


@thorough(250)
@given(sampled(), st.sampled_from(sorted(GROWTH)))
def test_more_never_takes_less(both: tuple[Model, Job], what: str) -> None:
    model, job = both
    grow = GROWTH[what]
    if what == "lora_r" and job.optimizer.library == "bitsandbytes":
        job = job.but(optim="adamw_torch_fused")  # see the next test
    try:
        small = estimate(model, job)
        large = estimate(model, grow(job)) if grow else estimate(deeper(model), job)
    except UsageError:
        return
    assert large.ready_bytes >= small.ready_bytes
    assert large.peak_allocated_bytes >= small.peak_allocated_bytes


def test_a_higher_rank_can_take_less_in_bitsandbytes() -> None:
    """Its 8-bit state begins at 4096 elements, its paging at 100,000: true steps down."""
    model = find_model("pythia-70m")  # 512 wide
    peaks = [
        estimate(model, Job(method="lora", lora_r=rank, seq_len=16, optim="adamw_8bit"))
        for rank in (1, 7, 8)
    ]
    states = [walked.optimizer_bytes for walked in peaks]
    assert states[2] < states[1] > states[0]


def deeper(model: Model) -> Model:
    """The same model with more layers of the kinds it has."""
    config = dict(model.config)
    key = next(k for k in ("num_hidden_layers", "n_layer") if k in config)
    return model_from_config({**config, key: config[key] + 2}, model.name)


HOSTILE = (
    0, -1, 3, 10**9, 10**30, 1e308, float("inf"), float("nan"), 0.5, "7", True, False, None, [],
    [[]], {}, {"a": 1}, ["sliding_attention"], "\x00",
)  # fmt: skip
MORE_KEYS = (
    "_attn_implementation", "hidden_act", "layer_types", "mlp_only_layers", "model_type",
    "num_key_value_heads", "rope_parameters", "sliding_window", "torch_dtype",
)  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_hostile_values_are_refused_or_understood(family: str) -> None:
    """Every key of a family with every wrong value, and without it: our error or a prediction."""
    config = samples.config(random.Random(family).choice, family)
    job = Job(method="lora", seq_len=16)
    for key in (*config, *MORE_KEYS):
        left_out = {name: value for name, value in config.items() if name != key}
        for values in (left_out, *({**config, key: value} for value in HOSTILE)):
            try:
                walked = estimate(model_from_config(values, "hostile"), job)
            except UsageError as error:
                assert "\n" not in str(error)
            else:
                assert walked.peak_allocated_bytes >= walked.ready_bytes > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"model_type": "llama", "vocab_size": NaN}', "NaN"),
        ('{"model_type": "llama", "x": "' + "y" * 5_000_000 + '"}', "bytes"),
        ('{"model_type": ["llama"]}', "model_type"),
        ('{"model_type": "mixtral", "num_local_experts": 0}', "num_local_experts"),
        ('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}', "divisible"),
        ("\xff", "cannot read"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "estimate"])
def test_hostile_files_are_one_line(tmp_path: Path, command: str, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    options = ["--memory", "12GiB"] if command == "fit" else []
    vramplan.cli._register([command])
    done = CliRunner().invoke(vramplan.cli.app, [command, str(path), *options])
    assert isinstance(done.exception, UsageError), done.exception
    assert words in str(done.exception) and "\n" not in str(done.exception)


@pytest.mark.parametrize("command", ["fit", "estimate"])
def test_a_family_without_a_program_offers_the_trace(tmp_path: Path, command: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "cohere"}))
    options = ["--memory", "12GiB"] if command == "fit" else []
    vramplan.cli._register([command])
    done = CliRunner().invoke(vramplan.cli.app, [command, str(path), *options])
    assert isinstance(done.exception, UsageError)
    assert "--witness trace" in str(done.exception)


def test_a_trace_without_torch_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else name)
    vramplan.cli._register(["fit"])
    done = CliRunner().invoke(
        vramplan.cli.app, ["fit", "gpt-j-6b", "--memory", "12GiB", "--witness", "trace"]
    )
    assert "pip install 'vramplan[trace]'" in str(done.exception)
