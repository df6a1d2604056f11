"""The card of this process: what stands in the way of it, and what others hold on it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vramplan.errors import EnvironmentProblem
from vramplan.measure.card import TorchCard, open_card
from vramplan.measure.harness import Harness
from vramplan.measure.machine import Device, locked
from vramplan.units import GIB, MIB


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EnvironmentProblem, match=r"this torch \(.*\) is built without CUDA"):
        open_card()


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="torch sees no CUDA GPU"):
        open_card()


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'vramplan\[measure\]'"):
        open_card()


class FakeMachine:
    """One card of which so much is used; the driver may tell of this process."""

    def __init__(self) -> None:
        self.used = 0
        self.own: dict[int, Any] = {}

    def device(self, index: int) -> Device:
        return Device(index, "GPU-1", "NVIDIA H100", "580", 80 * GIB, "9.0", "h100-sxm-80gb")

    def used_bytes(self, _device: Device) -> int:
        return self.used

    def processes(self, _device: Device) -> dict[int, Any]:
        return self.own


class Fixture:
    """A card whose torch holds ``reserved`` bytes once CUDA is begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, begun: bool) -> None:
        self.machine = FakeMachine()
        self.begun, self.reserved = begun, 0
        cuda = SimpleNamespace(
            is_initialized=lambda: self.begun,
            memory_reserved=lambda: self.reserved,
            mem_get_info=lambda: (80 * GIB - self.machine.used, 80 * GIB),
        )
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.begun)
        self.card = TorchCard(self.machine, 0)  # type: ignore[arg-type]
        self.card.torch = SimpleNamespace(cuda=cuda)

    def take(self, reserved: int) -> None:
        """This process reserves; its first use of the card adds the context."""
        self.machine.used += reserved + (0 if self.begun else 500 * MIB)
        self.begun, self.reserved = True, self.reserved + reserved


def test_others_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Fixture(monkeypatch, begun=False)
    found.machine.used = 3 * GIB
    found.card.acquired()
    found.take(GIB)
    assert found.card.own_bytes() == GIB + 500 * MIB
    found.card.released()
    found.machine.used += 5 * GIB  # another worker, while it held the lock
    found.take(GIB)  # and a test of ours that does not measure
    found.card.acquired()
    assert found.card.own_bytes() == 2 * GIB + 500 * MIB


def test_what_cannot_be_told_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Fixture(monkeypatch, begun=True)
    found.machine.used = 3 * GIB
    found.card.acquired()
    assert found.card.own_bytes() is None
    monkeypatch.setattr("os.getpid", lambda: 42)
    found.machine.own = {42: ("python", 2 * GIB)}
    assert found.card.own_bytes() == 2 * GIB


def test_what_a_card_is_compared_by(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Fixture(monkeypatch, begun=False).card
    assert card.where == {"GPU": "h100-sxm-80gb", "allocator": "default"}
    assert card.versions["torch"] == torch.__version__ and card.versions["driver"] == "580"
    assert card.limit() == "" and card.lock_name == "GPU-1"


def test_a_harness_for_whoever_holds_the_lock(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with locked("cpu"):
        with Harness("cpu", lock=False):
            pass
        with pytest.raises(EnvironmentProblem, match="another vramplan"), Harness("cpu"):
            pass
