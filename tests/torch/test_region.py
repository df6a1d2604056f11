"""Regions of real programs on CPU tensors: whose memory it is, and that nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cpu_card import CpuCard
from torch import nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils.checkpoint import checkpoint

from vramplan.measure.region import Meter, Region

WIDTH, VOCAB, ROWS = 64, 512, 256
ACTIVATION = ROWS * WIDTH * 4
LOGITS = ROWS * VOCAB * 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = (
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self, *, recompute: bool = False, vocab: int = VOCAB) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, vocab, bias=False)
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.lm_head(x)


@pytest.fixture
def card() -> Iterator[CpuCard]:
    gc.collect()
    with CpuCard() as found:
        yield found
    assert found.log is None
    assert_no_hooks()


def assert_no_hooks() -> None:
    for registered in (
        hooks._global_forward_hooks,
        hooks._global_forward_pre_hooks,
        optimizer_hooks._global_optimizer_pre_hooks,
        optimizer_hooks._global_optimizer_post_hooks,
    ):
        assert not registered
    assert torch.autograd.backward.__module__ == "torch.autograd"


def step(model: Model, optimizer: Any = None, copies: int = 1) -> None:
    logits = model(torch.randn(ROWS, WIDTH))
    wide = [logits * 1.0 for _ in range(copies)]
    loss = sum(one.logsumexp(-1).mean() for one in wide)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def measure(card: CpuCard, model: Model, optimizer: Any = None, **more: Any) -> Region:
    with Meter(card).measure("step") as region:
        step(model, optimizer, **more)
    return region


def held(region: Region, kind: str) -> dict[str, int]:
    return {owner: size for (k, owner), size in region.owners.items() if k == kind}


def test_weights_gradients_and_state_have_their_modules(card: CpuCard) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    region = measure(card, model, optimizer)
    parameters = {name.rpartition(".")[0]: 0 for name, _ in model.named_parameters()}
    assert held(region, "weights").keys() == parameters.keys()
    assert held(region, "weights")["lm_head"] == VOCAB * WIDTH * 4
    update = {owner for kind, owner in region.moments["step"] if kind == "optimizer"}
    assert update == parameters.keys()
    left = {kind for kind, _ in region.left}
    assert left == {"weights", "optimizer"} - {"weights"}  # the model was there before
    assert sum(region.owners.values()) == region.peak_allocated_bytes
    for phase, size in region.phases.items():
        assert sum(region.moments[phase].values()) == size


def test_phases_in_their_order(card: CpuCard) -> None:
    model = Model()
    region = measure(card, model, torch.optim.SGD(model.parameters(), momentum=0.9))
    assert list(region.phases) == ["outside modules", "forward", "loss", "backward", "step"]
    assert region.phase == "backward"


def test_activations_belong_to_the_innermost_module(card: CpuCard) -> None:
    region = measure(card, Model())
    kept = region.moments["loss"]
    for n in range(3):
        assert kept["activations", f"layers.{n}.up"] == 4 * ACTIVATION
        assert kept["activations", f"layers.{n}.act"] == 4 * ACTIVATION
    assert kept["logits", "lm_head"] == LOGITS


def test_an_extra_copy_of_the_logits_is_found(card: CpuCard) -> None:
    model = Model()
    step(model)
    one, two = measure(card, model), measure(card, model, copies=2)
    grown = two.moments["loss"]["logits", "loss"] - one.moments["loss"]["logits", "loss"]
    assert grown >= LOGITS
    assert two.moments["loss"]["logits", "lm_head"] == LOGITS


def test_recomputed_layers_are_the_backwards(card: CpuCard) -> None:
    region = measure(card, Model(recompute=True, vocab=8))
    assert ("activations", "layers.0.up") not in region.moments["loss"]
    assert list(region.phases) == ["outside modules", "forward", "loss", "backward"]
    assert region.phase == "backward"
    assert region.owners["activations", "layers.0.up"] == 4 * ACTIVATION


def test_evaluation_is_a_phase_of_its_own(card: CpuCard) -> None:
    model = Model()
    with Meter(card).measure("eval") as region, torch.no_grad():
        model(torch.randn(ROWS, WIDTH))
        kept = torch.zeros(10_000)
    assert list(region.phases) == ["outside modules", "evaluate"]
    assert region.leaked_bytes == kept.numel() * 4 // 512 * 512 + 512
    assert region.left == {("outside modules", ""): region.leaked_bytes}


def test_a_loss_that_is_a_module(card: CpuCard) -> None:
    model, loss = Model(), nn.CrossEntropyLoss()
    with Meter(card).measure("step") as region:
        loss(model(torch.randn(ROWS, WIDTH)), torch.zeros(ROWS, dtype=torch.long)).backward()
    assert region.moments["loss"]["logits", "loss"] >= LOGITS
    assert {o for k, o in region.moments["backward"] if k == "logits"} <= {"loss", "lm_head"}


def test_two_models(card: CpuCard) -> None:
    policy, reference = Model(), Model()
    with Meter(card).measure("step") as region:
        with torch.no_grad():
            expected = reference(torch.randn(ROWS, WIDTH))
        (policy(torch.randn(ROWS, WIDTH)) - expected).pow(2).mean().backward()
    weights = held(region, "weights")
    assert weights["lm_head"] == weights["Model.lm_head"] == VOCAB * WIDTH * 4


def test_wrappers_leave_no_trace_in_names(card: CpuCard) -> None:
    model = Model()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    wrapper = Wrapper()
    with Meter(card).measure("step") as region:
        wrapper(torch.randn(ROWS, WIDTH)).sum().backward()
    assert set(held(region, "weights")) == set(held(measure(card, model), "weights"))


def test_a_leak_a_step(card: CpuCard) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    kept = []
    with Meter(card).measure("steps") as region:
        for _ in range(4):
            step(model, optimizer)
            kept.append(torch.zeros(1024))
    assert region.per_step_bytes == 4096
    assert region.left["outside modules", ""] == 4 * 4096


def test_regions_inside_each_other(card: CpuCard) -> None:
    model, meter = Model(), Meter(card)
    with meter.measure("both") as outer:
        with meter.measure("first") as first:
            step(model)
        assert card.starts == 1 and card.stops == 0
        with meter.measure("second") as second:
            step(model, copies=2)
    assert card.stops == 1
    assert first.peak_allocated_bytes < second.peak_allocated_bytes
    assert outer.peak_allocated_bytes == second.peak_allocated_bytes
    assert outer.owners == second.owners
    assert held(second, "gradients") or second.moments["forward"]["gradients", "lm_head"]


def test_out_of_memory(card: CpuCard) -> None:
    model = Model()
    card.book_module(model)
    card.capacity = card.allocated() + 20 * ACTIVATION
    with pytest.raises(torch.OutOfMemoryError):
        measure(card, model)
    meter = Meter(card)
    with pytest.raises(torch.OutOfMemoryError), meter.measure("step") as region:
        step(model)
    assert region.oom and region.failed == "OutOfMemoryError"
    assert region.failure is not None
    assert (region.failure.phase, region.failure.owner) == ("forward", "layers.2.up")
    assert region.failure.requested_bytes == 4 * ACTIVATION
    assert region.leaked_bytes is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_on_after_an_exception(card: CpuCard, error: type[BaseException]) -> None:
    model = Model()

    def fail(*_args: Any) -> None:
        raise error

    model.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        measure(card, model)
    assert card.log is None and card.starts == card.stops == 1
    assert_no_hooks()
    model.layers[1]._forward_hooks.clear()
    assert measure(card, model).phase == "backward"


def test_a_recording_of_the_users_is_left_alone(card: CpuCard) -> None:
    card.of_user = True
    region = measure(card, Model())
    assert card.starts == card.stops == 0
    assert region.peak_allocated_bytes and not region.owners and not region.phases
    assert region.why_unknown == "the program records the allocator's history itself"


def test_a_recording_switched_off_on_the_way(card: CpuCard) -> None:
    with Meter(card).measure("step") as region:
        card.log = []
        step(Model())
        card.log = []
    assert region.peak_allocated_bytes and not region.owners
    assert region.why_unknown == "the program changed the recording of the allocator's history"


def test_a_model_is_not_kept_alive(card: CpuCard) -> None:
    with Meter(card).measure("step") as region:
        model = Model()
        step(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
    assert region.leaked_bytes == 0
    assert not region.left


def test_a_backward_of_the_users_own(card: CpuCard, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    with Meter(card).measure("step"):
        kept.append(torch.autograd.backward)
    assert kept[0] is not torch.autograd.backward
    tensor = torch.ones(1, requires_grad=True)
    kept[0]((tensor * 2).sum())
    assert tensor.grad is not None
