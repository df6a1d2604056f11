"""Names of owners, the same in measured histories, traces and estimates; and names of others."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_NAME = 160
OUTSIDE = "outside modules"  # a phase, and the kind of what a program makes in it
HEADS = ("lm_head", "embed_out")


def owner_of(name: str) -> str:
    """A module's or parameter's name without what peft and torch put around it."""
    name = name.removeprefix("base_model.model.")
    for word in (".base_layer", ".default", ".lora_A", ".lora_B", ".modules_to_save",
                 ".original_module", ".lora_dropout"):  # fmt: skip
        name = name.replace(word, "")
    return name.removesuffix(".weight").removesuffix(".bias") or "model"


def holder_of(name: str) -> str:
    """Who holds a buffer: its layer's buffers, or the model's."""
    layer = re.match(r"(.*?\.\d+)\.", owner_of(name))
    return f"{layer[1]}.buffers" if layer else "buffers"


def any_layer(owner: str) -> str:
    """The owner in any layer: ``model.layers.0.mlp`` becomes ``model.layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in owner.split("."))


def printable(text: str, limit: int = MAX_NAME) -> str:
    """Text of others as one harmless line: no control characters, no endless names.

    Args:
        text: Anything.
        limit: Most characters.
    """
    known = text[: limit + 1]
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in known)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as ``0-3,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
