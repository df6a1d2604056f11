"""``vramplan measure``: real training steps on this machine's GPU, beside the estimate."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vramplan.catalogue import find_model
from vramplan.cli import app, output
from vramplan.cli import options as o
from vramplan.errors import EnvironmentProblem, UsageError
from vramplan.estimate import estimate as walk
from vramplan.gpus import find_gpu
from vramplan.measure.harness import Harness
from vramplan.measure.limit import RESOLUTION_BYTES, emulated
from vramplan.measure.machine import check_disk
from vramplan.measure.spec import (
    DEFAULT_STEPS,
    DEFAULT_TIMEOUT_S,
    EVAL_BATCH_SIZE,
    MatrixRow,
    RunSpec,
    make_specs,
    read_matrix,
    repeated,
)
from vramplan.measure.sweep import (
    Work,
    clean,
    exit_code,
    finished,
    perform,
    record_path,
    unused_name,
)
from vramplan.record import Record
from vramplan.units import MIB, parse_size

FOLDER = Path("vramplan-records")
RECORD_BYTES = 16 * MIB


@app.command()
@o.with_sweep
def measure(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=o.MODEL_HELP, show_default=False),
    ] = None,
    *,
    sweep: dict[str, Any],
    matrix: Annotated[
        Path | None,
        typer.Option(help="TOML file with [[run]] tables, instead of MODEL.", show_default=False),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Load this checkpoint folder (safetensors) instead of random weights."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the harness.")] = "cuda",
    gpu_index: Annotated[
        int, typer.Option(help="Which of the visible GPUs, in nvidia-smi's order.")
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps; the first is reported apart.")] = (
        DEFAULT_STEPS
    ),
    timeout: Annotated[float, typer.Option(help="Seconds after which a run is killed.")] = (
        DEFAULT_TIMEOUT_S
    ),
    limit: Annotated[
        str | None, typer.Option(help="Most the allocator may reserve, such as 12GiB.")
    ] = None,
    as_gpu: Annotated[
        str | None, typer.Option(help="Emulate a smaller card of the catalogue by such a limit.")
    ] = None,
    find_limit: Annotated[
        bool, typer.Option("--find-limit", help="Look for the smallest limit at which it runs.")
    ] = False,
    resolution: Annotated[str, typer.Option(help="How closely to look.")] = (
        f"{RESOLUTION_BYTES // MIB}MiB"
    ),
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Also evaluate, before the last step.")
    ] = False,
    eval_batch_size: Annotated[int, typer.Option(help="Sequences per evaluation batch.")] = (
        EVAL_BATCH_SIZE
    ),
    eval_logits: Annotated[
        bool,
        typer.Option("--eval-logits", help="Keep all logits in it, as compute_metrics does."),
    ] = False,
    eval_accumulation_steps: Annotated[
        int | None,
        typer.Option(help="Batches after which the logits leave the card.", show_default=False),
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(help="Sequences to evaluate [default: two batches].")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Also save a checkpoint, before the last step.")
    ] = False,
    history: Annotated[
        bool, typer.Option("--history", help="Record every allocation (kept beside the record).")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="With --history: where measurement and estimate part, term by term."
        ),
    ] = False,
    paging: Annotated[
        bool,
        typer.Option("--paging", help="Count what unified memory moves (needs vramplan[paging])."),
    ] = False,
    repeat: Annotated[int, typer.Option(help="Measure each run so many times.")] = 1,
    output_folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the records.")
    ] = FOLDER,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again and replace records.")
    ] = False,
    no_skip: Annotated[
        bool, typer.Option("--no-skip", help="Also run what the estimate calls hopeless.")
    ] = False,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Measure on a GPU that others use.")
    ] = False,
    plot: o.PlotOption = None,
    as_json: o.JsonOption = False,
) -> None:
    """Really run it here. Exit code 0: it ran; 1: out of memory; 2: it could not be measured."""
    if (model is None) == (matrix is None):
        raise UsageError("name a MODEL or a --matrix file, one of the two")
    if device not in ("cuda", "cpu"):
        raise UsageError(f"--device must be cuda or cpu, not {device!r}")
    if explain and not (history and device == "cuda"):
        raise UsageError("--explain compares allocation by allocation: add --history, on a GPU")
    if limit and as_gpu:
        raise UsageError("--limit and --as-gpu both set the limit; choose one")
    shared = RunSpec(
        name="",
        model="",
        config={},
        job=o.DEFAULT_JOB,
        device=device,
        num_steps=steps,
        limit_bytes=parse_size(limit) if limit else None,
        emulated_gpu=find_gpu(as_gpu).slug if as_gpu else None,
        weights=str(checkpoint(weights)) if weights else None,
        evaluate=evaluate,
        eval_batch_size=eval_batch_size,
        eval_logits=eval_logits,
        eval_accumulation_steps=eval_accumulation_steps,
        eval_samples=eval_samples,
        save=save,
        history=history,
        paging=paging,
        timeout_s=timeout,
    )
    if matrix is not None:
        if sweep != o.DEFAULT_SWEEP or as_gpu or find_limit or repeat != 1:
            raise UsageError(
                "with --matrix, what a run is (job options, --as-gpu, --find-limit, --repeat) "
                "stands in the file"
            )
        rows = read_matrix(matrix, shared)
    else:
        assert model is not None
        specs = tuple(repeated(make_specs(model, sweep, shared), repeat))
        rows = [MatrixRow(specs, find_limit=find_limit, skip=len(specs) > 1)]
    works = [
        Work(emulated(spec), row.find_limit, parse_size(resolution), row.skip and not no_skip)
        for row in rows
        for spec in row.specs
    ]
    check(works)
    if plot is not None:
        if len(works) != 1:
            raise UsageError("--plot draws one run; `vramplan compare` draws many records")
        o.check_plot(plot, force=force)
    if matrix is None and len(works) == 1 and not force:
        spec = works[0].spec
        works = [replace(works[0], spec=replace(spec, name=unused_name(output_folder, spec.name)))]
    records = run_works(
        works, output_folder, gpu_index=gpu_index, allow_busy=allow_busy, force=force
    )
    if plot is not None:
        from vramplan.cli.plots import plot_run  # noqa: PLC0415

        plot_run(plot, records[0])
    report(records, output_folder, explain=explain, as_json=as_json)
    raise typer.Exit(exit_code(records))


def check(works: list[Work]) -> None:
    """Find out before anything runs what cannot be run.

    Raises:
        UsageError: If a job does not go with its model, or two runs have one name.
    """
    names: set[str] = set()
    for work in works:
        spec = work.spec
        model = find_model(spec.model)
        o.check_length(model, spec.job)
        walk(model, spec.job)
        if spec.name in names:
            raise UsageError(f"two runs are called {spec.name!r}; give one of them another name")
        names.add(spec.name)


def checkpoint(folder: Path) -> Path:
    """A checkpoint folder that can be loaded.

    Raises:
        UsageError: If it has no safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} has no *.safetensors; only those are loaded (pickled weights can run code)"
        )
    return folder.resolve()


