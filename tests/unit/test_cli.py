"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from vramplan.cli.pace import DataSet, pace_line, run_line
from vramplan.timing import Pace, StepTime, WholeRun

SCHEMA = {
    "schema_version": int,
    "job": dict,
    "model": dict,
    "prediction": dict,
    "verdicts": list,
    "advice": list,
}
PREDICTION = {
    *("witness", "ready_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "min_limit_bytes"),
    *("context_bytes", "device_peak_bytes", "paged_bytes", "load_peak_bytes", "host_ram_bytes"),
    *("disk_bytes", "peak_phase", "breakdown", "step_time_s", "tokens_per_s", "calibration"),
    *("step_time_range_s", "time_source", "whole_run"),
}


def vramplan(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vramplan.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "start"),
    [
        (("gpt-j-6b", "--gpu", "rtx-3060-12gb"), 0, "Yes: QLoRA of gpt-j-6b fits"),
        (
            ("gpt-j-6b", "--gpu", "rtx 3060 12gb", "--batch-size", "4"),
            0,
            "Tight: QLoRA of gpt-j-6b",
        ),
        (
            ("gpt-j-6b", "--gpu", "rtx 3060 12gb", "--method", "full"),
            1,
            "No: full fine-tuning of gpt-j-6b",
        ),
        (("llama-7b", "--gpu", "t4", "--gpu", "3090"), 0, "QLoRA of llama-7b"),
        (("pythia-70m", "--memory", "100MiB"), 1, "No: QLoRA of pythia-70m"),
    ],
)
def test_fit_answers_first(arguments: tuple[str, ...], code: int, start: str) -> None:
    done = vramplan("fit", *arguments)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith(start)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "gpt-j-6b"), "--gpu"),
        (("fit", "gpt-j-6b", "--gpu", "rtx-3061-12gb"), "did you mean"),
        (("fit", "gptj-6b", "--gpu", "3060"), "did you mean"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--optim", "adamw8bit"), "adamw_8bit"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--batch-size", "0"), "--batch-size"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--batch-size", "x"), "--batch-size"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--seq-len", "99999999999999999999"), "--seq-len"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--seq-len", "4096"), "positions"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--attn-implementation", "sdpa"), "eager"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--target-modules", "wq"), "q_proj"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--num-gpus", "8"), "one GPU"),
        (("fit", "gpt-j-6b", "--memory", "lots"), "12GiB"),
        (("fit", "/nonexistent/config.json", "--gpu", "3060"), "does not exist"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--nonsense"), "--nonsense"),
        (("estimate", "gpt-j-6b", "--method", "half"), "qlora"),
        (
            ("fit", "gpt-j-6b", "--gpu", "3060", "--num-samples", "0"),
            "--num-samples must be above 0",
        ),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--num-samples", "-5"), "--num-samples"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--num-samples", str(10**13)), "at most"),
        (("fit", "gpt-j-6b", "--gpu", "3060", "--epochs", "2"), "needs --num-samples"),
        (
            ("fit", "gpt-j-6b", "--gpu", "3060", "--num-samples", "9", "--epochs", "nan"),
            "--epochs must be above 0",
        ),
        (
            ("fit", "gpt-j-6b", "--gpu", "3060", "--num-samples", "9", "--price-per-hour", "inf"),
            "--price-per-hour must be above 0",
        ),
        (("estimate", "gpt-j-6b", "--num-samples", "9"), "--num-samples needs --gpu"),
    ],
)
def test_mistakes_get_one_clear_error(arguments: tuple[str, ...], words: str) -> None:
    done = vramplan(*arguments, COLUMNS="200", NO_COLOR="1")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stdout == ""


def test_sequence_beyond_the_positions_warns() -> None:
    done = vramplan("fit", "llama-7b", "--gpu", "a100-80gb", "--seq-len", "4096")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: --seq-len 4096 is beyond the 2048 positions")


