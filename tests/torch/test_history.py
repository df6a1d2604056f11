"""The allocator's history as a timeline, from traces written by hand (no GPU has to make one)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from vramplan.measure.blocks import Mark
from vramplan.measure.gauge import Gauge, PhaseBook
from vramplan.measure.history import HistoryTap
from vramplan.names import holder_of, owner_of
from vramplan.timeline import Kind, Phase

BEFORE = 10  # allocations of the process before the recording began
MLP = "model.layers.0.mlp"
BNB = ("site-packages/bitsandbytes/backends/cuda/ops.py:_dequantize",)
LOADER = ("torch/utils/data.py:x", "site-packages/accelerate/data_loader.py:__iter__")


class Seen(NamedTuple):
    """One event as the tests read it."""

    name: str
    nbytes: int
    kind: Kind
    owner: str
    phase: Phase


class Story:
    """What happens in a run: the allocator's trace, and the marks and labels taken beside it."""

    def __init__(self) -> None:
        gauge = Gauge(torch.device("cpu"))
        self.tap = HistoryTap(gauge, PhaseBook(gauge))
        self.tap.base = self.count = BEFORE
        self.tap.decoder = "model"
        self.tap.trace = []
        self.tap.stopped_at = self.tap.kept_to = 10**6
        self.places: dict[str, int] = {}
        self.names: dict[int, str] = {}

    def at(self, phase: str, owner: str = "", *, inside: bool = False) -> Story:
        self.tap.marks.append(Mark(self.count, phase, owner, inside))
        return self

    def alloc(
        self, name: str, size: int = 512, frames: tuple[str, ...] = (), place: int | None = None
    ) -> Story:
        self.count += 1
        self.places[name] = place or 4096 * self.count
        self.names[self.count] = name
        self._entry("alloc", name, size=size, frames=[_frame(frame) for frame in frames])
        return self

    def free(self, name: str, action: str = "free_completed") -> Story:
        self._entry(action, name)
        return self

    def _entry(self, action: str, name: str, **more: Any) -> None:
        self.tap.trace.append({"action": action, "addr": self.places[name], "size": 0} | more)

    def segment(self, action: str, size: int) -> Story:
        self.tap.trace.append({"action": f"segment_{action}", "addr": 1, "size": size})
        return self

    def label(self, **meanings: tuple[Kind, str]) -> Story:
        places = {self.places[name]: meaning for name, meaning in meanings.items()}
        self.tap.labels.append((self.count, places))
        return self

    def ready(self) -> Story:
        self.tap.ready_at = self.count
        return self

    def keep(self) -> Story:
        self.tap.kept_to = self.count
        return self

    def stop(self) -> Story:
        self.tap.stopped_at = self.count
        return self

    def events(self) -> list[Seen]:
        (section,) = self.tap.timeline()[0].sections
        return [
            Seen(self.names[e.block], e.nbytes, e.kind, e.owner, e.phase) for e in section.events
        ]

    def kind_of(self, name: str) -> tuple[Kind, str]:
        (found,) = {(e.kind, e.owner) for e in self.events() if e.name == name}
        return found


def _frame(text: str) -> dict[str, str]:
    filename, _, name = text.rpartition(":")
    return {"filename": filename, "name": name}


def test_sizes_are_rounded_and_releases_carry_their_block() -> None:
    story = Story().at("forward", MLP, inside=True).alloc("a", 1000).alloc("b", 512).free("a")
    assert story.events() == [
        ("a", 1024, Kind.ACTIVATIONS, MLP, Phase.FORWARD),
        ("b", 512, Kind.ACTIVATIONS, MLP, Phase.FORWARD),
        ("a", -1024, Kind.ACTIVATIONS, MLP, Phase.FORWARD),
    ]


def test_only_a_completed_release_counts() -> None:
    story = Story().at("forward", MLP, inside=True).alloc("a").free("a", "free_requested")
    assert [event.nbytes for event in story.events()] == [512]
    assert [event.nbytes for event in story.free("a").events()] == [512, -512]


def test_what_was_there_before_is_left_out() -> None:
    story = Story()
    story.places["old"] = 1
    assert [event.name for event in story.free("old").alloc("a").events()] == ["a"]


def test_an_address_used_again_is_another_block() -> None:
    story = Story().at("forward", MLP, inside=True).alloc("a", place=7).free("a")
    story.alloc("b", place=7).label(b=(Kind.GRADIENTS, "w")).alloc("c")
    assert story.kind_of("a") == (Kind.ACTIVATIONS, MLP)
    assert story.kind_of("b") == (Kind.GRADIENTS, "w")


def test_the_load() -> None:
    story = Story().at("load").alloc("weight").alloc("scratch").free("scratch")
    story.at("prepare", "lm_head").alloc("cast").ready().label(weight=(Kind.WEIGHTS, "lm_head"))
    story.at("forward").alloc("later")
    assert story.kind_of("weight") == (Kind.WEIGHTS, "lm_head")
    assert story.kind_of("scratch") == (Kind.WEIGHTS, "load")
    assert story.kind_of("cast") == (Kind.WEIGHTS, "lm_head")
    assert [event.phase for event in story.events()] == [
        Phase.LOAD, Phase.LOAD, Phase.LOAD, Phase.PREPARE, Phase.FORWARD,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "owner", "inside", "frames", "meaning"),
    [
        ("forward", MLP, True, (), (Kind.ACTIVATIONS, MLP)),
        ("forward", "model", True, (), (Kind.BATCH, "model")),  # positions and masks
        ("forward", "", False, LOADER, (Kind.BATCH, "batch")),
        ("forward", "lm_head", True, (), (Kind.LOGITS, "lm_head")),
        ("forward", "embed_out", True, (), (Kind.LOGITS, "embed_out")),
        ("loss", "model", True, (), (Kind.LOGITS, "loss")),
        ("backward", "", False, (), (Kind.LOGITS, "loss")),
        ("backward", "lm_head", False, (), (Kind.LOGITS, "lm_head")),
        ("backward", MLP, False, (), (Kind.ACTIVATION_GRADIENTS, MLP)),
        ("backward", MLP, True, (), (Kind.ACTIVATIONS, MLP)),  # recomputed
        ("step", "", False, (), (Kind.WORKSPACE, "optimizer")),
    ],
)
def test_kinds(
    phase: str, owner: str, inside: bool, frames: tuple[str, ...], meaning: tuple[Kind, str]
) -> None:
    assert Story().at(phase, owner, inside=inside).alloc("a", 512, frames).kind_of("a") == meaning