def run_works(
    works: list[Work], folder: Path, *, gpu_index: int, allow_busy: bool, force: bool
) -> list[Record]:
    """Make every record that is not there yet.

    Args:
        works: What to run.
        folder: Where records go and finished ones are found.
        gpu_index: Which GPU.
        allow_busy: Whether others may use it.
        force: Measure again what is there.

    Returns:
        All records, in order.
    """
    records: dict[int, Record] = {}
    for number, work in enumerate(works):
        found = None if force else finished(folder, work)
        if found is not None:
            records[number] = found
    left = [number for number in range(len(works)) if number not in records]
    if len(left) < len(works):
        print(f"{len(works) - len(left)} of {len(works)} are there already", file=sys.stderr)
    if left:
        device = works[left[0]].spec.device
        with (
            Harness(device, gpu_index=gpu_index, allow_busy=allow_busy) as harness,
            output.progress(len(left)) as begin,
        ):
            make_folder(folder)
            clean(folder)
            for number in left:
                work = works[number]
                tell = begin(work.spec.name)
                record = perform(harness, work, folder, tell=tell)
                tell(f"{record.name}: {ending(record)}")
                records[number] = record
    return [records[number] for number in range(len(works))]


def make_folder(folder: Path) -> None:
    """Make the folder of the records.

    Raises:
        EnvironmentProblem: If it cannot be made, or has no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"cannot make {folder}: {error.strerror or error}") from None
    check_disk(folder, RECORD_BYTES, "the records")


def ending(record: Record) -> str:
    """How a run ended, in a few words."""
    if record.status == "oom" and record.oom is not None:
        return f"out of memory in {record.oom.phase}"
    if record.status in ("error", "killed", "timeout", "skipped"):
        last = (record.error or "").strip().splitlines()[-1:]
        return f"{record.status}: {''.join(last)}"
    return record.status


def report(records: list[Record], folder: Path, *, explain: bool, as_json: bool) -> None:
    """Say what came out: one run at length, several as a table."""
    from vramplan.cli import measured  # noqa: PLC0415 - predictions of every run

    if as_json:
        output.print_json(measured.document(records))
        return
    if len(records) == 1:
        measured.print_run(output.console(), records[0])
        if explain:
            path = record_path(folder, records[0].name).with_suffix(".timeline.json.gz")
            measured.print_terms(output.console(), records[0], path)
    else:
        measured.print_runs(output.console(), records)
    where = record_path(folder, records[0].name) if len(records) == 1 else folder
    print(f"record: {where}" if len(records) == 1 else f"records: {where}", file=sys.stderr)
