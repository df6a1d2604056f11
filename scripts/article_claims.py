"""Writes reports/article-claims.*: the claims of the article on QLoRA this project began from.

Each claim is predicted, held against the recorded runs where there are any, and judged by rule: it
holds if every case that it names is predicted to run and no recorded run of them ran out of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vramplan import __version__
from vramplan.accuracy import figures, predicted
from vramplan.advice import least_number_of_cards
from vramplan.catalogue import find_model
from vramplan.comparing import compare
from vramplan.comparison import Entry, Run
from vramplan.files import provenance, write_text
from vramplan.gpus import find_gpu
from vramplan.job import Job
from vramplan.prediction import Prediction, predict, usable_bytes
from vramplan.record import read_record
from vramplan.report.measured import SYMBOLS, gib
from vramplan.report.page import Page, Table, Toned, to_html, to_markdown
from vramplan.resources import profiles_dir
from vramplan.timeline import Kind
from vramplan.units import format_bytes

RUNS = profiles_dir() / "calibrations" / "h100-sxm-80gb" / "runs"
STATE = (Kind.WEIGHTS, Kind.GRADIENTS, Kind.OPTIMIZER)
JOBS = (
    "case", "predicted", "takes, GiB", "usable, GiB", "measured run", "peak allocated, GiB",
    "predicted, GiB", "off by",
)  # fmt: skip
HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold"
TONES = {HOLDS: "fits", PARTLY: "tight", FAILS: "no"}


class Claim(NamedTuple):
    """A claim with its evidence.

    Attributes:
        words: What the article says.
        verdict: Whether it holds.
        why: In one sentence.
        evidence: What was predicted and measured.
    """

    words: str
    verdict: str
    why: str
    evidence: Table

    def section(self, number: int) -> Table:
        """The claim as a section of the page."""
        return self.evidence._replace(
            title=f"{number}. {self.words}", text=f"{self.verdict.capitalize()}. {self.why}"
        )


def run(name: str) -> Run:
    """A recorded run beside its prediction."""
    record = read_record(RUNS / f"{name}.json")
    return Run(record, figures(record, predicted(record)))


class Case(NamedTuple):
    """A job that the article says fits, and the run that tried it."""

    entry: Entry
    tried: Run | None

    @property
    def runs(self) -> bool:
        """Whether it is predicted to run."""
        return self.entry.verdict in ("fits", "tight")

    @property
    def ran(self) -> bool | None:
        """Whether it ran; None where nobody tried."""
        return None if self.tried is None else self.tried.record.status == "done"

    def row(self) -> tuple[str, ...]:
        """The case as a row under ``JOBS``."""
        entry, job = self.entry, self.entry.job
        what = (
            f"{entry.model.name} {job.method} {job.batch_size} x {job.seq_len:,}, {entry.gpu.slug}"
        )
        told = Toned(f"{SYMBOLS[entry.verdict]} {entry.verdict}", entry.verdict)
        sizes = (gib(entry.device_peak_bytes), gib(entry.usable_bytes))
        if self.tried is None:
            return (what, told, *sizes, "not measured", "", "", "")
        done = self.tried.record.status == "done"
        ended = Toned(
            f"{SYMBOLS['fits' if done else 'no']} {'ran' if done else self.tried.ending} "
            f"({self.tried.card})",
            "fits" if done else "no",
        )
        peak = next(f for f in self.tried.figures if f.name == "peak allocated")
        off = "" if peak.error is None else f"{peak.error:+.2%}"
        return (what, told, *sizes, ended, gib(peak.measured), gib(peak.predicted), off)


def case(model: str, gpu: str, job: Job, tried: str | None = None) -> Case:
    """One case and the run that tried it."""
    (entry,) = compare([model], [gpu], [job]).entries
    return Case(entry, run(tried) if tried else None)


def fits(words: str, claimed: Iterable[Case], beyond: Iterable[Case] = ()) -> Claim:
    """A claim that jobs fit; what lies beyond it is shown and does not decide."""
    cases, more = list(claimed), list(beyond)
    held = all(one.runs and one.ran is not False for one in cases)
    agreed = [one for one in (*cases, *more) if one.ran is not None]
    right = sum(one.runs is one.ran for one in agreed)
    why = f"Prediction and measurement agree in {right} of {len(agreed)} recorded cases."
    if more:
        why += " The rows after the claimed ones show where it ends."
    rows = tuple(one.row() for one in (*cases, *more))
    return Claim(words, HOLDS if held else FAILS, why, Table("", JOBS, rows))


def state_bytes(prediction: Prediction) -> int:
    """Weights, gradients and optimizer states."""
    return sum(prediction.breakdown().get(kind, 0) for kind in STATE) + prediction.paged_bytes


def full_65b() -> Claim:
    """More than 780 GB, ten A100."""
    model, card = find_model("llama-65b"), find_gpu("a100-80gb")
    usable = usable_bytes(card)
    assert usable is not None
    rows, over = [], []
    for what, job in (
        ("fp32 weights and Adam", Job(method="full", dtype="fp32")),
        ("16-bit weights, fp32 Adam", Job(method="full", optim="paged_adamw_32bit")),
        ("pure bf16, as transformers loads today", Job(method="full")),
    ):
        prediction = predict(model, job, card)
        size = state_bytes(prediction)
        over.append(size > 780e9)
        cards = least_number_of_cards(prediction, usable)
        rows.append((what, f"{size / 1e9:,.0f}", f"{size / model.num_parameters:.1f}", str(cards)))
    verdict = HOLDS if all(over) else PARTLY if any(over) else FAILS
    heads = ("recipe", "weights, gradients, Adam, GB", "bytes a parameter", "A100 80GB, at least")
    return Claim(
        "Full fine-tuning of a 65B model needs more than 780 GB, ten A100",
        verdict,
        f"{sum(over)} of {len(over)} recipes need more than 780 GB; nobody measured one here.",
        Table("", heads, tuple(rows)),
    )


def prices() -> Claim:
    """NF4, double quantisation and paging, each priced."""
    rows, saves = [], []
    lora = Job(method="lora", optim="paged_adamw_8bit")
    for name in ("llama-7b", "llama-65b"):
        model = find_model(name)
        own = predict(model, Job())
        for what, job, pages in (
            ("NF4, against 16-bit weights", lora, ""),
            ("double quantisation, against none", Job(double_quant=False), ""),
            ("paging, against adamw_8bit", Job(optim="adamw_8bit"), format_bytes(own.paged_bytes)),
        ):
            other = predict(model, job).peak_allocated_bytes
            saved = other - own.peak_allocated_bytes
            saves.append(saved >= 0)
            bits = f"{8 * saved / model.num_parameters:.3f}"
            sizes = (gib(own.peak_allocated_bytes), gib(other), gib(saved))
            rows.append((f"{name}: {what}", *sizes, bits, pages))
    moved = run("gpt-j-6b-qlora-1x512-save-paging").record.paging
    assert moved is not None
    steps = sum(sum(w.host_to_device_bytes.values()) for w in moved.windows[:3])
    back = sum(moved.windows[-1].host_to_device_bytes.values())
    heads = (
        "switch", "peak allocated with it, GiB", "without, GiB", "saves, GiB",
        "bits a parameter", "can leave the card",
    )  # fmt: skip
    return Claim(
        "NF4, double quantisation and paging each save memory",
        HOLDS if all(saves) else PARTLY,
        "NF4 saves by far the most. Paging is a safety net: measured with GPT-J, three steps "
        f"without pressure moved {steps} bytes, and the step after a save brought back "
        f"{format_bytes(back)}, all that is paged.",
        Table("", heads, tuple(rows)),
    )


def host_and_disk() -> Claim:
    """Host RAM and disk."""
    rows = []
    for name, tried in (
        ("gpt-j-6b", "gpt-j-6b-qlora-1x512-evaluate-save"),
        ("llama-65b", "llama-65b-qlora-1x512"),
    ):
        record = read_record(RUNS / f"{tried}.json")
        told = predicted(record)
        rows.append((name, gib(told.download_bytes), gib(told.adapter_bytes),
                     gib(told.optimizer_file_bytes), gib(told.host_ram_bytes),
                     gib(record.host_rss_peak_bytes)))  # fmt: skip
    heads = (
        "model, QLoRA", "download, GiB", "saved adapter, GiB", "saved optimizer, GiB",
        "host RAM, predicted, GiB", "measured, GiB",
    )  # fmt: skip
    return Claim(
        "Host RAM and disk count too",
        HOLDS,
        "The download outweighs everything else; what training saves is small. Runs made their "
        "weights on the card, so the host RAM of loading a checkpoint is not in the measurement.",
        Table("", heads, tuple(rows)),
    )


def emulated(model: str, gpu: str, *batches: int) -> list[Case]:
    """Cases of 1,024 tokens that were run on an H100 held to the card's memory."""
    return [
        case(model, gpu, Job(batch_size=size), f"{model}-qlora-{size}x1024-as-{gpu}")
        for size in batches
    ]


