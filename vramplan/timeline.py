"""The Timeline: every allocation and release of one training run.

All witnesses (the estimate, the trace, the measurement) write this one type. Repeated identical
layers are written once: an event carries how many equal copies of it the run makes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vramplan.errors import RecordError
from vramplan.names import any_layer

SCHEMA_VERSION = 1


class Kind(enum.StrEnum):
    """What a block of device memory is for."""

    WEIGHTS = "weights"  # base model parameters, their quantisation state and buffers
    ADAPTERS = "adapters"  # LoRA matrices and modules_to_save copies
    OPTIMIZER = "optimizer"  # optimizer state resident on the device
    GRADIENTS = "gradients"  # .grad of trainable parameters
    ACTIVATIONS = "activations"  # forward results, kept for backward or passing through
    ACTIVATION_GRADIENTS = "activation_gradients"  # results of backward on their way down
    LOGITS = "logits"  # everything with a vocabulary dimension between head and loss
    WORKSPACE = "workspace"  # cuBLAS workspaces, hidden dequantised weights, optimizer temporaries
    ROUNDING = "rounding"  # unsplit remainders of reused blocks (allocator replay)
    BATCH = "batch"  # token ids, labels, masks and position tables

    # Members are dictionary keys in the hottest loop; the identity hash is 3 times faster than
    # StrEnum's.
    __hash__ = object.__hash__


class Phase(enum.StrEnum):
    """Where in a run something happens."""

    LOAD = "load"
    PREPARE = "prepare"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    STEP = "step"
    EVALUATE = "evaluate"
    SAVE = "save"

    __hash__ = object.__hash__


CLIP = "clip_grad_norm"  # owner of what clipping allocates, before the optimizer has any state
BEFORE_TRAINING = (Phase.LOAD, Phase.PREPARE)


class Event(NamedTuple):
    """One allocation (``nbytes`` > 0) or release (``nbytes`` < 0).

    Attributes:
        block: Identity of the block; its release carries the same number.
        nbytes: Bytes as the caching allocator counts them (multiples of 512), for one copy.
        kind: What the block is for.
        owner: Module that asked for it, ``model.layers.*`` for a repeated layer.
        phase: Where in the run.
        copies: How many equal blocks this stands for.
    """

    block: int
    nbytes: int
    kind: Kind
    owner: str
    phase: Phase
    copies: int = 1


class Section(NamedTuple):
    """A stretch of events that the run performs ``repeats`` times, once per identical layer."""

    events: tuple[Event, ...]
    repeats: int = 1


class Peak(NamedTuple):
    """The fullest moment of a run."""

    nbytes: int
    phase: Phase
    owner: str
    by_kind: dict[Kind, int]
    by_owner: dict[str, int]
    by_kind_and_owner: dict[tuple[Kind, str], int]


class Timeline(NamedTuple):
    """Sections in the order in which the run performs them."""

    sections: tuple[Section, ...]

    def events(self) -> Iterator[Event]:
        """Every event once, repeated sections not unrolled."""
        for section in self.sections:
            yield from section.events

    def peak(self, *, by_layer: bool = False) -> Peak:
        """Find the fullest moment of training and what the memory is used for at it.

        Args:
            by_layer: Tell layers apart, as far as the sections do; otherwise all layers are one
                owner, ``model.layers.*.mlp``. Blocks that one layer hands to the next are booked
                to either; only their sum is exact.

        Returns:
            The peak over the whole timeline; its parts sum exactly to its ``nbytes``.

        Known limitations:
            Within a repeated section bytes grow linearly from one repetition to the next, so only
            the first and the last repetition can hold the peak; both are looked at.
        """
        live: dict[tuple[Kind, str], int] = {}
        total = 0
        best = (-1, Phase.LOAD, "", dict(live))
        twins = handed_on(self)
        keys = {e.block: (e.kind, e.owner) for e in self.events() if e.nbytes > 0}
        for index, section in enumerate(self.sections):
            first = dict(live)
            base = total
            total, best = _walk(section.events, live, total, best)
            more = section.repeats - 1
            if more <= 0:
                continue
            change = {
                key: live.get(key, 0) - first.get(key, 0) for key in live.keys() | first.keys()
            }
            # the other repetitions release their own equivalent of what this one was handed
            own: dict[tuple[Kind, str], int] = {}
            for event in section.events:
                if event.nbytes < 0 and (index, event.block) in twins:
                    key, twin = keys[event.block], keys[twins[index, event.block][0]]
                    own[key] = own.get(key, 0) - event.nbytes
                    own[twin] = own.get(twin, 0) + event.nbytes
            step = total - base
            fullest_last = step > 0
            for key in change.keys() | own.keys():
                again = change.get(key, 0) + own.get(key, 0)
                start = own.get(key, 0) if fullest_last else again
                live[key] = live.get(key, 0) + (more - 1) * again + start
            if fullest_last:
                total, best = _walk(section.events, live, base + more * step, best)
            else:
                total = base + section.repeats * step
        nbytes, phase, owner, snapshot = best
        by_kind: dict[Kind, int] = {}
        by_owner: dict[str, int] = {}
        both: dict[tuple[Kind, str], int] = {}
        for (kind, name), size in snapshot.items():
            if size:
                module = name if by_layer else any_layer(name)
                by_kind[kind] = by_kind.get(kind, 0) + size
                by_owner[module] = by_owner.get(module, 0) + size
                both[kind, module] = both.get((kind, module), 0) + size
        return Peak(nbytes, phase, owner, by_kind, by_owner, both)


_Best = tuple[int, Phase, str, dict[tuple[Kind, str], int]]


def _walk(
    events: tuple[Event, ...], live: dict[tuple[Kind, str], int], total: int, best: _Best
) -> tuple[int, _Best]:
    """Apply events to ``live`` in place; remember the fullest moment of training."""
    top = best[0]
    for event in events:
        key = (event.kind, event.owner)
        size = event.nbytes * event.copies
        live[key] = live.get(key, 0) + size
        total += size
        if total > top and event.phase not in BEFORE_TRAINING:
            top = total
            best = (total, event.phase, event.owner, dict(live))
    return total, best


def handed_on(timeline: Timeline) -> dict[tuple[int, int], tuple[int, bool]]:
    """Match what a repeated section releases of its outer neighbour with its own equivalent.

    The written-out layer releases a block F of the layer before it; its own equivalent Y is
    released, once, by the layer after it. Of k repetitions one releases F, the others a Y: in the
    walk that made them (chained) F goes first, in the reversed walk F goes last.

    Returns:
        (section, F) -> (Y, chained).
    """
    home: dict[int, int] = {}
    size: dict[int, int] = {}
    left: dict[int, list[int]] = {}  # repeated section -> its blocks released once elsewhere
    taken: dict[int, list[int]] = {}  # repeated section -> outer blocks it releases
    repeats = [section.repeats for section in timeline.sections]
    for index, section in enumerate(timeline.sections):
        for event in section.events:
            if event.nbytes > 0:
                home[event.block], size[event.block] = index, event.nbytes
            elif event.nbytes < 0 and event.copies == 1 and event.block in home:
                source = home[event.block]
                if repeats[index] == 1 and repeats[source] > 1:
                    left.setdefault(source, []).append(event.block)
                elif repeats[index] > 1 and repeats[source] == 1:
                    taken.setdefault(index, []).append(event.block)
    matches: dict[tuple[int, int], tuple[int, bool]] = {}
    for index, blocks in taken.items():
        for block in blocks:
            for source in (index, *sorted((s for s in left if s < index), reverse=True)):
                if repeats[source] != repeats[index]:
                    continue
                twin = next((b for b in left.get(source, ()) if size[b] == size[block]), None)
                if twin is not None:
                    matches[index, block] = (twin, source == index)
                    left[source].remove(twin)
                    break
    return matches


def timeline_document(timeline: Timeline) -> dict[str, Any]:
    """The compact JSON form of a timeline: names once, one short list per event."""
    names: dict[str, int] = {}
    kinds, phases = list(Kind), list(Phase)
    return {
        "schema_version": SCHEMA_VERSION,
        "kinds": [kind.value for kind in kinds],
        "phases": [phase.value for phase in phases],
        "sections": [
            {
                "repeats": section.repeats,
                "events": [
                    [
                        event.block,
                        event.nbytes,
                        kinds.index(event.kind),
                        names.setdefault(event.owner, len(names)),
                        phases.index(event.phase),
                        event.copies,
                    ]
                    for event in section.events
                ],
            }
            for section in timeline.sections
        ],
        "owners": list(names),
    }


def timeline_from_document(document: Mapping[str, Any], where: str) -> Timeline:
    """The timeline of its JSON form.

    Args:
        document: What ``timeline_document`` made.
        where: How to name it in errors.

    Raises:
        RecordError: If it is of a newer version or broken.
    """
    try:
        if document["schema_version"] > SCHEMA_VERSION:
            raise RecordError(
                f"{where} has schema_version {document['schema_version']}; this vramplan reads up "
                f"to {SCHEMA_VERSION}, update it"
            )
        kinds = [Kind(name) for name in document["kinds"]]
        phases = [Phase(name) for name in document["phases"]]
        owners = [str(name) for name in document["owners"]]
        return Timeline(
            tuple(
                Section(
                    tuple(
                        Event(int(block), int(nbytes), kinds[k], owners[o], phases[p], int(copies))
                        for block, nbytes, k, o, p, copies in section["events"]
                    ),
                    int(section["repeats"]),
                )
                for section in document["sections"]
            )
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise RecordError(f"{where} is not a usable timeline: {error!r}") from None
