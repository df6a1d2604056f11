"""``ready_bytes`` to the byte against transformers + peft + bitsandbytes on the meta device."""

from __future__ import annotations

import pytest
from hf import build, held_bytes

from vramplan.catalogue import find_model, model_slugs
from vramplan.estimate import estimate
from vramplan.job import Job

JOBS = {
    "full": Job(method="full"),
    "lora": Job(method="lora"),
    "qlora": Job(),
}
SMALL = (
    "gpt-j-6b",
    "pythia-410m",
    "tinyllama-1.1b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "gemma-2b",
    "gemma-2-2b",
    "gemma-3-270m",
    "olmo-2-1b",
    "phi-1.5",
    "phi-2",
    "phi-3-mini-4k",
    "qwen3-0.6b",
    "stablelm-2-1.6b",
    "stablelm-2-12b",
    "starcoder2-3b",
    "gpt2",
    "opt-125m",
    "opt-350m",
    "bloom-560m",
    "falcon-7b",
    "falcon-rw-1b",
    "gpt-oss-20b",
    "mixtral-8x7b",
    "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b",
)
VARIANTS = {
    "unprepared": Job(prepare_kbit=False),
    "int8": Job(quant_type="int8"),
    "fp4": Job(quant_type="fp4", double_quant=False),
    "fp32": Job(method="lora", dtype="fp32"),
    "rank": Job(method="lora", lora_r=7),
    "saved-head": Job(method="lora", modules_to_save=("lm_head",)),
}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("slug", model_slugs())
def test_every_shipped_model(slug: str, name: str) -> None:
    model = find_model(slug)
    assert estimate(model, JOBS[name]).ready_bytes == held_bytes(
        build(dict(model.config), JOBS[name])
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("slug", SMALL)
def test_variants(slug: str, name: str) -> None:
    model = find_model(slug)
    job = VARIANTS[name]
    assert estimate(model, job).ready_bytes == held_bytes(build(dict(model.config), job))


@pytest.mark.parametrize("slug", ["tinyllama-1.1b", "gemma-2b", "gemma-3-270m"])
def test_a_saved_embedding_is_a_copy_of_the_whole_module(slug: str) -> None:
    model = find_model(slug)
    job = Job(method="lora", modules_to_save=("embed_tokens",))
    assert estimate(model, job).ready_bytes == held_bytes(build(dict(model.config), job))