def claims() -> list[Claim]:
    """Every claim, in the article's order."""
    half = Job(seq_len=512)
    return [
        full_65b(),
        fits(
            "QLoRA of LLaMA-65B fits one A100 80GB",
            [
                case("llama-65b", "a100-80gb", half),
                case("llama-65b", "h100-sxm-80gb", half, "llama-65b-qlora-1x512"),
            ],
        ),
        fits(
            "GPT-J fits an RTX 3060 12 GB with QLoRA",
            emulated("gpt-j-6b", "rtx-3060-12gb", 1),
            emulated("gpt-j-6b", "rtx-3060-12gb", 3, 4, 5),
        ),
        fits(
            "GPT-NeoX-20B fits a 24 GB RTX 3090 or 4090 with QLoRA",
            [
                *emulated("gpt-neox-20b", "rtx-3090-24gb", 1),
                case("gpt-neox-20b", "rtx-4090-24gb", Job()),
            ],
            emulated("gpt-neox-20b", "rtx-3090-24gb", 4, 5),
        ),
        fits(
            "A free T4 is enough for the smaller models",
            [*emulated("llama-7b", "t4-16gb", 1), *emulated("llama-3.1-8b", "t4-16gb", 1)],
            emulated("llama-3.1-8b", "t4-16gb", 2),
        ),
        prices(),
        host_and_disk(),
    ]


