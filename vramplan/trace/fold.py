"""Equal decoder layers, traced once: the first ones, a period that stands for many, the last.

A period is one layer, or several where kinds of layers take turns. The trace of such a cut model
becomes a Timeline whose middle period's forward and backward are sections that repeat; what outside
of them belongs to the middle layers (weights, gradients, optimizer state) exists as many times at
once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vramplan.timeline import Event, Phase, Section, Timeline
from vramplan.trace.tracker import Block, Books

MAX_PERIOD = 8
UNLIKE = frozenset(("layer_idx", "layer_id", "layer_number", "training"))


def layers_of(model: Any) -> tuple[str, list[Any]]:
    """The decoder layers of a model and their path; none where it has no such list."""
    count = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, list(module)
    return "", []


class Cut(NamedTuple):
    """Which layers of a model are traced.

    Attributes:
        lead: Layers kept before the middle period.
        period: Layers of the middle period.
        last: Layers kept behind it.
        repeats: How many periods the middle one stands for.
    """

    lead: int
    period: int
    last: int
    repeats: int

    @property
    def middle(self) -> range:
        """The layers of the cut model that stand for others."""
        return range(self.lead, self.lead + self.period) if self.repeats > 1 else range(0)

    @property
    def num_left_out(self) -> int:
        """Layers that the cut model lacks."""
        return self.period * (self.repeats - 1)

    def config(self, config: Any) -> None:
        """Leave a transformers config the traced layers."""
        count = config.num_hidden_layers
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(config, name, value[: self.lead + self.period] + value[-self.last :])
        config.num_hidden_layers = self.lead + self.period + self.last


WHOLE = Cut(0, 0, 0, 1)


def find_cut(model: Any, num_leads: int = 1) -> Cut:
    """The shortest period in which a model's layers repeat; WHOLE if there is none worth it.

    Args:
        model: The model.
        num_leads: Periods kept before the middle one: two where the layers of the first have no
            gradient to hand down and leave blocks that the next ones let go of, once.
    """
    kinds = [_signature(layer) for layer in layers_of(model)[1]]
    count = len(kinds)
    for period in range(1, MAX_PERIOD + 1):
        lead = num_leads * period
        last = period + count % period
        repeats = (count - lead - last) // period
        if repeats < 2:
            break
        between = kinds[lead : count - last]
        if all(kind == between[i % period] for i, kind in enumerate(between)):
            return Cut(lead, period, last, repeats)
    return WHOLE


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


def timelines(books: Books, steady_from: int) -> tuple[Timeline, Timeline]:
    """The whole run, and the same with all before a step counted as preparation.

    Args:
        books: A finished trace.
        steady_from: The step from which on a peak counts.

    Known limitations:
        What all layers share and a middle one is the last to hold (the mask of a kind that only
        middle layers have) is released at the end of the repeated section, not within its last
        repetition.
    """
    sheets = _Sheets(books.repeats, steady_from)
    once = _sequential(books)
    for block, sign, phase, step, layer in books.entries:
        together = layer is None and block.layer in books.middle and block not in once
        copies = books.repeats if together else 1
        event = Event(block.number, sign * block.nbytes, block.kind, block.owner, phase, copies)
        inside = layer in books.middle
        if inside and sign < 0 and block.layer is None:
            sheets.postponed.append((event, step))
            continue
        sheets.write(event, step, inside=inside)
    sheets.close()
    return Timeline(tuple(sheets.whole)), Timeline(tuple(sheets.steady))


class _Sheets:
    """Collects events into sections, for both timelines."""

    def __init__(self, repeats: int, steady_from: int) -> None:
        self.repeats, self.steady_from = repeats, steady_from
        self.whole: list[Section] = []
        self.steady: list[Section] = []
        self.postponed: list[tuple[Event, int]] = []
        self._events: list[Event] = []
        self._late: list[Event] = []
        self._inside = False

    def write(self, event: Event, step: int, *, inside: bool) -> None:
        """One event, in a repeated section or not."""
        if inside is not self._inside:
            self.close()
            self._inside = inside
            waiting, self.postponed = self.postponed, []
            for late, its_step in waiting:
                self._put(late, its_step)
        self._put(event, step)

    def _put(self, event: Event, step: int) -> None:
        self._events.append(event)
        steady = step >= self.steady_from
        self._late.append(event if steady else event._replace(phase=Phase.PREPARE))

    def close(self) -> None:
        """End a section."""
        if self._events:
            times = self.repeats if self._inside else 1
            self.whole.append(Section(tuple(self._events), times))
            self.steady.append(Section(tuple(self._late), times))
            self._events, self._late = [], []


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
