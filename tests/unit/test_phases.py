"""Evaluation, the first step and saving, against recorded runs and by their properties."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.accuracy import figures, phase_figures, predicted
from vramplan.advice import Adviser
from vramplan.catalogue import find_model, model_from_config
from vramplan.errors import UsageError
from vramplan.evaluate import MAX_BATCHES, batches_walked, host_bytes
from vramplan.families import NAMES
from vramplan.gpus import find_gpu
from vramplan.job import EVALUATION, Job
from vramplan.measure.spec import RunSpec
from vramplan.phases import save_bytes
from vramplan.prediction import Prediction, judge, predict, usable_bytes
from vramplan.record import read_record
from vramplan.replay import LIMIT_RESOLUTION
from vramplan.timeline import Phase
from vramplan.units import GIB

RUNS = Path(__file__).parents[2] / "profiles/calibrations/h100-sxm-80gb/runs"
EVALUATED = sorted(path.stem for path in RUNS.glob("*evaluate*.json"))
SAVED = sorted(path.stem for path in RUNS.glob("*save*.json"))


@cache
def tiny(**fields: Any) -> Prediction:
    """A small job."""
    return predict(find_model("pythia-70m"), Job(**{"seq_len": 128, **fields}))


# -- against recorded runs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_as_recorded(name: str) -> None:
    record = read_record(RUNS / f"{name}.json")
    found = {f.name: f.error for f in figures(record, predicted(record))}
    assert found["evaluate"] == pytest.approx(0, abs=0.0001)
    if not record.num_alloc_retries:  # else the card was too small to be unhurried
        assert found["reserved by evaluating"] == pytest.approx(0, abs=0.002)


# model, job, then measured while evaluating behind the third step: allocated, reserved. On an H100
# with torch 2.11.0+cu130, transformers 5.17.0 and random weights, predicted before it was measured.
EVALUATIONS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    (
        "pythia-410m",
        {"method": "full", "batch_size": 2, "eval_samples": 10},
        (4561897472, 7144996864),
    ),
    (
        "pythia-410m",
        {"method": "full", "batch_size": 2, "eval_samples": 30, "eval_accumulation_steps": 3},
        (4976109568, 7350517760),
    ),
    ("llama-3.2-1b", {"eval_samples": 20}, (12182563840, 21688745984)),
    (
        "llama-3.2-1b",
        {"eval_samples": 20, "eval_accumulation_steps": 1},
        (4342853632, 5928648704),
    ),
]


@pytest.mark.parametrize(("name", "fields", "measured"), EVALUATIONS)
def test_kept_logits_as_measured(
    name: str, fields: dict[str, Any], measured: tuple[int, int]
) -> None:
    job = Job(seq_len=512, evaluate=True, eval_batch_size=4, eval_logits=True, **fields)
    card = find_gpu("h100-sxm-80gb")
    prediction = predict(find_model(name), job, card, random_weights=True)
    assert prediction.evaluate_peak_allocated_bytes == pytest.approx(measured[0], rel=1e-5)
    assert prediction.peak_reserved_bytes == measured[1]


def test_an_evaluation_that_outgrows_a_card_can_run_with_retries() -> None:
    """300 samples kept, two a batch: measured on an 80 GB card it ran, with ten retries."""
    job = Job(
        method="lora", batch_size=2, seq_len=256, gradient_checkpointing=False, evaluate=True,
        eval_batch_size=2, eval_samples=300, eval_logits=True,
    )  # fmt: skip
    card = find_gpu("h100-sxm-80gb")
    prediction = predict(find_model("tinyllama-1.1b"), job, card, random_weights=True)
    assert prediction.evaluate_peak_allocated_bytes == pytest.approx(22083337216, rel=1e-5)
    usable = usable_bytes(card)
    assert usable is not None
    assert judge(prediction, card.slug, usable).verdict == "tight"


def test_logits_end_in_host_memory_as_recorded() -> None:
    record = read_record(RUNS / "llama-3.2-1b-qlora-1x1024-evaluate-save.json")
    prediction = predicted(record, evaluated=True)
    assert record.host_rss_peak_bytes == pytest.approx(prediction.host_ram_bytes, rel=0.02)
    split = prediction.job.but(eval_accumulation_steps=1)
    assert host_bytes(prediction.model, split) == 2 * host_bytes(prediction.model, prediction.job)


@pytest.mark.parametrize("name", SAVED)
def test_saving_allocates_the_cloned_codes_alone(name: str) -> None:
    record = read_record(RUNS / f"{name}.json")
    prediction = predicted(record)
    begin = record.steps[-1].begin_allocated_bytes
    measured = record.phases["save"].peak_allocated_bytes
    assert measured is not None
    assert begin is not None
    more = measured - begin - save_bytes(prediction.model, prediction.job)
    assert 0 <= more <= 512  # one run logged a number between the two readings


@pytest.mark.parametrize(
    "name", ["gpt-j-6b-qlora-1x512-evaluate-save", "pythia-410m-full-2x512-evaluate-save"]
)
def test_first_step_as_recorded(name: str) -> None:
    record = read_record(RUNS / f"{name}.json")
    found = {f.name: f.error for f in phase_figures(record, predicted(record))}
    for figure in ("first step", "forward", "loss", "backward"):
        assert found[figure] == pytest.approx(0, abs=0.001), figure


# -- properties ------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 12),
    samples=st.integers(1, 60),
    logits=st.booleans(),
    every=st.one_of(st.none(), st.integers(1, 5)),
)
@settings(max_examples=25, deadline=None)
def test_evaluation_never_lowers_a_peak(
    batch: int, samples: int, logits: bool, every: int | None
) -> None:
    plain = tiny()
    job = {
        "evaluate": True,
        "eval_batch_size": batch,
        "eval_samples": samples,
        "eval_logits": logits,
        "eval_accumulation_steps": every,
    }
    found = tiny(**job)
    assert found.peak_allocated_bytes >= plain.peak_allocated_bytes
    assert found.peak_reserved_bytes >= plain.peak_reserved_bytes
    assert found.min_limit_bytes >= plain.min_limit_bytes - LIMIT_RESOLUTION  # how it is searched
    assert sum(found.breakdown().values()) == found.peak_allocated_bytes
    longer = tiny(**{**job, "eval_samples": samples + batch})
    assert longer.peak_allocated_bytes >= found.peak_allocated_bytes
    if logits:
        least = tiny(**{**job, "eval_accumulation_steps": 1})
        assert least.peak_allocated_bytes <= found.peak_allocated_bytes


@pytest.mark.parametrize("smaller, larger", [(1, 2), (2, 8), (8, 64)])
def test_larger_evaluation_batches_need_more(smaller: int, larger: int) -> None:
    few = tiny(evaluate=True, eval_batch_size=smaller).evaluate_peak_allocated_bytes
    many = tiny(evaluate=True, eval_batch_size=larger).evaluate_peak_allocated_bytes
    assert few is not None
    assert many is not None
    assert many > few


def test_kept_logits_are_there_twice_while_they_are_joined() -> None:
    """nested_concat: the old ones, the new ones and the joined ones, in fp32."""
    job = {"evaluate": True, "eval_batch_size": 4, "eval_logits": True}
    sizes = [
        tiny(**job, eval_samples=n).evaluate_peak_allocated_bytes or 0 for n in (40, 44, 400, 404)
    ]
    batch = 4 * 128 * find_model("pythia-70m").dims.vocab_size * 4
    for less, more in ((0, 1), (2, 3)):
        grown = sizes[more] - sizes[less]
        assert grown == pytest.approx(2 * batch, rel=0.01)  # and the labels
    # batches left out of the walk are counted all the same
    assert sizes[2] - sizes[0] == pytest.approx(2 * 90 * batch, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, [8, 8]),
        ({"eval_samples": 3}, [3]),
        ({"eval_samples": 1000}, [8, 8]),
        ({"eval_samples": 1001}, [8, 8, 1]),
        ({"eval_samples": 20, "eval_logits": True}, [8, 8, 4]),
        ({"eval_samples": 1001, "eval_logits": True, "eval_accumulation_steps": 2}, [8] * 4),
        (
            {"eval_samples": 803, "eval_logits": True},
            [*[8] * (MAX_BATCHES // 2), -8 * (100 - MAX_BATCHES), *[8] * (MAX_BATCHES // 2), 3],
        ),
    ],
)
def test_batches_walked(fields: dict[str, Any], sizes: list[int]) -> None:
    assert batches_walked(Job(evaluate=True, **fields)) == sizes


@pytest.mark.parametrize("family", NAMES)
def test_every_family_evaluates(family: str) -> None:
    """Nothing is left behind: training goes on as if there had been no evaluation."""
    values = {
        "model_type": family, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512,
        "num_hidden_layers": 5, "n_layer": 5, "n_embd": 128, "n_head": 4, "head_dim": 32,
        "intermediate_size": 256, "rotary_dim": 8, "ffn_dim": 256, "word_embed_proj_dim": 128,
        "num_key_value_heads": 4, "sliding_window": None,
    }  # fmt: skip
    model = model_from_config(values, family)
    job = Job(method="lora", seq_len=64, evaluate=True, eval_batch_size=2, eval_samples=3)
    walked = predict(model, job).estimate
    plain = predict(model, job.but(evaluate=False, eval_samples=None)).estimate
    evaluated = [
        event.nbytes * event.copies * section.repeats
        for section in walked.timeline.sections
        for event in section.events
        if event.phase is Phase.EVALUATE
    ]
    assert evaluated
    assert sum(evaluated) == 0
    assert walked.flops == plain.flops
    assert walked.evaluate_peak_bytes is not None
    assert walked.evaluate_peak_bytes > walked.static_bytes


# -- what a job may say, and what is said of it ----------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"eval_logits": True},
        {"eval_samples": 8},
        {"eval_accumulation_steps": 2},
        {"evaluate": True, "eval_samples": 0},
        {"evaluate": True, "eval_batch_size": 0},
        {"evaluate": True, "eval_accumulation_steps": -1},
        {"evaluate": True, "eval_samples": 10**12},
        {"evaluate": True, "eval_batch_size": True},
    ],
)
def test_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--eval"):
        Job(**fields)


def test_a_job_takes_the_evaluation_of_a_run() -> None:
    record = read_record(RUNS / "llama-3.2-1b-qlora-1x1024-evaluate-save.json")
    job = Job().evaluated(record.run)
    assert [getattr(job, name) for name in EVALUATION] == [True, 8, True, None, None]
    plain = read_record(RUNS / "llama-3.2-1b-qlora-2x1024.json")
    assert Job().evaluated(plain.run) == Job()


def test_peak_phase_names_what_decides() -> None:
    assert tiny().peak_phase in {"loss", "backward", "step"}
    assert tiny(evaluate=True, eval_batch_size=64).peak_phase == "evaluate"
    # the whole of a fused experts' tensor is stacked beside the checkpoint's single ones
    small = Job(seq_len=8, lora_r=1, target_modules=("q_proj",), prepare_kbit=False)
    assert predict(find_model("mixtral-8x7b"), small).peak_phase == "load"


def test_loading_decides_the_verdict() -> None:
    small = Job(seq_len=8, lora_r=1, target_modules=("q_proj",), prepare_kbit=False)
    prediction = predict(find_model("mixtral-8x7b"), small)
    assert prediction.min_limit_bytes >= prediction.load_bytes
    room = prediction.load_bytes + prediction.process_bytes - GIB // 4
    assert judge(prediction, "a card", room).verdict == "no"


def test_phases_in_the_order_of_a_run() -> None:
    phases = tiny(evaluate=True).phases()
    assert list(phases) == [
        "load", "prepare", "forward", "loss", "backward", "step", "evaluate", "save",
    ]  # fmt: skip
    assert all(size > 0 for size in phases.values())
    top = max(size for name, size in phases.items() if name not in ("load", "prepare"))
    assert top == tiny(evaluate=True).peak_allocated_bytes


def test_advice_makes_an_evaluation_smaller() -> None:
    model = find_model("llama-3.2-1b")
    job = Job(seq_len=512, evaluate=True, eval_logits=True, eval_samples=64, eval_batch_size=2)
    prediction = predict(model, job)
    fixes = Adviser(model, job, prediction, "a card", 12 * GIB, None).fixes()
    assert fixes[0].change == "--eval-accumulation-steps 1"


def test_a_record_keeps_the_evaluation_with_how_it_was_run() -> None:
    own = {"evaluate": True, "eval_logits": True, "eval_samples": 20, "eval_accumulation_steps": 3}
    spec = RunSpec("a", "pythia-70m", {}, Job(), **own)
    assert not set(EVALUATION) & set(spec.job_document())
    conditions = spec.conditions()
    assert {name: conditions[name] for name in own} == own
    assert Job().evaluated(spec) == Job(**own)
    with pytest.raises(UsageError, match="--eval-samples"):
        RunSpec("a", "pythia-70m", {}, Job(), evaluate=True, eval_samples=0)
    plain = RunSpec("a", "pythia-70m", {}, Job(), eval_samples=7)  # without --eval it says nothing
    assert plain.conditions()["eval_samples"] is None
