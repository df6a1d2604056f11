"""Records of measured runs -> a Profile: the constants that no formula knows, with their residuals.

Calibration fits constants and nothing else: no formula, family or model has a knob here. A constant
whose observations disagree is refused with the reason instead of averaged away.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vramplan.catalogue import model_from_config
from vramplan.errors import RecordError, UsageError
from vramplan.estimate import CUBLASLT_WORKSPACE, num_cublaslt_threads
from vramplan.files import provenance, write_text
from vramplan.job import Job
from vramplan.profile import NEEDED, SCHEMA_VERSION, Constant, Profile, profile_file, profile_for
from vramplan.record import Record, read_record
from vramplan.timefit import START, TimeFit, fit_times
from vramplan.timing import RATIO, RATIO_AT_PACE
from vramplan.units import MIB

MIN_RECORDS = 3
HIGH_CONFIDENCE = (10, 0.02)  # at least so many observations, residual at most this share
MEDIUM_CONFIDENCE = (3, 0.10)
MANAGED_STEPS = tuple(2**power * MIB for power in range(1, 10))  # candidates: 2 MiB to 512 MiB


class Rule(NamedTuple):
    """How one constant is read off records.

    Attributes:
        name: The constant.
        unit: Its unit.
        what: What it is, for people.
        observe: Its value in one record; None where the record does not tell.
        tolerance: Largest share by which nine tenths of the observations may be off.
    """

    name: str
    unit: str
    what: str
    observe: Callable[[Record], float | None]
    tolerance: float


class Fitted(NamedTuple):
    """A Profile and what it was made from."""

    profile: Profile
    observations: Mapping[str, Mapping[str, float]]  # constant -> record -> value
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The GPU, driver and torch that a Profile is for."""

    gpu: str
    gpu_name: str
    driver: str
    torch: str


def _process(record: Record, *, bitsandbytes: bool) -> int | None:
    job = Job.from_dict(record.job)
    if record.paged_bytes or record.run.paging or job.uses_bitsandbytes is not bitsandbytes:
        return None
    return record.beyond_reserved_bytes


def _driver_reserved(record: Record) -> int | None:
    whole, usable = record.gpu.nvml_total_bytes, record.gpu.total_bytes
    return None if whole is None or usable is None else whole - usable


def _cublas(record: Record) -> int | None:
    """CuBLAS' own workspaces, without those of cuBLASLt, which a formula knows."""
    if record.cublas_workspace_bytes is None:
        return None
    model = model_from_config(record.config, record.model)
    threads = num_cublaslt_threads(model, Job.from_dict(record.job))
    return record.cublas_workspace_bytes - threads * CUBLASLT_WORKSPACE


def _rate(name: str) -> Callable[[Record], float | None]:
    return lambda record: (record.rates or {}).get(name)


RULES = (
    Rule("context_bytes", "bytes", "a CUDA context alone", lambda r: r.context_bytes, 0.10),
    Rule(
        "process_bytes",
        "bytes",
        "held beyond reserved memory after some steps: context, kernels, handles",
        lambda r: _process(r, bitsandbytes=False),
        0.10,
    ),
    Rule(
        "process_bitsandbytes_bytes",
        "bytes",
        "the same with bitsandbytes' kernels, no paged state",
        lambda r: _process(r, bitsandbytes=True),
        0.10,
    ),
    Rule(
        "cublas_workspace_bytes",
        "bytes",
        "cuBLAS workspaces of the forward and the backward thread",
        _cublas,
        0.01,
    ),
    Rule(
        "driver_reserved_bytes",
        "bytes",
        "of nvidia-smi's total, not to be had by any process",
        _driver_reserved,
        0.01,
    ),
    Rule(
        "host_bytes",
        "bytes",
        "resident host memory of the process",
        lambda r: None if r.run.evaluate else r.host_rss_peak_bytes,  # kept logits go there
        0.60,
    ),
    Rule(
        "launch_overhead_s",
        "s",
        "Python, torch and driver to launch one small operation",
        _rate("launch_overhead_s"),
        0.50,
    ),
    Rule(
        "bf16_flops_per_s",
        "flop/s",
        "bf16 product of two 4096 x 4096 matrices",
        _rate("bf16_flops_per_s"),
        0.25,
    ),
    Rule(
        "fp16_flops_per_s",
        "flop/s",
        "fp16 product of two 4096 x 4096 matrices",
        _rate("fp16_flops_per_s"),
        0.25,
    ),
    Rule(
        "thin_flops_per_s",
        "flop/s",
        "16-bit product of 512 x 4096 and 4096 x 4096",
        _rate("thin_flops_per_s"),
        0.40,
    ),
    Rule(
        "copy_bytes_per_s",
        "bytes/s",
        "device-to-device copy, bytes read plus written",
        _rate("copy_bytes_per_s"),
        0.25,
    ),
)
MANAGED = "managed_step_bytes"
# fitted to the step times of all runs: (unit, what it is)
TIMES = {
    "operation_s": ("s", "the host's time for one operation of a model's forward"),
    "quantised_call_s": ("s", "the host's time for one call of bitsandbytes' autograd functions"),
    "micro_step_s": ("s", "the host's time for a micro-batch outside the model"),
    "fp32_flops_per_s": ("flop/s", "fp32 matrix products in training, TF32 off"),
    "attention_flops_per_s": ("flop/s", "fused attention in training"),
    "moved_bytes_per_s": ("bytes/s", "bytes read and written by all other kernels in training"),
    "dequantised_per_s": ("weights/s", "quantised weights made 16-bit"),
    "updated_8bit_per_s": ("elements/s", "elements of 8-bit optimizer state updated"),
    "pace_exponent": ("", "how far the host's times follow the pace of its launches"),
    RATIO: ("", "step time predicted over measured, each family left out in turn"),
    RATIO_AT_PACE: ("", "the same at the pace that the host was seen to have"),
}
WHAT = (
    {rule.name: rule.what for rule in RULES}
    | {MANAGED: "steps in which managed memory takes device memory"}
    | {name: what for name, (_, what) in TIMES.items()}
)


