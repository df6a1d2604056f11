"""``vramplan check --predicted``: changes planted in transformers are caught, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import integrations
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner, Result

import vramplan.cli.check
from vramplan.cli import gate as gate_module
from vramplan.errors import ConfigError, RecordError, VramplanError
from vramplan.units import MIB, format_bytes

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip
JOB = {"model": "tiny.json", "batch_size": 2, "seq_len": 512}
LOGITS = 2 * 512 * 8192 * 4  # bytes in fp32


class Gate:
    """A folder with a matrix and its baseline."""

    def __init__(self, folder: Path, **job: Any) -> None:
        self.matrix, self.baseline = folder / "runs.toml", folder / "memory.json"
        (folder / "tiny.json").write_text(json.dumps(CONFIG))
        self.write(**job)
        made = self.check("--matrix", self.matrix, "--update")
        assert made.exit_code == 0, made.stderr
        self.made = made

    def write(self, **job: Any) -> None:
        lines = [f"{k} = {json.dumps(v)}" for k, v in ({"name": "tiny"} | JOB | job).items()]
        self.matrix.write_text("\n".join(["[[run]]", *lines]))

    def check(self, *words: object) -> Result:
        words = ("check", "--predicted", self.baseline, *words)
        return CliRunner().invoke(vramplan.cli.app, [str(word) for word in words])

    def finding(self) -> tuple[int, dict[str, Any]]:
        """Exit code, and the one check of the document."""
        found = self.check("--json")
        return found.exit_code, json.loads(found.stdout)["checks"][0]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gate]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gate_module, "installed", lambda: {"transformers": "5.17.0"})
    return lambda **job: Gate(tmp_path, **job)


def plant_copy_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LOSS_MAPPING["ForCausalLM"]

    def copying(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return loss(logits.float().exp().log(), *args, **kwargs)  # both are kept for backward

    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", copying)


# -- unchanged -------------------------------------------------------------------------------------


def test_unchanged_is_as_it_was(make: Callable[..., Gate]) -> None:
    gate = make(method="full")
    assert gate.made.stdout == ""
    assert gate.made.stderr == f"added: tiny\n{gate.baseline} is the new baseline\n"
    found = gate.check()
    assert (found.exit_code, found.stderr) == (0, "")
    figures = json.loads(gate.baseline.read_text())["predictions"][0]["figures"]
    assert found.stdout == (
        f"Same: tiny is as it was: peak allocated {format_bytes(figures['allocated'])}.\n"
        "As before: load peak, ready to train, peak allocated, peak reserved, smallest limit, "
        "growth a step, \npaged state.\n"
    )
    assert figures["per_step"] == 0
    again = gate.check("--update")
    assert again.stderr == f"{gate.baseline} is the new baseline; 1 unchanged\n"


def test_the_baseline_has_what_every_module_holds(make: Callable[..., Gate]) -> None:
    gate = make(method="full")
    (made,) = json.loads(gate.baseline.read_text())["predictions"]
    assert made["held"]["ready"][:3] == [
        "4194304 weights lm_head",
        "4194304 weights model.embed_tokens",
        "524288 weights model.layers.*.mlp.down_proj 0-2",
    ]
    figures, phases = made["figures"], made["phases"]
    assert list(phases) == ["load", "prepare", "forward", "loss", "backward", "step"]
    # but for blocks that the allocator did not split
    assert 0 <= figures["allocated"] - max(phases.values()) < 2 * MIB
    for phase, size in phases.items():
        rows = [row.split() for row in made["held"][phase]]
        layers = [len(_numbers(row[3])) if len(row) > 3 else 1 for row in rows]
        assert sum(int(row[0]) * n for row, n in zip(rows, layers, strict=True)) == size


def _numbers(layers: str) -> list[int]:
    parts = [part.split("-") for part in layers.split(",")]
    return [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)]


# -- planted ---------------------------------------------------------------------------------------


def test_a_copy_of_the_logits_belongs_to_the_loss(
    make: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make(method="lora")
    plant_copy_of_the_logits(monkeypatch)
    code, found = gate.finding()
    assert (code, found["outcome"], found["phase"]) == (1, "worse", "backward")
    grown = found["grown"][0]
    assert (grown["kind"], grown["owner"]) == ("logits", "loss")
    assert grown["after_bytes"] - grown["before_bytes"] == LOGITS
    assert len(found["grown"]) == 1


def test_a_layer_without_checkpointing_is_named(
    make: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make(method="lora")
    layer = modeling_llama.LlamaDecoderLayer
    call = layer.__call__

    def unchecked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 1:
            return torch.nn.Module.__call__(self, *args, **kwargs)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(layer, "__call__", unchecked)
    code, found = gate.finding()
    assert code == 1
    owners = {grown["owner"] for grown in found["grown"]}
    assert owners
    assert {owner.split(".")[2] for owner in owners} == {"1"}
    assert "Most of it: activations of model.layers.1.\n" in gate.check().stdout


def test_a_layer_left_unquantised_is_named(
    make: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make(method="qlora", prepare_kbit=False)
    replace = integrations.replace_with_bnb_linear

    def sparing(model: Any, modules_to_not_convert: Any = None, **kwargs: Any) -> Any:
        spared = [*(modules_to_not_convert or []), "down_proj"]
        return replace(model, modules_to_not_convert=spared, **kwargs)

    monkeypatch.setattr(integrations, "replace_with_bnb_linear", sparing)
    found = gate.check()
    assert found.exit_code == 1
    assert "Most of it: weights of model.layers.*.mlp.down_proj.\n" in found.stdout
    changes = {c["metric"]: c["outcome"] for c in gate.finding()[1]["changes"]}
    assert changes["ready"] == changes["allocated"] == "worse"


def test_a_leak_belongs_to_the_module_that_leaks(
    make: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make(method="lora")
    forward = modeling_llama.LlamaMLP.forward
    kept: list[Any] = []

    def leaking(self: Any, x: Any) -> Any:
        kept.append(forward(self, x))
        return kept[-1]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", leaking)
    code, found = gate.finding()
    assert code == 1
    per_step = next(c for c in found["changes"] if c["metric"] == "per_step")
    assert (per_step["before"], per_step["outcome"]) == (0, "worse")
    assert found["grown"][0]["owner"] == "model.layers.*.mlp.down_proj"


def test_what_no_longer_fits_no_longer_runs(
    make: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make(method="lora", limit="210MiB")
    plant_copy_of_the_logits(monkeypatch)
    found = gate.check()
    assert found.exit_code == 1
    first = found.stdout.splitlines()[0]
    assert first.startswith("Worse: tiny no longer runs: out of memory: it needs ")
    assert first.endswith(" of 0.21 GiB.")


# -- what cannot be told ---------------------------------------------------------------------------


def test_libraries_that_cannot_run_it_are_no_pass(
    make: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make(method="full")

    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", broken)
    found = gate.check()
    assert found.exit_code == 2
    assert found.stdout == (
        "Not compared: tiny: this run failed: tiny: a training step of it does not run on fake "
        "tensors (RuntimeError: no such kernel).\n"
    )
    before = gate.baseline.read_bytes()
    refused = gate.check("--update")
    assert isinstance(refused.exception, RecordError)
    assert str(refused.exception).startswith("tiny is no baseline: tiny: a training step")
    assert gate.baseline.read_bytes() == before


def test_the_estimate_is_heard_where_it_disagrees(
    make: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make(method="lora")
    plant_copy_of_the_logits(monkeypatch)
    said = gate.check().stderr
    assert said.startswith("note: tiny: the estimate says ")
    assert said.endswith(
        " It was not written for the installed libraries; the trace ran them and is what is "
        "compared\n"
    )


def test_a_matrix_with_other_jobs_names_what_differs(make: Callable[..., Gate]) -> None:
    gate = make(method="lora")
    gate.write(method="lora", batch_size=4)
    found = gate.check("--matrix", gate.matrix)
    assert found.exit_code == 1
    assert "Changed: job.batch_size 2 -> 4.\n" in found.stdout
    gate.write(method="lora", name="another")
    found = gate.check("--matrix", gate.matrix)
    assert found.exit_code == 2
    assert found.stdout == (
        "Of 2 measurements 1 is missing, 1 is new.\n\nMissing\ntiny\n\nNew\nanother\n"
    )
    accepted = gate.check("--matrix", gate.matrix, "--update")
    assert accepted.exit_code == 0
    assert accepted.stderr.splitlines()[:2] == ["added: another", "removed: tiny"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--predicted", "none.json"],
            "there is no baseline none.json; --matrix RUNS.toml --update",
        ),
        (["--predicted", "none.json", "--update"], "name its jobs with --matrix RUNS.toml"),
        (["--predicted", "none.json", "--matrix", "no.toml", "--update"], "no.toml cannot be read"),
        (["a", "b", "--predicted", "none.json"], "--predicted BASELINE needs no records"),
        (["a", "b", "--matrix", "runs.toml"], "name CURRENT and BASELINE, or --predicted BASELINE"),
        ([], "name CURRENT and BASELINE, or --predicted BASELINE"),
    ],
)
def test_requests_that_cannot_be_answered(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(vramplan.cli.app, ["check", *words])
    assert isinstance(found.exception, VramplanError)
    assert said in str(found.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_edited_by_hand_is_one_error(make: Callable[..., Gate]) -> None:
    gate = make(method="lora")
    document = json.loads(gate.baseline.read_text())
    document["predictions"][0]["config"]["hidden_size"] = -1
    gate.baseline.write_text(json.dumps(document))
    found = gate.check()
    assert isinstance(found.exception, ConfigError)
    assert str(found.exception) == (
        "tiny.json: hidden_size must be from 1 to 1,000,000,000, not -1"
    )
    gate.baseline.write_text("{")
    found = gate.check()
    assert isinstance(found.exception, RecordError)


def test_parts_that_only_a_gpu_can_tell_are_named(make: Callable[..., Gate]) -> None:
    gate = make(method="lora", save=True, evaluate=True, repeat=2)
    assert gate.made.stderr.splitlines()[0] == (
        "note: training steps alone are predicted, not evaluate, save"
    )
    assert gate.check().exit_code == 0