def test_an_allocation_belongs_to_the_last_mark_before_it() -> None:
    story = Story().at("forward", MLP, inside=True).alloc("a")
    story.at("forward", "lm_head", inside=True).at("loss").alloc("b")
    story.at("backward").at("backward", MLP).alloc("c")
    assert [(e.name, e.owner) for e in story.events()] == [("a", MLP), ("b", "loss"), ("c", MLP)]


def test_a_dequantised_weight_is_scratch_only_within_its_module() -> None:
    story = Story().at("forward", MLP, inside=True).alloc("scratch", 512, BNB).free("scratch")
    story.alloc("kept", 512, BNB).alloc("own", 512).free("own")
    story.at("forward", "", inside=False).free("kept").alloc("end")
    assert story.kind_of("scratch") == (Kind.WORKSPACE, MLP)
    assert story.kind_of("kept") == (Kind.ACTIVATIONS, MLP)
    assert story.kind_of("own") == (Kind.ACTIVATIONS, MLP)


def test_labels_say_what_a_place_could_not() -> None:
    story = Story().at("backward", MLP).alloc("grad").alloc("passing").free("passing")
    story.label(grad=(Kind.GRADIENTS, f"{MLP}.up_proj")).at("step").alloc("state")
    story.label(state=(Kind.OPTIMIZER, f"{MLP}.up_proj")).free("grad").at("forward").alloc("next")
    assert story.kind_of("grad") == (Kind.GRADIENTS, f"{MLP}.up_proj")
    assert story.kind_of("passing") == (Kind.ACTIVATION_GRADIENTS, MLP)
    assert story.kind_of("state") == (Kind.OPTIMIZER, f"{MLP}.up_proj")


def test_a_gradient_released_before_anything_else_is_made_is_a_gradient() -> None:
    """A fused optimizer makes nothing from its second step on: zero_grad comes next."""
    story = Story().at("backward", MLP).alloc("grad").label(grad=(Kind.GRADIENTS, MLP))
    story.at("step").free("grad").at("forward", "model", inside=True).alloc("next")
    assert story.kind_of("grad") == (Kind.GRADIENTS, MLP)


def test_the_first_label_holds() -> None:
    story = Story().at("load").alloc("weight").ready()
    story.label(weight=(Kind.WEIGHTS, "first")).alloc("a")
    story.label(weight=(Kind.OPTIMIZER, "second")).alloc("b")
    assert story.kind_of("weight") == (Kind.WEIGHTS, "first")


def test_only_the_first_two_steps_are_kept() -> None:
    story = Story().at("forward", MLP, inside=True).alloc("a").free("a").alloc("b").keep()
    story.free("b").alloc("late").free("late").stop()
    assert [(e.name, e.nbytes > 0) for e in story.events()] == [
        ("a", True), ("a", False), ("b", True), ("b", False),
    ]  # fmt: skip


def test_what_clearing_the_workspaces_frees_is_workspace() -> None:
    story = Story().at("forward", MLP, inside=True).alloc("cublas", 2**25).alloc("activation")
    story.alloc("last").keep().free("activation").alloc("late").stop()
    story.free("cublas").free("late")
    assert story.kind_of("cublas") == (Kind.WORKSPACE, "cublas")
    assert story.kind_of("activation") == (Kind.ACTIVATIONS, MLP)
    assert "late" not in [event.name for event in story.events()]


def test_segments_lie_between_the_events() -> None:
    story = Story().at("forward", MLP, inside=True).segment("alloc", 2**21).alloc("a").alloc("b")
    story.segment("alloc", 2**25).alloc("c").free("a").keep().segment("free", 2**21)
    story.segment("map", 2**22).alloc("late").segment("alloc", 2**30).stop()
    assert story.tap.timeline()[1] == [(0, 2**21), (2, 2**25), (4, -(2**21)), (4, 2**22)]


def test_without_a_gpu_the_timeline_is_empty() -> None:
    story = Story()
    story.tap.stop()
    assert story.events() == []


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("", "model"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj"),
        (
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
            "model.layers.3.self_attn.q_proj",
        ),
        (
            "base_model.model.model.layers.3.self_attn.q_proj.base_layer.weight",
            "model.layers.3.self_attn.q_proj",
        ),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head"),
        ("base_model.model.lm_head.original_module.weight", "lm_head"),
    ],
)
def test_owners(name: str, owner: str) -> None:
    assert owner_of(name) == owner


@pytest.mark.parametrize(
    ("name", "holder"),
    [
        ("transformer.h.7.attn.bias", "transformer.h.7.buffers"),
        ("base_model.model.transformer.h.7.attn.bias", "transformer.h.7.buffers"),
        ("model.rotary_emb.inv_freq", "buffers"),
    ],
)
def test_holders_of_buffers(name: str, holder: str) -> None:
    assert holder_of(name) == holder