def find_records(paths: Iterable[Path]) -> list[Record]:
    """Read records from files and folders.

    Args:
        paths: Record files, or folders whose ``*.json`` are records.

    Raises:
        RecordError: If one cannot be read, or there are none.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise RecordError(f"{path} does not exist; name records or a folder of them")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise RecordError("there are no records; make some with vramplan measure")
    return [read_record(file) for file in dict.fromkeys(files)]


def fit_profiles(records: Sequence[Record]) -> list[Fitted]:
    """Fit one Profile per GPU, driver and torch.

    Args:
        records: Any records; those that did not finish on a GPU are left out.

    Returns:
        The Profiles, with all observations.

    Raises:
        UsageError: If there are too few records, or observations disagree; it names them.
    """
    groups: dict[Group, list[Record]] = {}
    for record in records:
        gpu = record.gpu
        if record.status == "done" and gpu.name and gpu.driver:
            slug = gpu.slug or "-".join(gpu.name.lower().split())
            torch = str(record.versions.get("torch"))
            groups.setdefault(Group(slug, gpu.name, gpu.driver, torch), []).append(record)
    if not groups:
        raise UsageError(
            f"none of {len(records)} records is of a run that finished on a GPU; a profile needs "
            f"{MIN_RECORDS}"
        )
    return [_fit(group, members) for group, members in groups.items()]


def _fit(group: Group, records: Sequence[Record]) -> Fitted:
    records = _named_apart(records)
    if len(records) < MIN_RECORDS:
        raise UsageError(
            f"{group.gpu_name}, driver {group.driver}, torch {group.torch}: {len(records)} "
            f"finished run(s) are too few for a profile; measure {MIN_RECORDS} or more"
        )
    observations = {
        rule.name: {
            record.name: float(value)
            for record in records
            if (value := rule.observe(record)) is not None
        }
        for rule in RULES
    }
    if not observations["process_bytes"]:  # every run had bitsandbytes
        observations["process_bytes"] = observations["process_bitsandbytes_bytes"]
    constants = {
        rule.name: _constant(rule, observations[rule.name])
        for rule in RULES
        if observations[rule.name]
    }
    constants[MANAGED], observations[MANAGED] = _managed_step(records, constants)
    times = fit_times(records)
    if times is not None:
        for name, (constant, observed) in _times(times).items():
            constants[name], observations[name] = constant, observed
    missing = sorted(NEEDED - constants.keys())
    if missing:
        raise UsageError(
            f"{group.gpu_name}: no record tells {missing[0]} ({WHAT[missing[0]]}); measure one "
            "run without a paged optimizer"
        )
    origin = provenance()
    profile = Profile(
        group.gpu, group.gpu_name, group.driver, group.torch, str(origin["created"]), constants
    )
    document = {
        "schema_version": SCHEMA_VERSION,
        **asdict(group),
        **origin,
        "versions": _versions(records),
        "num_records": len(records),
        "constants": {
            name: {
                "what": WHAT[name],
                **asdict(constant),
                "observations": observations[name],
            }
            for name, constant in constants.items()
        },
    }
    return Fitted(profile, observations, document)


def _named_apart(records: Sequence[Record]) -> list[Record]:
    """Records of one name, from several folders, numbered."""
    seen: dict[str, int] = {}
    named = []
    for record in records:
        count = seen[record.name] = seen.get(record.name, 0) + 1
        name = record.name if count == 1 else f"{record.name} ({count})"
        named.append(record.model_copy(update={"name": name}))
    return named


def _versions(records: Sequence[Record]) -> dict[str, list[str]]:
    """Every version of every library that was seen."""
    seen: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            if version is not None:
                seen.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in sorted(seen.items())}


def ninetieth(sizes: Iterable[float]) -> float:
    """The 90th percentile: nine tenths of the sizes are within it."""
    ordered = sorted(sizes)
    return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


def _constant(rule: Rule, observed: Mapping[str, float]) -> Constant:
    """Median, residual and confidence of one constant.

    Raises:
        UsageError: If the observations disagree.
    """
    values = list(observed.values())
    value = statistics.median(values)
    distances = [abs(v - value) for v in values]
    if ninetieth(distances) > rule.tolerance * value:
        worst = max(observed, key=lambda name: abs(observed[name] - value))
        raise UsageError(
            f"{rule.name} ({rule.what}) is not one constant in these records: median {value:.4g} "
            f"{rule.unit}, but {observed[worst]:.4g} in {worst}. Was something else on the card? "
            "Leave such records out"
        )
    residual = statistics.median(distances)
    return Constant(
        value=value,
        unit=rule.unit,
        low=min(values),
        high=max(values),
        residual=residual,
        num_observations=len(values),
        confidence=confidence(len(values), residual / value if value else 0.0),
    )


def _times(fitted: TimeFit) -> dict[str, tuple[Constant, dict[str, float]]]:
    """The fitted rates; a rate's observations are its values without one family each."""
    found = {
        name: (
            getattr(fitted.rates, name),
            {f"without {family}": getattr(rates, name) for family, rates in fitted.without.items()},
        )
        for name in START
    }
    found[RATIO] = statistics.median(fitted.ratios.values()), dict(fitted.ratios)
    if fitted.at_pace:
        found[RATIO_AT_PACE] = statistics.median(fitted.at_pace.values()), dict(fitted.at_pace)
    constants = {}
    for name, (value, observed) in found.items():
        # a ratio is to be 1, whatever its median
        target = 1.0 if name in (RATIO, RATIO_AT_PACE) else value
        residual = statistics.median(abs(v - target) for v in observed.values())
        constants[name] = (
            Constant(
                value=value,
                unit=TIMES[name][0],
                low=min(observed.values()),
                high=max(observed.values()),
                residual=residual,
                num_observations=len(fitted.at_pace if name == RATIO_AT_PACE else fitted.runs),
                confidence=confidence(len(fitted.runs), residual / value),
            ),
            observed,
        )
    return constants