def page() -> Page:
    """The whole report."""
    found = claims()
    top = Table(
        "",
        ("claim", "verdict", "why"),
        tuple((one.words, Toned(one.verdict, TONES[one.verdict]), one.why) for one in found),
    )
    record = read_record(RUNS / "llama-65b-qlora-1x512.json")
    versions = ", ".join(f"{k} {v}" for k, v in record.versions.items() if v and k != "vramplan")
    return Page(
        "The claims of the QLoRA article, predicted and measured",
        f"Measured with stock transformers.Trainer on {record.gpu.name}; smaller cards are "
        "emulated by holding PyTorch's allocator to what they have.",
        (top, *(one.section(number) for number, one in enumerate(found, start=1))),
        (
            "Default recipe unless said otherwise: gradient checkpointing, adapters of rank 16 on "
            "all linear layers, NF4 with double quantisation, paged_adamw_8bit.",
            "An emulated card is limited in memory only: kernels, and so temporaries, are those of "
            "the card that ran it. Predictions are for the card itself.",
            "A number of cards is a lower bound: all state split evenly, no buffers.",
        ),
        (
            *((k, str(v)) for k, v in provenance().items() if k != "command" and v is not None),
            ("command", "scripts/reports"),
            ("vramplan", __version__),
            ("measured with", versions),
        ),
    )


def main(folder: Path) -> None:
    """Write both forms."""
    found = page()
    write_text(folder / "article-claims.html", to_html(found))
    write_text(folder / "article-claims.md", to_markdown(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
