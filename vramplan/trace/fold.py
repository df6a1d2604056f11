"""Equal decoder layers, traced once: the first, one that stands for all between, the last.

The trace of such a cut model becomes a Timeline whose middle layer's forward and backward are
sections that repeat; what outside of them belongs to the middle layer (weights, gradients,
optimizer state) exists as many times at once.
"""

from __future__ import annotations

from typing import Any

import torch

from vramplan.timeline import Event, Phase, Section, Timeline
from vramplan.trace.tracker import Block, Books

CUT = 3  # layers of a cut model
MIDDLE = 1  # the one that stands for others
UNLIKE = frozenset(("layer_idx", "layer_id", "layer_number", "training"))


def layers_of(model: Any) -> tuple[str, list[Any]]:
    """The decoder layers of a model and their path; none where it has no such list."""
    count = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, list(module)
    return "", []


def can_fold(model: Any) -> bool:
    """Whether all layers between the first and the last are equal, and enough to be worth it."""
    _, layers = layers_of(model)
    if len(layers) <= CUT:
        return False
    return len({_signature(layer) for layer in layers[1:-1]}) == 1


def _signature(layer: Any) -> tuple[Any, ...]:
    """All that decides what a layer does: modules, their settings, their tensors' shapes."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, (int, float, str, bool)) and key not in UNLIKE
        )
        tensors = (*module._parameters.items(), *module._buffers.items())
        shapes = tuple((key, tuple(t.shape), t.dtype) for key, t in tensors if t is not None)
        found.append((name, type(module).__name__, settings, shapes))
    return tuple(found)


def cut_config(config: Any) -> None:
    """Leave a transformers config its first, second and last layer."""
    count = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[0], value[1], value[-1]])
    config.num_hidden_layers = CUT


def timelines(books: Books, repeats: int, steady_from: int) -> tuple[Timeline, Timeline]:
    """The whole run, and the same with all before a step counted as preparation.

    Args:
        books: A finished trace.
        repeats: How many layers the middle one stands for; 1 if the model was not cut.
        steady_from: The step from which on a peak counts.
    """
    once = _sequential(books)
    whole: list[Section] = []
    steady: list[Section] = []
    events: list[Event] = []
    late: list[Event] = []
    inside = False

    def close() -> None:
        if events:
            times = repeats if inside else 1
            whole.append(Section(tuple(events), times))
            steady.append(Section(tuple(late), times))
            events.clear()
            late.clear()

    for block, sign, phase, step, layer in books.entries:
        middle = repeats > 1 and layer == MIDDLE
        if middle is not inside:
            close()
            inside = middle
        together = layer is None and block.layer == MIDDLE and block not in once
        copies = repeats if together else 1
        event = Event(block.number, sign * block.nbytes, block.kind, block.owner, phase, copies)
        events.append(event)
        late.append(event if step >= steady_from else event._replace(phase=Phase.PREPARE))
    close()
    return Timeline(tuple(whole)), Timeline(tuple(steady))


def _sequential(books: Books) -> set[Block]:
    """Temporaries of an optimizer that goes parameter by parameter: one layer's at a time."""
    made: dict[Block, int] = {}
    once: set[Block] = set()
    for block, sign, phase, step, _layer in books.entries:
        if phase is Phase.STEP and not block.together:
            if sign > 0:
                made[block] = step
            elif made.get(block) == step:
                once.add(block)
    return once
