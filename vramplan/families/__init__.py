"""Block programs, one file per model family, named like its ``model_type``."""

from __future__ import annotations

import importlib
from functools import cache

from vramplan.errors import UnknownNameError
from vramplan.families.common import Family

NAMES = (
    "bloom", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "gptj",
    "llama", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "stablelm", "starcoder2",
)  # fmt: skip


@cache
def find_family(model_type: str) -> Family:
    """The block program for a config's ``model_type``; only its own file is imported.

    Raises:
        UnknownNameError: If no program describes that family.
    """
    if model_type not in NAMES:
        raise UnknownNameError(
            "model family",
            model_type,
            NAMES,
            "No block program describes it; `--witness trace` (fit, estimate) runs its own code.",
        )
    family: Family = importlib.import_module(f"vramplan.families.{model_type}").FAMILY
    return family


__all__ = ["NAMES", "Family", "find_family"]