def confidence(num_observations: int, share: float) -> str:
    """One of high, medium and low, from the number of observations and their relative residual."""
    for word, (least, most) in (("high", HIGH_CONFIDENCE), ("medium", MEDIUM_CONFIDENCE)):
        if num_observations >= least and share <= most:
            return word
    return "low"


def _managed_step(
    records: Sequence[Record], constants: Mapping[str, Constant]
) -> tuple[Constant, dict[str, float]]:
    """The step in which managed memory takes device memory, that explains the records best."""
    base = constants.get("process_bitsandbytes_bytes") or constants.get("process_bytes")
    taken: dict[str, tuple[int, float]] = {}
    for record in records:
        held = record.beyond_reserved_bytes
        if base is not None and record.paged_bytes and held is not None and not record.run.paging:
            taken[record.name] = record.paged_bytes, held - base.value
    if not taken:
        assumed = profile_for(None).constants[MANAGED]
        return (
            Constant(assumed.value, "bytes", assumed.value, assumed.value, 0.0, 0, "low"),
            {},
        )

    def misses(step: int) -> list[float]:
        return [abs(extra - -(-paged // step) * step) for paged, extra in taken.values()]

    step = min(MANAGED_STEPS, key=lambda size: (statistics.median(misses(size)), size))
    residual = statistics.median(misses(step))
    constant = Constant(
        float(step), "bytes", float(step), float(step), residual, len(taken),
        confidence(len(taken), residual / step),
    )  # fmt: skip
    return constant, {name: extra for name, (_, extra) in taken.items()}


def write_profile(folder: Path, fitted: Fitted, *, force: bool = False) -> Path:
    """Write a Profile below a folder of calibrations.

    Args:
        folder: The user's data folder, or ``profiles/calibrations``.
        fitted: What to write.
        force: Replace one of the same GPU, driver and torch.

    Returns:
        The file.

    Raises:
        RecordError: If there is one already.
        EnvironmentProblem: If it cannot be written.
    """
    own = fitted.profile
    path = folder / profile_file(own.gpu, own.driver, own.torch)
    if path.exists() and not force:
        raise RecordError(f"{path} exists; replace it with --force, or choose --output")
    write_text(path, json.dumps(fitted.document, indent=1) + "\n")
    return path