@pytest.mark.parametrize("command", [("fit", "--gpu", "3060"), ("estimate",)])
def test_json_contract(command: tuple[str, ...]) -> None:
    done = vramplan(command[0], "gpt-j-6b", *command[1:], "--json")
    document = json.loads(done.stdout)
    assert {key: type(document[key]) for key in SCHEMA} == SCHEMA  # additions are allowed
    prediction = document["prediction"]
    assert set(prediction) >= PREDICTION
    assert sum(prediction["breakdown"].values()) == prediction["peak_allocated_bytes"]
    if command[0] == "fit":
        assert prediction["tokens_per_s"] == pytest.approx(1024 / prediction["step_time_s"])
        low, high = prediction["step_time_range_s"]
        assert low < prediction["step_time_s"] < high
        assert prediction["time_source"] == "extrapolated"
    else:  # no card, no time
        assert prediction["step_time_s"] is prediction["time_source"] is None
    assert prediction["whole_run"] is None
    assert document["job"]["optim"] == "paged_adamw_8bit"
    if command[0] == "fit":
        (verdict,) = document["verdicts"]
        assert set(verdict) == {"gpu", "usable_bytes", "verdict", "headroom_bytes"}
        assert {"change", "device_peak_bytes", "verdict"} <= set(document["advice"][0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "a100"), "'a100' was taken as a100-80gb; there is also a100-40gb"),
        (("--gpu", "RTX 3080"), "there is also rtx-3080-12gb"),
        (("--gpu", "a100-40gb"), ""),
        (("--gpu", "4090"), ""),
        (("--gpu", "4090", "--method", "full", "--lora-r", "8"), "full has no use for --lora-r"),
        (("--gpu", "4090", "--method", "lora", "--quant-type", "fp4"), "no use for --quant-type"),
    ],
)
def test_says_what_it_took_and_left(arguments: tuple[str, ...], words: str) -> None:
    run = vramplan("fit", "gpt-j-6b", *arguments)
    assert run.returncode in (0, 1)
    assert words in run.stderr if words else run.stderr == ""


TIGHT = ("gpt-j-6b", "--gpu", "rtx-3060-12gb", "--batch-size", "4")
EXPANDABLE = ("--alloc-conf", "expandable_segments:True")


def test_the_allocators_settings_are_advice_and_an_answer() -> None:
    tight = json.loads(vramplan("fit", *TIGHT, "--json").stdout)
    (advised,) = [
        advice
        for advice in tight["advice"]
        if advice["kind"] == "fix" and advice["change"] == " ".join(EXPANDABLE)
    ]
    fits = json.loads(vramplan("fit", *TIGHT, *EXPANDABLE, "--json").stdout)
    assert (tight["verdicts"][0]["verdict"], fits["verdicts"][0]["verdict"]) == ("tight", "fits")
    assert fits["prediction"]["device_peak_bytes"] == advised["device_peak_bytes"]
    assert fits["job"]["alloc_conf"] == EXPANDABLE[1]
    assert not [advice for advice in fits["advice"] if "expandable" in advice["change"]]


def test_the_allocators_settings_are_no_advice_where_they_save_nothing() -> None:
    document = json.loads(vramplan("fit", "llama-3.1-8b", "--gpu", "4090", "--json").stdout)
    assert not [advice for advice in document["advice"] if "alloc" in advice["change"]]


def test_wrong_allocator_settings_name_the_nearest() -> None:
    run = vramplan("fit", *TIGHT, "--alloc-conf", "expandable_segment:True")
    assert run.returncode == 2
    assert run.stderr.startswith(
        "error: unknown setting in --alloc-conf 'expandable_segment'; did you mean "
        "expandable_segments"
    )


def test_options_to_copy_stay_whole() -> None:
    run = vramplan("fit", "llama-3.1-8b", "--gpu", "t4-16gb", "--batch-size", "8", COLUMNS="80")
    rows = [line.split("  ")[0] for line in run.stdout.splitlines() if line.startswith("--")]
    assert "--gradient-accumulation-steps 2" in rows
    assert all(row.count("--") == 1 for row in rows)


def test_cards_side_by_side() -> None:
    run = vramplan("fit", "gpt-j-6b", "--gpu", "t4", "--gpu", "rtx-3090-24gb", "--seq-len", "512")
    assert "Batch 1 x 512 tokens, paged_adamw_8bit" in run.stdout
    assert "No bf16, planned in fp16: t4-16gb." in run.stdout


def test_pace_and_whole_run_in_two_lines() -> None:
    run = vramplan(
        *("fit", "gpt-j-6b", "--gpu", "h100-sxm-80gb", "--batch-size", "4"),
        *("--num-samples", "50000", "--epochs", "2", "--price-per-hour", "2.5"),
    )
    _answer, _job, pace, whole, *_ = run.stdout.splitlines()
    number = r"[\d,.]+"
    took = rf"{number} m?s"
    assert re.fullmatch(rf"About {took} a step, {number} tokens/s \({took} to {took}\)", pace)
    assert re.fullmatch(
        rf"50,000 sequences, 2 epochs: 25,000 steps, {number} h, "
        rf"at most {number} kWh for the card, cost {number}",
        whole,
    )
    run = vramplan("estimate", "gpt-j-6b", "--gpu", "a100-80gb")
    assert re.search(rf"About .* to {took}, extrapolated from h100-sxm-80gb\)\n", run.stdout)


