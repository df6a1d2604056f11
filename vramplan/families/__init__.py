"""Block programs, one file per model family."""

from __future__ import annotations

from vramplan.errors import UnknownNameError
from vramplan.families import (
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen2_moe,
    qwen3_moe,
)
from vramplan.families.common import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        gptj,
        gpt_neox,
        gpt_oss,
        llama,
        mistral,
        mixtral,
        qwen2,
        qwen2_moe,
        qwen3_moe,
    )
}


def find_family(model_type: str) -> Family:
    """The block program for a config's ``model_type``.

    Raises:
        UnknownNameError: If no program describes that family.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UnknownNameError(
            "model family", model_type, FAMILIES, "No block program describes it yet."
        ) from None


__all__ = ["FAMILIES", "Family", "find_family"]
