"""A loop over experts on fake tensors, as transformers before 5.0 wrote it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vramplan.config import dtype_option
from vramplan.trace.load import _bring_scalars
from vramplan.trace.routing import EvenRouting
from vramplan.trace.rules import CudaFunctions, answers
from vramplan.trace.tracker import Books, Tracker


def loop(num_experts: int, num_tokens: int, chosen: int) -> list[tuple[int, int]]:
    """Number of each expert that is hit and how many tokens it gets."""
    books, routing = Books(), EvenRouting()
    found = []
    with (
        FakeTensorMode(),
        Tracker(books, {}, answers(routing)),
        CudaFunctions(books, (9, 0), routing),
    ):
        selected = torch.empty((num_tokens, chosen), dtype=torch.int64)
        mask = torch.nn.functional.one_hot(selected, num_classes=num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        layers = list(range(num_experts))
        for number in hit:
            index, tokens = torch.where(mask[number].squeeze(0))
            assert index.shape == tokens.shape
            found.append((layers[number], tokens.numel()))
    return found


@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "chosen", "share"),
    [(8, 1024, 2, 256), (4, 30, 1, 8), (128, 16, 1, 1)],
)
def test_every_expert_gets_its_share(
    num_experts: int, num_tokens: int, chosen: int, share: int
) -> None:
    assert loop(num_experts, num_tokens, chosen) == [(n, share) for n in range(num_experts)]


def test_other_numbers_are_as_in_a_mask_of_ones() -> None:
    routing = EvenRouting()
    assert routing.scalar(torch.zeros((), dtype=torch.bool)) is True
    assert routing.scalar(torch.zeros(5, dtype=torch.int64)[3:4]) == 1


def test_numbers_that_a_module_keeps_stay_on_the_host() -> None:
    module: Any = torch.nn.Linear(2, 2)
    module.scale = torch.empty((), device="meta")
    module.table = torch.empty(4, device="meta")
    books = Books()
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker(books, {}, {}):
        _bring_scalars(module, books)
    assert module.scale.device.type == "cpu"
    assert module.table.is_meta
    assert books.entries == []


def test_dtype_by_the_name_that_the_library_knows() -> None:
    class Old:
        torch_dtype = None

    class New:
        dtype = None

    assert (dtype_option(Old()), dtype_option(New())) == ("torch_dtype", "dtype")
