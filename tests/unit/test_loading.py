"""The load of a real checkpoint against recorded ones.

Each row was measured on an H100 (torch 2.11.0+cu130, transformers 5.17.0, bitsandbytes 0.50.2,
driver 580.159): a checkpoint of random bf16 weights saved with save_pretrained, loaded with
from_pretrained and ``device_map={"": 0}``, prepared, then trained for four steps.
"""

from __future__ import annotations

from typing import Any

import pytest

from vramplan.catalogue import find_model
from vramplan.gpus import find_gpu
from vramplan.job import Job
from vramplan.loading import (
    load_peak_bytes,
    load_requests,
    natural_key,
    warm_up_bytes,
    weights,
)
from vramplan.prediction import Prediction, predict
from vramplan.units import MIB

# model, job, then measured: load's allocated and reserved peak, ready, steady allocated, reserved
LOADS: list[tuple[str, dict[str, Any], tuple[int, int, int, int, int]]] = [
    ("llama-3.2-1b", {}, (1057916928, 1069547520, 1598253568, 3924413952, 4330618880)),
    (
        "llama-3.2-1b",
        {"quant_type": "int8", "seq_len": 512},
        (1557700608, 1585446912, 2071668224, 3978571776, 4466933760),
    ),
    (
        "llama-3.2-1b",
        {"method": "lora", "seq_len": 512},
        (2472678400, 2474639360, 2517767680, 3501074944, 3963617280),
    ),
    (
        "pythia-1.4b",
        {"seq_len": 512},
        (1073415168, 1109393408, 1503578624, 2205003264, 2441084928),
    ),
    ("gpt2-large", {"seq_len": 512}, (526625280, 660602880, 706928128, 1337109504, 1482686464)),
    ("mistral-7b", {}, (4234058752, 4269801472, 4823009792, 6176542720, 6587154432)),
]
IDS = ["llama-nf4", "llama-int8", "llama-bf16", "pythia-nf4", "gpt2-nf4", "mistral-nf4"]


def prediction_of(name: str, fields: dict[str, Any]) -> Prediction:
    """The job on the card that was measured."""
    return predict(find_model(name), Job(**fields), find_gpu("h100-sxm-80gb"))


@pytest.mark.parametrize(("name", "fields", "measured"), LOADS, ids=IDS)
def test_load_as_recorded(name: str, fields: dict[str, Any], measured: tuple[int, ...]) -> None:
    allocated, reserved = prediction_of(name, fields).replayed_load()
    assert reserved == measured[1]
    # which of two equal holes a block goes to decides where it stays unsplit
    assert allocated == pytest.approx(measured[0], rel=0.002)


@pytest.mark.parametrize(("name", "fields", "measured"), LOADS, ids=IDS)
def test_training_after_a_load_as_recorded(
    name: str, fields: dict[str, Any], measured: tuple[int, ...]
) -> None:
    prediction = prediction_of(name, fields)
    assert abs(prediction.ready_bytes - measured[2]) < 2048
    assert prediction.peak_allocated_bytes == pytest.approx(measured[3], rel=0.002)
    # 10 MiB less for gpt2-large: one block more finds a hole than did on the card
    within = 0.008 if name == "gpt2-large" else 0.002
    assert prediction.peak_reserved_bytes == pytest.approx(measured[4], rel=within)


def test_tensors_come_sorted_by_their_name_in_the_checkpoint() -> None:
    names = [group[0].name for group in weights(find_model("pythia-70m"), Job())]
    assert names[0] == "embed_out.weight"  # whatever the module is called
    assert names[1] == "gpt_neox.embed_in.weight"
    assert names[-1] == "attention.dense.bias"  # of the last layer
    llama = [group[0].name for group in weights(find_model("llama-3.1-8b"), Job())]
    assert llama[:2] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert llama[-1] == "model.norm.weight"


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (("h.10.a", "h.9.a"), ("h.9.a", "h.10.a")),
        (("a.b", "a.0"), ("a.0", "a.b")),
        (("shard_11", "shard_2"), ("shard_2", "shard_11")),
        (("x.weight", "x.bias"), ("x.bias", "x.weight")),
    ],
)
def test_natural_order(names: tuple[str, ...], ordered: tuple[str, ...]) -> None:
    assert tuple(sorted(names, key=natural_key)) == ordered


@pytest.mark.parametrize(
    "name", ["gpt2", "pythia-160m", "llama-3.2-1b", "mixtral-8x7b", "gpt-j-6b"]
)
@pytest.mark.parametrize("fields", [{}, {"quant_type": "int8"}, {"double_quant": False}])
def test_every_block_that_passes_goes_and_the_peak_is_theirs(
    name: str, fields: dict[str, Any]
) -> None:
    model, job = find_model(name), Job(**fields)
    live: dict[int, int] = {}
    most = 0
    for block, nbytes in load_requests(model, job):
        if nbytes > 0:
            assert block not in live
            live[block] = nbytes
        else:
            assert live.pop(block) == -nbytes
        most = max(most, sum(live.values())) if len(live) < 400 else most
    held = sum(sum(w.kept) for group in weights(model, job) for w in group)
    buffers = sum(live.values()) - held
    assert 0 <= buffers < 64 * MIB
    assert most <= load_peak_bytes(model, job)
    assert load_peak_bytes(model, job) >= sum(live.values())


def test_the_warm_up_counts_half_a_byte_a_quantised_weight() -> None:
    """get_total_byte_count with Bnb4BitHfQuantizer.param_element_size."""
    model = find_model("llama-3.2-1b")
    dims = model.dims
    table = dims.vocab_size * dims.hidden_size
    norms = dims.hidden_size * (2 * dims.num_layers + 1)
    linear = model.num_parameters - table - norms
    found = warm_up_bytes(weights(model, Job()))
    assert found == pytest.approx(linear / 2 + 2 * (table + norms), abs=512)


def test_a_model_that_is_not_quantised_comes_without_anything_passing() -> None:
    model = find_model("pythia-160m")
    job = Job(method="full")
    assert all(not w.passing for group in weights(model, job) for w in group)
    assert load_peak_bytes(model, job) == sum(n for _, n in load_requests(model, job))
