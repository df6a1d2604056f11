"""Writes reports/version-history.*: what the gate without a GPU says of real version changes.

Each pair of scripts/version-history.toml is installed side by side in a folder of yours, in front
of the packages of the environment that runs this. Records of the same jobs, measured on a card, are
read from profiles/calibrations/CARD/versions/PAIR-before.json and PAIR-after.json; ``--measure``
makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vramplan.catalogue import find_model
from vramplan.errors import EnvironmentProblem, RecordError, VramplanError
from vramplan.evidence import measurement
from vramplan.files import provenance, write_text
from vramplan.predicted import Predicted, read_predictions
from vramplan.record import read_record
from vramplan.regression import METRICS, Growth, Measurement, growth
from vramplan.report.findings import culprit, growth_name, signed
from vramplan.resources import profiles_dir
from vramplan.units import format_bytes

PAIRS = Path(__file__).with_name("version-history.toml")
SIDES = ("before", "after")
FIGURES = ("load", "ready", "allocated", "reserved", "min_limit")
LARGEST = 3
REPORT = "version-history"
VERDICTS = {0: "passed", 1: "failed", 2: "not compared"}


class Pair(NamedTuple):
    """One change of a library.

    Attributes:
        name: Its name in files.
        title: In one sentence.
        why: What changed and why it matters.
        source: Where to read it.
        pins: Side -> what is installed.
        run: The job, as a table of a matrix.
        layers: How many layers its model is cut to; None for all.
    """

    name: str
    title: str
    why: str
    source: str
    pins: Mapping[str, list[str]]
    run: dict[str, Any]
    layers: int | None


class Finding(NamedTuple):
    """What was predicted of a pair, and measured.

    Attributes:
        pair: The change.
        sides: Side -> prediction.
        code: Exit code of the gate.
        text: What it printed.
        measured: Card -> side -> measurement.
    """

    pair: Pair
    sides: Mapping[str, Predicted]
    code: int
    text: str
    measured: Mapping[str, Mapping[str, Measurement]]

    def grown(self) -> tuple[str, tuple[Growth, ...]]:
        """What changed most where the larger side is fullest: a phase, and by module."""
        small, large = (self.sides[side].measurement for side in SIDES)
        if small.figures["allocated"] > large.figures["allocated"]:
            small, large = large, small
        steps = {name: size for name, size in large.phases.items() if name in small.phases}
        phase = max(steps, key=lambda name: steps[name])
        return phase, growth(large.moments[phase], small.moments[phase])


def read_pairs(names: list[str]) -> list[Pair]:
    """The pairs of the file, or some of them."""
    found = [
        Pair(
            name=table["name"],
            title=table["title"],
            why=" ".join(table["why"].split()),
            source=table["source"],
            pins={side: table[side] + table.get("shared", []) for side in SIDES},
            run=table["run"],
            layers=table.get("layers"),
        )
        for table in tomllib.loads(PAIRS.read_text(encoding="utf-8"))["pair"]
    ]
    unknown = set(names) - {pair.name for pair in found}
    if unknown:
        raise SystemExit(f"unknown pair {min(unknown)}; known: {', '.join(p.name for p in found)}")
    return [pair for pair in found if not names or pair.name in names]


# -- installing and running ------------------------------------------------------------------------


class Bench:
    """A folder with the libraries of both sides, and what runs in front of them.

    Args:
        folder: Where they are installed, and kept for the next time.
        wheels: A folder with wheels, or with folders of them, instead of the package index.
    """

    def __init__(self, folder: Path, wheels: Path | None) -> None:
        self.folder, self.wheels = folder.resolve(), wheels

    def overlay(self, pins: list[str]) -> Path:
        """The folder of some pinned packages, installed on first use, without dependencies."""
        place = self.folder / "packages" / "+".join(sorted(pins)).replace("==", "-")[:200]
        done = place / ".complete"
        if not done.exists():
            print(f"installing {', '.join(pins)}", file=sys.stderr)
            source = ["--no-index"] if self.wheels else []
            for wheels in [self.wheels, *self.wheels.glob("*/")] if self.wheels else []:
                source += ["--find-links", str(wheels)]
            options = "--quiet --upgrade --no-deps --disable-pip-version-check --target"
            pip = [sys.executable, "-m", "pip", "install", *source, *options.split()]
            command = [*pip, str(place), *pins]
            if subprocess.run(command, check=False).returncode:  # noqa: S603
                raise EnvironmentProblem(f"cannot install {', '.join(pins)}")
            done.touch()
        return place

    def matrix(self, pair: Pair, name: str) -> Path:
        """The file of a pair's job, and of its model where that is cut."""
        place = self.folder / pair.name
        place.mkdir(parents=True, exist_ok=True)
        run = pair.run | {"name": name}
        if pair.layers is not None:
            config = dict(find_model(run["model"]).config) | {"num_hidden_layers": pair.layers}
            run["model"] = f"{run['model']}-{pair.layers}-layers.json"
            write_text(place / run["model"], json.dumps(config, indent=1) + "\n")
        lines = ["[[run]]", *(f"{key} = {json.dumps(value)}" for key, value in run.items())]
        path = place / f"{name}.toml"
        write_text(path, "\n".join(lines) + "\n")
        return path

    def vramplan(self, pair: Pair, side: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of ours in front of one side's libraries; paths are relative to the pair's."""
        root = str(Path(__file__).resolve().parents[1])
        paths = [str(self.overlay(pair.pins[side])), root]
        return subprocess.run(  # noqa: S603
            [sys.executable, "-m", "vramplan.cli", *words],
            cwd=self.folder / pair.name,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )


def predict(bench: Bench, pair: Pair) -> Finding:
    """Predict both sides and let the gate judge."""
    matrix = bench.matrix(pair, pair.name).name
    print(f"{pair.name}: predicting", file=sys.stderr)
    sides: dict[str, Predicted] = {}
    code, text = 2, ""
    for side in SIDES:
        if side == "after":
            done = bench.vramplan(pair, side, "check", "--predicted", "before.json")
            code, text = done.returncode, done.stdout
        words = ("--predicted", f"{side}.json", "--matrix", matrix, "--update", "--quiet")
        if bench.vramplan(pair, side, "check", *words).returncode:
            raise EnvironmentProblem(f"{pair.name}: the {side} side cannot be predicted")
        (sides[side],) = read_predictions(bench.folder / pair.name / f"{side}.json")
    return Finding(pair, sides, code, text, dict(measured(pair)))


def measure(bench: Bench, pair: Pair, folder: Path, device: str) -> None:
    """Measure both sides; a record that is there is kept."""
    for side in SIDES:
        matrix = bench.matrix(pair, f"{pair.name}-{side}").name
        words = ("--matrix", matrix, "--device", device, "-o", str(folder.resolve()))
        done = bench.vramplan(pair, side, "measure", *words)
        print(done.stdout, end="")


def measured(pair: Pair) -> dict[str, dict[str, Measurement]]:
    """The pair's records by card; both sides must be there, with the libraries that are pinned."""
    found: dict[str, dict[str, Measurement]] = {}
    for path in sorted(profiles_dir().glob(f"calibrations/*/versions/{pair.name}-before.json")):
        sides: dict[str, Measurement] = {}
        for side in SIDES:
            file = path.with_name(f"{pair.name}-{side}.json")
            record = read_record(file)
            for pin in pair.pins[side]:
                name, _, version = pin.partition("==")
                if name in record.versions and record.versions[name] != version:
                    raise RecordError(f"{file} was measured with {name} {record.versions[name]}, "
                                      f"not {version}")  # fmt: skip
            sides[side] = measurement(record)
        found[path.parent.parent.name] = sides
    return found


# -- reports ---------------------------------------------------------------------------------------


def document(findings: list[Finding]) -> dict[str, Any]:
    """Everything as JSON: bytes, null for what was not measured."""
    return {
        "schema_version": 1,
        **provenance(),
        "command": "scripts/version-history FOLDER",  # whose folder it was is nobody's business
        "pairs": [
            {
                "name": found.pair.name,
                "title": found.pair.title,
                "source": found.pair.source,
                "pins": dict(found.pair.pins),
                "job": found.pair.run,
                "layers": found.pair.layers,
                "gate": VERDICTS[found.code],
                "predicted": {side: dict(p.measurement.figures) for side, p in found.sides.items()},
                "estimate": {side: dict(p.estimate) for side, p in found.sides.items()},
                "phase": found.grown()[0],
                "grown": [each._asdict() for each in found.grown()[1][:LARGEST]],
                "measured": {
                    card: {side: dict(told.figures) for side, told in sides.items()}
                    for card, sides in found.measured.items()
                }
                or None,
            }
            for found in findings
        ],
    }  # fmt: skip


def markdown(findings: list[Finding]) -> str:
    """The same for people."""
    lines = [
        "# Version changes that altered memory",
        "",
        "Each job is predicted with the libraries before and after a change, by tracing their own "
        "code without a GPU, and `vramplan check --predicted` judges the difference. Made by "
        "`scripts/version-history`; the pairs are in `scripts/version-history.toml`.",
        "",
        "| change | libraries | gate | peak allocated, predicted | measured | most of it |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(found) for found in findings]
    for found in findings:
        lines += ["", *_section(found)]
    return "\n".join(lines) + "\n"


def _row(found: Finding) -> str:
    before, after = (found.sides[side].measurement.figures for side in SIDES)
    changed = [
        f"{was.replace('==', ' ')} -> {now.partition('==')[2]}"
        for was in found.pair.pins["before"]
        for now in found.pair.pins["after"]
        if was.partition("==")[0] == now.partition("==")[0] and was != now
    ]
    told = "; ".join(
        f"{_from_to(*(sides[side].figures for side in SIDES), 'allocated')} ({card})"
        for card, sides in found.measured.items()
    )
    most = culprit(found.grown()[1]) or growth_name(found.grown()[1][0])
    cells = (
        found.pair.title, ", ".join(changed), VERDICTS[found.code],
        _from_to(before, after, "allocated"), told or "not measured", most,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _from_to(before: Mapping[str, int], after: Mapping[str, int], metric: str) -> str:
    if metric not in before or metric not in after:
        return "not measured"
    share = after[metric] / before[metric] - 1
    return f"{format_bytes(before[metric])} -> {format_bytes(after[metric])} ({share:+.1%})"


def _section(found: Finding) -> list[str]:
    pair = found.pair
    options = ", ".join(f"{key} {value}" for key, value in pair.run.items())
    cut = f", cut to {pair.layers} layers" if pair.layers else ""
    cards = list(found.measured)
    lines = [
        f"## {pair.title}",
        "",
        pair.why,
        "",
        f"Source: {pair.source}. Job: {options}{cut}.",
        f"Before: {', '.join(pair.pins['before'])}. After: {', '.join(pair.pins['after'])}.",
        "",
        f"| figure | predicted | {' | '.join(f'measured, {c}' for c in cards) or 'measured'} |",
        "|---|---|" + "---|" * max(1, len(cards)),
    ]
    figures = [found.sides[side].measurement.figures for side in SIDES]
    for metric in FIGURES:
        cells = [
            _from_to(*(found.measured[card][side].figures for side in SIDES), metric)
            for card in cards
        ] or ["not measured"]
        predicted = _from_to(figures[0], figures[1], metric)
        lines.append(f"| {METRICS[metric].title} | {predicted} | {' | '.join(cells)} |")
    phase, grown = found.grown()
    shrank = figures[1]["allocated"] < figures[0]["allocated"]
    sizes = ", ".join(
        f"{signed('allocated', -g.nbytes if shrank else g.nbytes)} {growth_name(g)}"
        for g in grown[:LARGEST]
    )
    return [
        *lines, "", f"At the fullest moment of {phase}: {sizes}.", "",
        f"The gate (exit code {found.code}):", "", "```", found.text.rstrip(), "```",
    ]  # fmt: skip


def main() -> None:
    """Read the command line and go through the pairs."""
    parser = argparse.ArgumentParser(prog="scripts/version-history", description=__doc__)
    parser.add_argument("folder", type=Path, help="where both sides are installed, and kept")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, instead of the index")
    parser.add_argument("--pair", action="append", default=[], help="one of them, repeatable")
    parser.add_argument(
        "--measure", type=Path, metavar="FOLDER", help="write records there instead"
    )
    parser.add_argument("--device", default="cuda", help="with --measure: cuda, or cpu to try it")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="for the reports")
    args = parser.parse_args()
    bench = Bench(args.folder, args.wheels)
    pairs = read_pairs(args.pair)
    try:
        if args.measure is not None:
            for pair in pairs:
                measure(bench, pair, args.measure, args.device)
            return
        findings = [predict(bench, pair) for pair in pairs]
    except VramplanError as error:
        raise SystemExit(f"error: {error}") from None
    text = json.dumps(document(findings), indent=1)
    write_text(args.reports / f"{REPORT}.json", text + "\n")
    write_text(args.reports / f"{REPORT}.md", markdown(findings))


if __name__ == "__main__":
    main()
