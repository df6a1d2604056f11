"""The order in which transformers loads a checkpoint, on the CPU, against ``vramplan.loading``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import core_model_loading as core  # noqa: E402

from vramplan.catalogue import model_from_config  # noqa: E402
from vramplan.families import NAMES  # noqa: E402
from vramplan.job import Job  # noqa: E402
from vramplan.loading import checkpoint_name, weights  # noqa: E402
from vramplan.model import Model  # noqa: E402

TINY = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 11, "n_layer": 11,
    "n_embd": 64, "n_head": 4, "n_positions": 64, "vocab_size": 96, "intermediate_size": 128,
    "head_dim": 16, "rotary_dim": 8, "ffn_dim": 128, "word_embed_proj_dim": 64,
    "num_key_value_heads": 4, "sliding_window": None, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def order(model: Model, job: Job) -> list[str]:
    """Full names in the order of ``weights``."""
    names: list[str] = []
    layer = 0
    for group in weights(model, job):
        outside = len(group) == 1 and not _is_of_a_layer(model, group[0].name)
        if outside:
            names.append(group[0].name)
        else:
            names += [f"{model.architecture.layer_prefix}.{layer}.{w.name}" for w in group]
            layer += 1
    return names


def _is_of_a_layer(model: Model, name: str) -> bool:
    arch = model.architecture
    return any(name.startswith(f"{m.name}.") or name == m.name for m in arch.modules())


@pytest.mark.parametrize("family", [name for name in NAMES if name != "gpt_oss"])
def test_the_order_is_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = transformers.AutoConfig.for_model(family).to_dict()
    own: dict[str, Any] = {k: v for k, v in TINY.items() if k in known}
    config = transformers.AutoConfig.for_model(family, **own)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    seen: list[str] = []
    inner = core.set_param_for_module

    def note(model: Any, name: str, *rest: Any) -> Any:
        seen.append(name)
        return inner(model, name, *rest)

    monkeypatch.setattr(core, "set_param_for_module", note)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = model_from_config({**config.to_dict(), "model_type": family}, family)
    assert [_bare(name) for name in order(model, Job())] == [
        _bare(name.replace("lm_head", checkpoint_name(model, "lm_head"))) for name in seen
    ]


def _bare(name: str) -> str:
    """A router is a bare parameter here and a module with a weight there."""
    return name.removesuffix(".weight")
