"""Making a Comparison: each job is predicted once for all cards that would run it alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vramplan.advice import MAX_BATCH, SEQ_STEP, search_largest
from vramplan.catalogue import find_model, model_from_config
from vramplan.comparison import Comparison, Entry, Run
from vramplan.errors import UsageError, VramplanError
from vramplan.gpus import Gpu, find_gpu
from vramplan.job import Job, recorded_job
from vramplan.model import Model
from vramplan.prediction import Prediction, alike, job_for, judge, predict, usable_bytes
from vramplan.timing import pace

if TYPE_CHECKING:
    from vramplan.record import Record

UNKNOWN, EXTRAPOLATED = "unknown", "extrapolated"
CACHED, CONTEXT, PAGED = "cached", "context", "paged_optimizer"


def compare(
    models: Iterable[str | Model] = (),
    gpus: Iterable[str | Gpu] = (),
    jobs: Iterable[Job] = (Job(),),
    *,
    records: Iterable[Record] = (),
    prices: Mapping[str, float] | None = None,
    told: Callable[[str], object] = str,
) -> Comparison:
    """Predict every job of every model on every card, and put records beside their predictions.

    Args:
        models: Models, or names as in ``find_model``.
        gpus: Cards, or names as in ``find_gpu``.
        jobs: What to do with each model.
        records: Measured runs. With cards, their jobs are predicted on these too.
        prices: What an hour of a card costs, by slug, in any one currency.
        told: Called with the name of each job and run as it is begun.

    Returns:
        The comparison.

    Raises:
        UsageError: If there is nothing to compare, or a job does not go with a model.
        UnknownNameError: If a model or card is unknown.

    Known limitations:
        The largest batch and sequence take the allocator's share from the job as given.
    """
    cards = list(dict.fromkeys(find_gpu(gpu) if isinstance(gpu, str) else gpu for gpu in gpus))
    found = [find_model(model) if isinstance(model, str) else model for model in models]
    kept = list(records)
    jobs = list(jobs)
    if not kept and not (found and cards and jobs):
        raise UsageError(
            "nothing to compare: name models with --model and cards with --gpu, or give records"
        )
    if found and not cards:
        raise UsageError("name the cards to compare with --gpu (see `vramplan gpus`)")
    runs = []
    for record in kept:
        told(record.name)
        runs.append(_run(record))
    pairs = [(model, job) for model in found for job in jobs]
    pairs += [pair for record in kept if cards and (pair := _job_of(record)) is not None]
    entries: dict[tuple[str, int, Job], list[Entry]] = {}
    for model, job in pairs:
        key = (model.name, model.num_parameters, job)  # records of one job ask once
        if key not in entries:
            told(f"{model.name}, {job.method}")
            entries[key] = _on_cards(model, job, cards, prices or {})
    return Comparison(tuple(e for found in entries.values() for e in found), tuple(runs))


def _run(record: Record) -> Run:
    """A record beside its prediction; records of models without a block program have none."""
    from vramplan.accuracy import figures, predicted  # noqa: PLC0415 - needs pydantic

    try:
        return Run(record, figures(record, predicted(record)))
    except VramplanError as error:
        return Run(record, (), f"not predicted: {error}")


def _job_of(record: Record) -> tuple[Model, Job] | None:
    try:
        return model_from_config(record.config, record.model), recorded_job(record)
    except UsageError:
        return None  # its Run says why


def _on_cards(
    model: Model, job: Job, cards: Sequence[Gpu], prices: Mapping[str, float]
) -> list[Entry]:
    """One job on every card, predicted once for all cards that would run it alike."""
    shared: dict[object, _Variants] = {}
    found = []
    for gpu in cards:
        own = job_for(job, gpu)
        key = (own, alike(gpu))
        if key not in shared:
            shared[key] = _Variants(model, own, gpu)
        found.append(shared[key].entry(job, gpu, prices.get(gpu.slug)))
    return found


class _Variants:
    """A job and its variants on cards that run it alike; each is worked out once."""

    def __init__(self, model: Model, job: Job, gpu: Gpu) -> None:
        self.model, self.job, self.gpu = model, job, gpu
        self.headline = predict(model, job, gpu)
        self.min_limit_bytes = self.headline.min_limit_bytes
        self._peaks: dict[tuple[str, int], int] = {}

    def entry(self, asked: Job, gpu: Gpu, price: float | None) -> Entry:
        """What one of the cards makes of it."""
        prediction, usable = self.headline, usable_bytes(gpu)
        verdict = None if usable is None else judge(prediction, gpu.slug, usable)
        runs = verdict is None or verdict.verdict != "no"
        speed = pace(prediction.estimate, self.job, gpu) if runs else None
        top = max(self.model.dims.max_positions, self.job.seq_len)
        return Entry(
            model=self.model,
            asked=asked,
            job=self.job,
            gpu=gpu,
            usable_bytes=usable,
            verdict=verdict.verdict if verdict else UNKNOWN,
            headroom_bytes=verdict.headroom_bytes if verdict else None,
            bytes_by_name={
                "ready": prediction.ready_bytes,
                "peak_allocated": prediction.peak_allocated_bytes,
                "peak_reserved": prediction.peak_reserved_bytes,
                "min_limit": self.min_limit_bytes,
                "device_peak": prediction.device_peak_bytes,
                "paged": prediction.paged_bytes,
                "host_ram": prediction.host_ram_bytes,
                "disk": prediction.disk_bytes,
            },
            parts=parts_of(prediction),
            peak_phase=prediction.peak_phase,
            largest_batch_size=self._largest("batch_size", usable, 1, MAX_BATCH),
            largest_seq_len=self._largest("seq_len", usable, SEQ_STEP, top),
            calibration=prediction.profile.name,
            borrowed=prediction.profile.borrowed,
            step_time_s=None if speed is None else speed.step_s,
            tokens_per_s=None if speed is None else speed.tokens_per_s,
            extrapolated=speed is not None and speed.source == EXTRAPOLATED,
            price_per_hour=price,
        )

    def _largest(self, name: str, usable: int | None, step: int, top: int) -> int | None:
        """The largest value of a field of the job that fits; None if not even the smallest does."""
        own: int = getattr(self.job, name)
        if usable is None:
            return None

        def peak(value: int) -> int:
            return self._peak(name, value)

        start = own if peak(own) <= usable else min(step, own)
        if peak(start) > usable:
            return None
        slope = (self.headline.peak_allocated_bytes - self.headline.ready_bytes) / own
        return search_largest(peak, usable, start, top, step, slope)

    def _peak(self, name: str, value: int) -> int:
        if (name, value) not in self._peaks:
            job = self.job.but(**{name: value})
            like = None if job == self.job else self.headline
            tried = self.headline if like is None else predict(self.model, job, self.gpu, like=like)
            self._peaks[name, value] = tried.device_peak_bytes
        return self._peaks[name, value]


def parts_of(prediction: Prediction) -> dict[str, int]:
    """Where the bytes of the device peak go, in bytes; they sum to it.

    Kinds of allocated memory at the allocated peak, then what the allocator caches beside them,
    the context with loaded kernels, and paged optimizer state.
    """
    parts = {kind.value: size for kind, size in prediction.breakdown().items()}
    parts[CACHED] = prediction.peak_reserved_bytes - prediction.peak_allocated_bytes
    parts[CONTEXT] = prediction.process_bytes
    parts[PAGED] = prediction.device_peak_bytes - sum(parts.values())
    return {name: size for name, size in parts.items() if size}