def test_words_of_pace_and_run() -> None:
    time = StepTime(micro_steps_s=1.5, update_s=0.25, host_s=1.0, card_s=1.75)
    found = Pace(time, 2340.6, 0.8, 2.4, "calibrated")
    assert pace_line(found) == "About 1.75 s a step, 2,341 tokens/s (800 ms to 2.40 s)"
    assert pace_line(found._replace(source="extrapolated")) == (
        "About 1.75 s a step, 2,341 tokens/s (800 ms to 2.40 s, extrapolated from h100-sxm-80gb)"
    )
    data = DataSet(52_000, 3.0, 2.49)
    assert run_line(WholeRun(39_000, 18.958, 13.27, 47.206), data) == (
        "52,000 sequences, 3 epochs: 39,000 steps, 19.0 h, at most 13.3 kWh for the card, "
        "cost 47.21"
    )
    assert run_line(WholeRun(39_000, 189.58, None, None), data) == (
        "52,000 sequences, 3 epochs: 39,000 steps, 7.9 days"
    )
    assert run_line(WholeRun(39, 0.21, None, None), data).endswith("39 steps, 12.6 min")


def test_tokens_per_second_of_every_card() -> None:
    run = vramplan("fit", "gpt-j-6b", "--gpu", "h100-sxm-80gb", "--gpu", "p40", "--gpu", "t4")
    last = {line.split()[0]: line.split()[-1] for line in run.stdout.splitlines() if "GiB" in line}
    assert last["t4-16gb"].startswith("~") and last["p40-24gb"] == "?"
    assert last["h100-sxm-80gb"].replace(",", "").isdigit()
    assert "~: extrapolated from h100-sxm-80gb." in run.stdout


def test_cards_without_known_rates_say_so() -> None:
    run = vramplan("fit", "gpt-j-6b", "--gpu", "p40", "--num-samples", "9")
    assert "Time, energy and cost of the run are not known for this card." in run.stdout
    assert " a step" not in run.stdout


def test_explain_sums_up() -> None:
    done = vramplan("estimate", "gpt-j-6b", "--explain")
    assert "Where each term comes from" in done.stdout
    assert "= peak allocated" in done.stdout
    assert "source:" in done.stdout


@pytest.mark.parametrize("width", ["40", "60", "80", "120"])
def test_narrow_terminals(width: str) -> None:
    done = vramplan("fit", "gpt-j-6b", "--gpu", "3060", COLUMNS=width)
    assert max(map(len, done.stdout.splitlines())) <= int(width)


def test_no_colour_when_piped_or_asked() -> None:
    assert "\x1b[" not in vramplan("fit", "gpt-j-6b", "--gpu", "3060").stdout


def test_cards_without_bf16_say_so() -> None:
    assert "no bf16: planned in fp16" in vramplan("fit", "gpt-j-6b", "--gpu", "t4").stdout


@pytest.mark.parametrize("command", ["gpus", "models"])
def test_catalogues(command: str) -> None:
    document = json.loads(vramplan(command, "--json").stdout)
    assert len(document[command]) >= 30
    assert "a100" in vramplan("gpus", "a100").stdout


def test_version() -> None:
    assert vramplan("--version").stdout.startswith("vramplan 0.")


def test_reader_that_goes_away() -> None:
    done = subprocess.run(
        f"{sys.executable} -m vramplan.cli models | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


EVALUATION = (
    "fit", "llama-3.2-1b", "--memory", "12GiB", "--seq-len", "512", "--eval", "--eval-logits",
    "--eval-samples", "64",
)  # fmt: skip


def test_an_evaluation_that_keeps_its_logits_is_what_fails() -> None:
    done = vramplan(*EVALUATION)
    assert done.returncode == 1
    assert "Evaluation in batches of 8, logits of 64 samples kept on the card\n" in done.stdout
    assert "Where the bytes go at the peak, in the evaluation\n" in done.stdout
    assert "--eval-accumulation-steps 1" in done.stdout
    document = json.loads(vramplan(*EVALUATION, "--json").stdout)
    prediction = document["prediction"]
    assert prediction["peak_phase"] == "evaluate"
    phases = {name: peaks["peak_allocated_bytes"] for name, peaks in prediction["phases"].items()}
    assert phases["evaluate"] == prediction["peak_allocated_bytes"]
    assert phases["evaluate"] > 5 * phases["backward"]
    assert document["job"]["eval_samples"] == 64
    kept = vramplan(*EVALUATION, "--eval-accumulation-steps", "1")
    assert kept.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--eval", "--eval-logits"), "say how many with --eval-samples"),
        (("--eval-batch-size", "0", "--eval"), "--eval-batch-size must be a whole number"),
        (("--eval-samples", "9"), "add --eval"),
    ],
)
def test_evaluations_that_are_not_said_in_full(arguments: tuple[str, ...], words: str) -> None:
    done = vramplan("fit", "pythia-70m", "--memory", "8GiB", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_trace_does_not_evaluate() -> None:
    done = vramplan("trace", "pythia-70m", "--eval")
    assert done.returncode == 2
    assert done.stderr == "error: a trace runs training steps alone; leave out --eval\n"
