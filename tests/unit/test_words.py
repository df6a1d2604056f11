"""Units, errors, jobs and configs: what people type and what comes back."""

from __future__ import annotations

import json
import math

import pytest

from vramplan.catalogue import find_model, model_from_config, model_slugs
from vramplan.config import MAX_CONFIG_BYTES
from vramplan.errors import ConfigError, EnvironmentProblem, UnknownNameError, UsageError
from vramplan.job import Job
from vramplan.layers import resolve_targets
from vramplan.units import format_bytes, format_count, parse_size

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 1024**3),
        ("24 GB", 24 * 10**9),
        ("512mib", 512 * 1024**2),
        ("1073741824", 1024**3),
        ("1.5GiB", 3 * 1024**3 // 2),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 apples", "-1GiB", "0", "1e99GiB", "9" * 40, "nan"])
def test_nonsense_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "unknown"),
        (0, "0 B"),
        (1536, "1.5 KiB"),
        (72 * 1024**2, "72.0 MiB"),
        (int(9.65 * 1024**3), "9.65 GiB"),
        (-(2**30), "-1.00 GiB"),
    ],
)
def test_sizes_are_written(size: int | None, text: str) -> None:
    assert format_bytes(size) == text


def test_counts_are_written() -> None:
    assert [format_count(n) for n in (4096, 134_515_008, 6_050_882_784)] == [
        "4,096",
        "134.5 M",
        "6.05 B",
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 0},
        {"batch_size": -3},
        {"batch_size": True},
        {"batch_size": 10**12},
        {"seq_len": 0},
        {"seq_len": 10**18},
        {"lora_r": 0},
        {"gradient_accumulation_steps": 0},
        {"lora_dropout": 1.0},
        {"lora_dropout": math.nan},
        {"method": "prefix"},
        {"dtype": "fp8"},
        {"mixed_precision": "yes"},
        {"quant_type": "nf3"},
        {"optim": "adam"},
        {"attn_implementation": "flash"},
        {"num_gpus": 2},
        {"target_modules": ()},
        {"method": "full", "modules_to_save": ("lm_head",)},
    ],
)
def test_impossible_jobs_are_refused(values: dict) -> None:
    with pytest.raises(UsageError):
        Job(**values)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean adamw_8bit"):
        Job(optim="adamw8bit")


def test_targets_must_exist() -> None:
    model = model_from_config(LLAMA, "tiny")
    with pytest.raises(UsageError, match=r"query_key_value.*q_proj"):
        resolve_targets(model.architecture, Job(target_modules=("query_key_value",)))
    with pytest.raises(UsageError, match="modules-to-save"):
        resolve_targets(model.architecture, Job(modules_to_save=("nothing",)))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": None},
        {"model_type": "mamba9"},
        {"model_type": 7},
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"hidden_size": 0},
        {"hidden_size": 65},
        {"hidden_size": 1e300},
        {"hidden_size": [64]},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": True},
        {"num_key_value_heads": 3},
        {"vocab_size": {"a": 1}},
        {"hidden_act": "gelu_mystery"},
        {"hidden_act": "x" * 1000},
        {"attention_bias": "yes"},
        {"attention_dropout": 2},
        {"hidden_size": 10**9, "num_hidden_layers": 10_000},
    ],
)
def test_hostile_values_give_one_clear_error(change: dict) -> None:
    from vramplan.estimate import estimate

    with pytest.raises(UsageError):
        estimate(model_from_config(LLAMA | change, "tiny"), Job())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention"]}, "list of 2 kinds"),
        ({"layer_types": "full_attention"}, "list of 2 kinds"),
        ({"layer_types": ["full_attention", "x" * 1000]}, "may hold"),
        ({"layer_types": ["full_attention", ["a"]]}, "may hold"),
        ({"use_bidirectional_attention": True}, "only causal"),
        ({"final_logit_softcapping": "30"}, "must be a number"),
        ({"final_logit_softcapping": 0}, "must be from"),
        ({"sliding_window": -1}, "must be from 1"),
        ({"num_attention_heads": 48}, "not divisible"),
    ],
)
def test_hostile_values_of_gemma_give_one_clear_error(change: dict, words: str) -> None:
    config = {"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 2}
    with pytest.raises(ConfigError, match=words):
        model_from_config(config | change, "tiny")


def test_null_switches_a_cap_off() -> None:
    config = {"model_type": "gemma2", "num_hidden_layers": 2}
    assert model_from_config(config, "tiny").dims.final_logit_softcapping == 30.0
    change = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    dims = model_from_config(config | change, "tiny").dims
    assert dims.final_logit_softcapping is None and dims.attn_logit_softcapping is None


def test_a_config_may_name_its_attention() -> None:
    from vramplan.estimate import estimate

    config = {"model_type": "gemma2", "num_hidden_layers": 2, "vocab_size": 512}
    sdpa, eager = Job(), Job(attn_implementation="eager")
    named = model_from_config(config | {"_attn_implementation": "eager"}, "tiny")
    plain = model_from_config(config, "tiny")
    odd = model_from_config(config | {"_attn_implementation": ["x"]}, "tiny")
    peaks = [
        estimate(model, job).peak_allocated_bytes
        for model, job in ((named, sdpa), (plain, eager), (plain, sdpa), (odd, sdpa))
    ]
    assert peaks[0] == peaks[1] > peaks[2] == peaks[3]


def test_multimodal_gemma_is_another_model() -> None:
    with pytest.raises(UnknownNameError, match="gemma3_text"):
        model_from_config({"model_type": "gemma3", "text_config": {}}, "tiny")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "NaN",
        '{"model_type": "llama", "hidden_size": NaN}',
        "[" * 100_000,
        "\x00",
    ],
)
def test_broken_files_give_one_clear_error(tmp_path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_model(str(path))


def test_huge_and_missing_files(tmp_path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="does not exist"):
        find_model(str(tmp_path))
    path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="Is it the right file"):
        find_model(str(path))
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="cannot read"):
        find_model(str(path))


def test_folder_file_slug_and_repository_are_found(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    assert find_model(str(tmp_path)).num_parameters == find_model(str(path)).num_parameters
    assert find_model("GPT-J-6B").num_parameters == 6_050_882_784
    assert find_model("EleutherAI/gpt-j-6b").name == "gpt-j-6b"


def test_unknown_model_suggests(monkeypatch) -> None:
    with pytest.raises(UnknownNameError, match="gpt-j-6b"):
        find_model("gptj-6b")


def test_offline_hub_id_says_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises((EnvironmentProblem, ConfigError), match=r"cache|hub"):
        find_model("nobody/nothing")


def test_enough_models_are_shipped() -> None:
    assert len(model_slugs()) >= 30


def test_torch_names_of_dtypes_mean_the_same_job() -> None:
    assert Job(dtype="bfloat16") == Job(dtype="bf16")
    assert Job(method="full", dtype="float32").weight_dtype.size == 4
