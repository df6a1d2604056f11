"""Block programs, one file per model family."""

from __future__ import annotations

from vramplan.errors import UnknownNameError
from vramplan.families import (
    gpt_neox,
    gptj,
    llama,
    mistral,
    phi,
    phi3,
    qwen2,
    qwen3,
    stablelm,
    starcoder2,
)
from vramplan.families.common import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        gptj,
        gpt_neox,
        llama,
        mistral,
        phi,
        phi3,
        qwen2,
        qwen3,
        stablelm,
        starcoder2,
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
