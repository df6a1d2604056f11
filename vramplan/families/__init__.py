"""Block programs, one file per model family."""

from __future__ import annotations

from vramplan.errors import UnknownNameError
from vramplan.families import bloom, falcon, gpt2, gpt_neox, gptj, llama, mistral, opt, qwen2
from vramplan.families.common import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (bloom, falcon, gpt2, gpt_neox, gptj, llama, mistral, opt, qwen2)
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
            "model family",
            model_type,
            FAMILIES,
            "No block program describes it; `vramplan trace` runs its own code on fake tensors.",
        ) from None


__all__ = ["FAMILIES", "Family", "find_family"]
