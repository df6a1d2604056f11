"""Parts of a run that need torch but no run: arguments, out of memory, optimizer state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vramplan.job import Job
from vramplan.measure.paging import ManagedMemoryError
from vramplan.measure.run import arguments, is_out_of_memory, optimizer_facts, spread
from vramplan.measure.spec import RunSpec


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ManagedMemoryError("refused 8.00 GiB of managed memory"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            True,
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("values", "minimum", "median", "maximum"),
    [([3.0], 3.0, 3.0, 3.0), ([5.0, 1.0], 1.0, 3.0, 5.0), ([9.0, 2.0, 4.0], 2.0, 4.0, 9.0)],
)
def test_spread(values: list[float], minimum: float, median: float, maximum: float) -> None:
    assert spread(values) == {
        "minimum": minimum, "median": median, "maximum": maximum, "count": len(values),
    }  # fmt: skip


def spec_of(**job: Any) -> RunSpec:
    return RunSpec("one", "tiny", {}, Job(**job), num_steps=5, eval_batch_size=3)


def test_a_job_in_trainers_words(tmp_path: Any) -> None:
    job = {"batch_size": 2, "gradient_accumulation_steps": 4, "optim": "adafactor"}
    args = arguments(spec_of(**job), str(tmp_path), cuda=False)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (2, 3)
    assert (args.gradient_accumulation_steps, args.max_steps) == (4, 5)
    assert (args.optim, args.bf16, args.fp16) == ("adafactor", True, False)
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert args.save_strategy == "no" and args.report_to == []


@pytest.mark.parametrize(("precision", "bf16"), [("bf16", True), ("fp16", False), ("no", False)])
def test_autocast_is_what_was_asked_for(tmp_path: Any, precision: str, bf16: bool) -> None:
    spec = spec_of(mixed_precision=precision, gradient_checkpointing=False)
    args = arguments(spec, str(tmp_path), cuda=False)
    assert (args.bf16, args.gradient_checkpointing) == (bf16, False)


class Paged:
    """A state tensor in managed memory, as bitsandbytes marks it."""

    is_paged, is_cuda = True, False

    def __init__(self, numel: int) -> None:
        self.shape = torch.Size([numel])

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return 1


def test_paged_state_is_told_from_state_too_small_to_be_paged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bitsandbytes pages from 100,000 elements on."""
    monkeypatch.setattr(torch, "is_tensor", lambda value: not isinstance(value, int))
    large, small = torch.empty(100_000), torch.empty(99_999)
    shared = torch.zeros(256)  # a quantisation map, the same for every parameter
    inner = SimpleNamespace(
        is_paged=True,
        state={
            large: {"step": 1, "state1": Paged(100_000), "state2": Paged(100_000), "q": shared},
            small: {"step": 1, "state1": torch.zeros(99_999, dtype=torch.uint8), "q": shared},
        },
    )
    facts = optimizer_facts(SimpleNamespace(optimizer=inner))
    assert (facts["paged_bytes"], facts["num_paged_tensors"]) == (200_000, 2)
    assert (facts["unpaged_bytes"], facts["num_unpaged_tensors"]) == (99_999, 1)


def test_without_a_paged_optimizer_nothing_is_too_small() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(4)
    optimizer.step()
    facts = optimizer_facts(optimizer)
    assert (facts["num_paged_tensors"], facts["num_unpaged_tensors"]) == (0, 0)
