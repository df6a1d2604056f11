"""The shipped model profiles against what transformers builds and against public counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vramplan.families import NAMES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = Path(__file__).parents[2] / "profiles" / "models"
FILES = sorted(MODELS.glob("*.json"))
FAMILIES = set(NAMES)
KEYS = [
    "schema_version",
    "name",
    "repository",
    "revision",
    "num_parameters",
    "source",
    "config",
]

PYTHIA_CARD = "Pythia model card, table of total parameters (EleutherAI/pythia-* on the hub)"
SAFETENSORS = "safetensors metadata of the hub repository, as quoted in public model lists"
WRITE_UPS = "counted from the weights or the model by several public write-ups"

# Counts that others published, not computed from these files.
PUBLIC_COUNTS = [
    ("gpt-j-6b", 6_050_882_784, "tensors of EleutherAI/gpt-j-6b summed in public write-ups"),
    ("gpt-neox-20b", 20_554_567_680, "GPT-NeoX-20B model card, n_parameters"),
    ("pythia-70m", 70_426_624, PYTHIA_CARD),
    ("pythia-160m", 162_322_944, PYTHIA_CARD),
    ("pythia-410m", 405_334_016, PYTHIA_CARD),
    ("pythia-1b", 1_011_781_632, PYTHIA_CARD),
    ("pythia-1.4b", 1_414_647_808, PYTHIA_CARD),
    ("pythia-2.8b", 2_775_208_960, PYTHIA_CARD),
    ("pythia-6.9b", 6_857_302_016, PYTHIA_CARD),
    ("pythia-12b", 11_846_072_320, PYTHIA_CARD),
    ("gpt2", 124_439_808, WRITE_UPS),
    ("gpt2-medium", 354_823_168, WRITE_UPS),
    ("gpt2-large", 774_030_080, WRITE_UPS),
    ("gpt2-xl", 1_557_611_200, WRITE_UPS),
    ("opt-125m", 125_239_296, WRITE_UPS),
    ("bloom-560m", 559_214_592, "BLOOM model cards, number of parameters"),
    ("bloom-1b7", 1_722_408_960, "BLOOM model cards, number of parameters"),
    ("bloom-7b1", 7_069_016_064, "BLOOM model cards, number of parameters"),
    ("llama-7b", 6_738_415_616, "public table of LLaMA 7B and 65B architectures"),
    ("llama-13b", 13_015_864_320, "LLaMA-MoE repository, total parameters of llama1-13b"),
    ("llama-65b", 65_285_660_672, "public table of LLaMA 7B and 65B architectures"),
    ("llama-2-7b", 6_738_415_616, WRITE_UPS),
    ("llama-2-13b", 13_015_864_320, WRITE_UPS),
    ("llama-2-70b", 68_976_648_192, WRITE_UPS),
    ("llama-3-70b", 70_553_706_496, WRITE_UPS),
    ("llama-3.1-8b", 8_030_261_248, WRITE_UPS),
    ("llama-3.2-1b", 1_235_814_400, "BF16 elements in model.safetensors of Llama-3.2-1B"),
    ("llama-3.3-70b", 70_553_706_496, SAFETENSORS),
    ("codellama-34b", 33_743_970_304, "Together's model list, for Phind-CodeLlama-34B"),
    ("mistral-7b", 7_241_732_096, WRITE_UPS),
    ("qwen2.5-0.5b", 494_032_768, WRITE_UPS),
    ("qwen2.5-7b", 7_615_616_512, SAFETENSORS),
    ("smollm2-135m", 134_515_008, SAFETENSORS),
    ("phi-2", 2_779_683_840, SAFETENSORS),
    ("phi-3-mini-4k", 3_821_079_552, SAFETENSORS),
    ("phi-4", 14_659_507_200, "general.parameter_count of its GGUF files"),
    ("stablelm-2-1.6b", 1_644_515_328, WRITE_UPS),
    ("qwen3-0.6b", 596_049_920, WRITE_UPS),
    ("qwen3-8b", 8_190_735_360, SAFETENSORS),
    ("gemma-2b", 2_506_172_416, SAFETENSORS),
    ("gemma-7b", 8_537_680_896, SAFETENSORS),
    ("gemma-2-2b", 2_614_341_888, SAFETENSORS),
    ("gemma-2-9b", 9_241_705_984, SAFETENSORS),
    ("gemma-2-27b", 27_227_128_320, SAFETENSORS),
    ("gemma-3-1b", 999_885_952, SAFETENSORS),
    ("gemma-3-270m", 268_098_176, SAFETENSORS),
    ("olmo-2-1b", 1_484_916_736, SAFETENSORS),
    ("olmo-2-7b", 7_298_617_344, SAFETENSORS),
]


def load(path: Path) -> dict[str, Any]:
    """The profile in a file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def count_on_meta(config: dict[str, Any]) -> int:
    """Parameters of the model transformers builds, a tied head counted once."""
    values = {key: value for key, value in config.items() if key != "architectures"}
    built = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    # parameters() yields a shared tensor once.
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_catalogue_is_large_enough_and_covers_the_families() -> None:
    assert len(FILES) >= 36
    assert {load(path)["config"]["model_type"] for path in FILES} == FAMILIES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_profile_is_well_formed(path: Path) -> None:
    profile = load(path)
    assert list(profile) == KEYS
    assert profile["schema_version"] == 1
    assert profile["name"] == path.stem
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", profile["repository"])
    revision = profile["revision"]
    if revision is None:
        assert "Revision not verified" in profile["source"]
    else:
        assert re.fullmatch(r"[0-9a-f]{40}", revision)
    assert list(profile["config"]) == sorted(profile["config"])
    assert profile["config"]["torch_dtype"] in {"float32", "float16", "bfloat16"}
    assert path.read_text(encoding="utf-8") == json.dumps(profile, indent=2) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_num_parameters_is_what_transformers_builds(path: Path) -> None:
    profile = load(path)
    assert count_on_meta(profile["config"]) == profile["num_parameters"]


@pytest.mark.parametrize(
    ("name", "count", "source"), PUBLIC_COUNTS, ids=[row[0] for row in PUBLIC_COUNTS]
)
def test_num_parameters_is_what_others_published(name: str, count: int, source: str) -> None:
    assert load(MODELS / f"{name}.json")["num_parameters"] == count, source
