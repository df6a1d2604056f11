"""How right the estimates are: every recorded run beside its prediction.

``python -m vramplan.accuracy`` writes the accuracy record (``reports/accuracy.md``) from the
records of a card.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vramplan.catalogue import model_from_config
from vramplan.errors import UnknownNameError
from vramplan.gpus import Gpu, find_gpu
from vramplan.job import Job
from vramplan.prediction import Prediction, judge, predict
from vramplan.record import Record, read_record
from vramplan.resources import profiles_dir
from vramplan.units import MIB

REPEAT = "-repeat"


class Figure(NamedTuple):
    """One number that is both predicted and measured, in bytes."""

    name: str
    measured: int | None
    predicted: int

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus one; None where it was not measured."""
        return None if not self.measured else self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded run and its prediction."""

    record: Record
    prediction: Prediction
    figures: tuple[Figure, ...]

    def error(self, figure: str) -> float | None:
        """Relative error of one figure; None where it was not measured."""
        return next((f.error for f in self.figures if f.name == figure), None)


def predicted(record: Record) -> Prediction:
    """The estimate of a recorded job on its card."""
    gpu: Gpu | None = None
    if record.gpu.slug:
        try:
            gpu = find_gpu(record.gpu.slug)
        except UnknownNameError:
            gpu = None
    model = model_from_config(record.config, record.model)
    return predict(model, Job.from_dict(record.job), gpu)


def figures(record: Record, prediction: Prediction) -> tuple[Figure, ...]:
    """Every number that both have, and that means the same in both.

    Reserved memory is compared on a roomy card only, and the process's whole memory only where
    nothing but training happened in it. Random weights are not loaded as a checkpoint is, so their
    load peak says nothing.
    """
    run = record.run
    roomy = run.limit_bytes is None
    found = [Figure("ready", record.ready_bytes, prediction.ready_bytes)]
    if run.weights != "random":
        found.append(Figure("load peak", record.load_peak_bytes, prediction.load_peak_bytes))
    found.append(
        Figure("peak allocated", record.peak_allocated_bytes, prediction.peak_allocated_bytes)
    )
    if roomy:
        found.append(
            Figure("peak reserved", record.peak_reserved_bytes, prediction.peak_reserved_bytes)
        )
    if roomy and not (run.evaluate or run.save or run.paging):
        found.append(Figure("device peak", record.device_peak_bytes, prediction.device_peak_bytes))
    if record.limit_search is not None:
        least = record.limit_search.smallest_running_bytes
        found.append(Figure("smallest limit", least, prediction.min_limit_bytes))
    if record.paged_bytes is not None:
        found.append(Figure("paged", record.paged_bytes, prediction.paged_bytes))
    return tuple(found)


def rows(folder: Path) -> list[Row]:
    """Every record of a calibration folder with its prediction, by name."""
    found = []
    for path in sorted((folder / "runs").glob("*.json")):
        record = read_record(path)
        prediction = predicted(record)
        found.append(Row(record, prediction, figures(record, prediction)))
    return found


# -- the tables ------------------------------------------------------------------------------------


def percent(value: float, *, sign: bool = False) -> str:
    """A share for people."""
    return f"{100 * value:{'+' if sign else ''}.2f} %"


def summary(found: Sequence[Row]) -> list[str]:
    """One table row per figure; repeats of one job count once."""
    once = distinct(found)
    lines = [
        "| figure | runs | median | off by, median | 90 % within | worst | which |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("ready", "peak allocated", "peak reserved", "device peak", "smallest limit"):
        errors = {r.record.name: e for r in once if (e := r.error(name)) is not None}
        if errors:
            lines.append(f"| {name} | " + " | ".join(spread(errors)) + " |")
    return lines


def spread(errors: dict[str, float]) -> list[str]:
    """Count, signed median, then median, 90th percentile and worst of the absolute errors."""
    sizes = sorted(abs(value) for value in errors.values())
    ninth = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    worst = max(errors, key=lambda name: abs(errors[name]))
    return [
        str(len(errors)),
        percent(statistics.median(errors.values()), sign=True),
        percent(statistics.median(sizes)),
        percent(ninth),
        percent(errors[worst], sign=True),
        worst,
    ]


def distinct(found: Iterable[Row]) -> list[Row]:
    """The rows without the repeats of a job."""
    return [r for r in found if REPEAT not in r.record.name or r.record.name.endswith(f"{REPEAT}1")]


def groups(found: Sequence[Row]) -> list[str]:
    """Peak allocated by family, method and checkpointing."""
    lines = [
        "| runs of | runs | median | off by, median | 90 % within | worst | which |",
        "|---|---|---|---|---|---|---|",
    ]
    keys: tuple[Callable[[Row], str], ...] = (
        lambda r: str(r.record.config["model_type"]),
        lambda r: str(r.record.job["method"]),
        lambda r: (
            "checkpointing" if r.record.job["gradient_checkpointing"] else "no checkpointing"
        ),
    )
    for key in keys:
        for name in sorted({key(row) for row in found}):
            errors = {
                row.record.name: error
                for row in distinct(found)
                if key(row) == name and (error := row.error("peak allocated")) is not None
            }
            if errors:
                lines.append(f"| {name} | " + " | ".join(spread(errors)) + " |")
    return lines


def emulated(found: Iterable[Row]) -> list[str]:
    """Runs on emulated cards: the verdict at their limit beside what happened."""
    lines = [
        "| run | limit | ran | verdict | would reserve | predicted smallest limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        limit, prediction = row.record.run.limit_bytes, row.prediction
        if row.record.run.emulated_gpu is None or limit is None:
            continue
        # judged with the kernels of the card at work: all of its memory but this limit is process
        card = limit + prediction.device_peak_bytes - prediction.peak_reserved_bytes
        verdict = judge(prediction, row.record.name, card).verdict
        ran = "yes" if row.record.status == "done" else "out of memory"
        lines.append(
            f"| {row.record.name} | {limit // MIB} MiB | {ran} | {verdict} | "
            f"{prediction.peak_reserved_bytes // MIB} MiB | "
            f"{prediction.min_limit_bytes // MIB} MiB |"
        )
    return lines


def limits(found: Iterable[Row]) -> list[str]:
    """Searched limits: the bracket, and what was predicted."""
    lines = [
        "| job | runs at | does not at | runs tried | predicted smallest limit |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        search = row.record.limit_search
        if search is None:
            continue
        failing = search.largest_failing_bytes
        lines.append(
            f"| {row.record.name.removesuffix('-smallest')} | "
            f"{search.smallest_running_bytes // MIB} MiB | "
            f"{'none failed' if failing is None else f'{failing // MIB} MiB'} | "
            f"{len(search.tries)} | {row.prediction.min_limit_bytes // MIB} MiB |"
        )
    return lines


def repeats(found: Iterable[Row]) -> list[str]:
    """Repeated runs: do they agree, and how far do step times spread."""
    jobs: dict[str, list[Record]] = {}
    for row in found:
        name, mark, _ = row.record.name.partition(REPEAT)
        if mark:
            jobs.setdefault(name, []).append(row.record)
    lines = [
        "| job | repeats | peak allocated | peak reserved | step time, medians |",
        "|---|---|---|---|---|",
    ]
    for name, records in sorted(jobs.items()):
        times = [r.step_time_s.median for r in records if r.step_time_s is not None]
        lines.append(
            f"| {name} | {len(records)} | {_agreement(r.peak_allocated_bytes for r in records)} | "
            f"{_agreement(r.peak_reserved_bytes for r in records)} | "
            f"{min(times) * 1000:.0f} to {max(times) * 1000:.0f} ms |"
        )
    return lines


def _agreement(sizes: Iterable[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    if len(set(known)) == 1:
        return f"{known[0]:,} bytes, equal"
    return f"{min(known):,} to {max(known):,} bytes"


def paging(found: Iterable[Row]) -> list[str]:
    """What unified memory moved."""
    lines = [
        "| run | paged | steps before the save | save, to the host | next step, to the card |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        seen = row.record.paging
        if seen is None:
            continue
        state = f"{row.record.paged_bytes or 0:,}"
        if not seen.measured:
            lines.append(f"| {row.record.name} | {state} | not measured: {seen.reason} | | |")
            continue
        names = [window.window for window in seen.windows]
        saved = names.index("save") if "save" in names else len(names)
        moved = [
            (sum(w.host_to_device_bytes.values()), sum(w.device_to_host_bytes.values()))
            for w in seen.windows
        ]
        before = sum(sum(both) for both in moved[:saved])
        cells = [f"{before:,}"]
        cells += [f"{moved[saved][1]:,}", f"{moved[saved + 1][0]:,}"] if saved < len(names) else [
            "no save", "",
        ]  # fmt: skip
        lines.append(f"| {row.record.name} | {state} | " + " | ".join(cells) + " |")
    return lines


def details(found: Iterable[Row]) -> list[str]:
    """One table row per run."""
    lines = [
        "| run | measured peak allocated | predicted | error | reserved error |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        peak = row.record.peak_allocated_bytes
        if not peak:
            continue
        error, reserved = row.error("peak allocated"), row.error("peak reserved")
        lines.append(
            f"| {row.record.name} | {peak / MIB:,.1f} MiB | "
            f"{row.prediction.peak_allocated_bytes / MIB:,.1f} MiB | "
            f"{percent(error or 0.0, sign=True)} | "
            f"{'' if reserved is None else percent(reserved, sign=True)} |"
        )
    return lines


def report(folder: Path) -> str:
    """The whole record as Markdown."""
    found = rows(folder)
    record = found[0].record
    versions = ", ".join(
        f"{name} {version}" for name, version in record.versions.items() if name != "vramplan"
    )
    return "\n".join(
        [
            f"# Accuracy on {record.gpu.name}",
            "",
            f"Stock `transformers.Trainer`, random weights; driver {record.gpu.driver}, "
            f"{versions}. Made by `python -m vramplan.accuracy`; the runs by `{record.command}`. "
            "They were looked at while the block programs were written: none of them is held out. "
            "Errors are predicted over measured, minus one.",
            "",
            *summary(found),
            "",
            "## Peak allocated by kind of run",
            "",
            *groups(found),
            "",
            "## Emulated cards",
            "",
            "The allocator was held to what the card's driver reports, less the CUDA context, "
            "kernels and paged state. Kernels are the H100's.",
            "",
            *emulated(found),
            "",
            "## The smallest limit",
            "",
            "Found by running at one limit after another. Under a limit the outcome is not always "
            "monotone: a job can fail a little above a limit at which it runs.",
            "",
            *limits(found),
            "",
            "## The same run again",
            "",
            *repeats(found),
            "",
            "## Paging events",
            "",
            "Bytes as CUPTI counted them, with a canary buffer seen to the byte before and after. "
            "Without memory pressure nothing moves; a save reads the state on the host, and the "
            "next step brings it back.",
            "",
            *paging(found),
            "",
            "## Every run",
            "",
            *details(found),
            "",
        ]
    )


if __name__ == "__main__":
    default = profiles_dir() / "calibrations" / "h100-sxm-80gb"
    print(report(Path(sys.argv[1]) if sys.argv[1:] else default), end="")
