"""The Record: what one measured run left behind, whatever way it ended.

A record is one JSON file. Sizes are bytes, times seconds; null means "not measured". Fields may be
added within a schema version; a file of a newer version is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vramplan.errors import RecordError
from vramplan.files import check_schema, read_json, write_text

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 16 * 1024**2
MAX_BYTES = 2**80  # beyond every search for a limit, and still a float

Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Status = Literal["done", "oom", "error", "killed", "timeout", "skipped"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Card(_Part):
    """The card of a run; every field is None on a machine without one.

    Attributes:
        name: Product name as the driver says it.
        slug: Its name in our catalogue, None if it is not there.
        driver: Version of the driver.
        total_bytes: What CUDA reports as the card's memory.
        nvml_total_bytes: What nvidia-smi reports, the driver's own reserve included.
        compute_capability: Such as "9.0".
    """

    name: str | None = None
    slug: str | None = None
    driver: str | None = None
    total_bytes: Bytes | None = None
    nvml_total_bytes: Bytes | None = None
    compute_capability: str | None = None


class Conditions(_Part):
    """How the job was run.

    Attributes:
        device: "cuda" or "cpu".
        num_steps: Optimizer steps.
        limit_bytes: Most the allocator might reserve; None without a limit.
        emulated_gpu: Slug of the card that the limit stands for.
        weights: "random", or the name of the checkpoint folder.
        evaluate: Whether it evaluated before its last step.
        eval_batch_size: Sequences per evaluation batch.
        eval_logits: Whether evaluation kept the logits, as a compute_metrics function makes it.
        eval_accumulation_steps: Batches after which they left the card; null for never.
        eval_samples: Sequences evaluated; null for two batches.
        save: Whether it saved a checkpoint before its last step.
        history: Whether the allocator's history was recorded.
        paging: Whether paging events were counted.
        timeout_s: Seconds after which it would have been killed.
    """

    device: str = "cuda"
    num_steps: int = 0
    limit_bytes: Bytes | None = None
    emulated_gpu: str | None = None
    weights: str = "random"
    evaluate: bool = False
    eval_batch_size: int | None = None
    eval_logits: bool = False
    eval_accumulation_steps: int | None = None
    eval_samples: int | None = None
    save: bool = False
    history: bool = False
    paging: bool = False
    timeout_s: float | None = None


class OutOfMemory(_Part):
    """The allocation that failed.

    Attributes:
        phase: Phase of the run.
        requested_bytes: What was asked for.
        module: Name of the innermost module at work, None if none was.
        where: File, line and function that asked.
    """

    phase: str
    requested_bytes: Bytes | None = None
    module: str | None = None
    where: str | None = None


class PhasePeak(_Part):
    """The fullest moment of one phase over all steps after the first (or of a one-time phase)."""

    peak_allocated_bytes: Bytes | None = None
    peak_reserved_bytes: Bytes | None = None


class Step(_Part):
    """One optimizer step: its peaks, and its time between CUDA events."""

    time_s: float | None = None
    begin_allocated_bytes: Bytes | None = None
    peak_allocated_bytes: Bytes | None = None
    peak_reserved_bytes: Bytes | None = None
    peak_requested_bytes: Bytes | None = None
    num_alloc_retries: int | None = None
    num_ooms: int | None = None
    major_faults: int | None = None


class Spread(_Part):
    """A quantity seen several times."""

    minimum: float
    median: float
    maximum: float
    count: int


class Sampling(_Part):
    """What NVML showed while the run went on, sampled from outside its process.

    Attributes:
        interval_s: Seconds between samples.
        count: Samples taken.
        process_peak_bytes: Most that the run's process held; None where the driver does not tell
            processes apart (containers).
        card_peak_bytes: Most that was in use on the card.
        card_before_bytes: In use before the run.
        sm_clock_mhz, memory_clock_mhz, power_w, temperature_c: Over the samples while training.
        throttle_reasons: Every reason seen for clocks below the highest.
    """

    interval_s: float
    count: int
    process_peak_bytes: Bytes | None = None
    card_peak_bytes: Bytes | None = None
    card_before_bytes: Bytes | None = None
    sm_clock_mhz: Spread | None = None
    memory_clock_mhz: Spread | None = None
    power_w: Spread | None = None
    temperature_c: Spread | None = None
    throttle_reasons: list[str] = Field(default_factory=list)


class LimitSearch(_Part):
    """The bracket of the smallest allocator limit at which a job runs.

    Attributes:
        smallest_running_bytes: Smallest limit tried at which it ran.
        largest_failing_bytes: Largest limit tried at which it ran out of memory; None if none did.
        resolution_bytes: Distance that ended the search.
        tries: Every limit tried, in order, with the run's status.
    """

    smallest_running_bytes: Bytes
    largest_failing_bytes: Bytes | None = None
    resolution_bytes: Bytes
    tries: list[tuple[int, str]] = Field(default_factory=list)


class PagingWindow(_Part):
    """Unified-memory events of one stretch of a run ("step 2", "save", ...).

    Attributes:
        window: Which stretch.
        host_to_device_bytes: Moved to the card, by cause.
        device_to_host_bytes: Moved to the host, by cause.
        gpu_fault_groups: Faults on the card, grouped by page as CUPTI counts them.
        cpu_faults: Faults of the CPU on pages that were on the card.
        thrashing: Thrashing events.
        major_faults: Rise of the process's ``ru_majflt``, a cross-check of cpu_faults.
        note: What is known to be missing from the counts; None if nothing is.
    """

    window: str
    host_to_device_bytes: dict[str, Bytes] = Field(default_factory=dict)
    device_to_host_bytes: dict[str, Bytes] = Field(default_factory=dict)
    gpu_fault_groups: int = 0
    cpu_faults: int = 0
    thrashing: int = 0
    major_faults: int | None = None
    note: str | None = None


class Paging(_Part):
    """Paging events, or why they were not measured (never a silent zero).

    Attributes:
        measured: Whether the counts can be trusted: both canaries were seen exactly.
        reason: Why not.
        canary_bytes: Size of the buffer moved there and back before and after.
        windows: Events by stretch of the run; empty when not measured.
    """

    measured: bool
    reason: str | None = None
    canary_bytes: Bytes | None = None
    windows: list[PagingWindow] = Field(default_factory=list)


class Record(_Part):
    """One run.

    Attributes:
        schema_version: Version of this format.
        name: Name of the run.
        command: What was typed.
        created: When it ended, UTC, ISO 8601.
        commit: Git commit of the working directory, None outside one.
        model: What the user called the model.
        config: Values of its config.json.
        job: Fields of ``vramplan.job.Job``, defaults resolved.
        run: How it was run.
        versions: Python, vramplan, torch and the libraries.
        allocator_settings: PYTORCH_ALLOC_CONF in force in the run, None when unset.
        gpu: The card.
        status: How it ended.
        phase: Where it was when it ended.
        error: Last lines of what went wrong; the reason, if skipped.
        oom: The allocation that failed.
        context_bytes: On the card once a CUDA context existed and nothing else did.
        after_load_bytes, load_peak_bytes: Allocated after and during the load.
        ready_bytes: Allocated when training was about to start.
        first_step_peak_allocated_bytes, first_step_peak_reserved_bytes: Of step 1.
        peak_allocated_bytes: Largest allocated in the training steps after the first.
        peak_reserved_bytes: Largest reserved in any training step before an evaluation or save,
            whose cached memory the later steps would show.
        peak_requested_bytes: As ``peak_allocated_bytes``, as the program asked, not rounded.
        reserved_at_end_bytes, device_used_at_end_bytes: Right after the last step.
        num_alloc_retries, num_ooms: The allocator's own counts at the end.
        phases: The peak of each phase.
        steps: Every step.
        step_time_s, tokens_per_s: Over the steps after the first.
        host_rss_peak_bytes: Largest resident host memory of the process.
        optimizer_bytes: Optimizer state on the card.
        paged_bytes, num_paged_tensors: Optimizer state in managed memory.
        unpaged_bytes, num_unpaged_tensors: State a paged optimizer keeps on the card, because its
            parameter has fewer elements than bitsandbytes pages.
        num_trainable: Trainable parameters.
        cublas_workspace_bytes: What clearing cuBLAS' workspaces gave back, as it was asked for.
        rates: What the card achieved in three small loops after the run (see ``measure.rates``).
        limit_search: The bracket of the smallest limit, where it was looked for; the figures are
            those of the run at that limit.
        sampling: NVML's view.
        paging: Paging events; None when they were not asked for.
        wall_s: Seconds the worker lived.
    """

    schema_version: int
    name: str
    command: str | None = None
    created: str | None = None
    commit: str | None = None
    model: str
    config: dict[str, Any]
    job: dict[str, Any]
    run: Conditions = Conditions()
    versions: dict[str, str | None] = Field(default_factory=dict)
    allocator_settings: str | None = None
    gpu: Card = Card()
    status: Status
    phase: str | None = None
    error: str | None = None
    oom: OutOfMemory | None = None
    context_bytes: Bytes | None = None
    after_load_bytes: Bytes | None = None
    load_peak_bytes: Bytes | None = None
    ready_bytes: Bytes | None = None
    first_step_peak_allocated_bytes: Bytes | None = None
    first_step_peak_reserved_bytes: Bytes | None = None
    peak_allocated_bytes: Bytes | None = None
    peak_reserved_bytes: Bytes | None = None
    peak_requested_bytes: Bytes | None = None
    reserved_at_end_bytes: Bytes | None = None
    device_used_at_end_bytes: Bytes | None = None
    num_alloc_retries: int | None = None
    num_ooms: int | None = None
    phases: dict[str, PhasePeak] = Field(default_factory=dict)
    steps: list[Step] = Field(default_factory=list)
    step_time_s: Spread | None = None
    tokens_per_s: Spread | None = None
    host_rss_peak_bytes: Bytes | None = None
    optimizer_bytes: Bytes | None = None
    paged_bytes: Bytes | None = None
    num_paged_tensors: int | None = None
    unpaged_bytes: Bytes | None = None
    num_unpaged_tensors: int | None = None
    num_trainable: int | None = None
    cublas_workspace_bytes: Bytes | None = None
    rates: dict[str, float] | None = None
    limit_search: LimitSearch | None = None
    sampling: Sampling | None = None
    paging: Paging | None = None
    wall_s: float | None = None

    @property
    def device_peak_bytes(self) -> int | None:
        """What the process held on the card right after its last step, others left out."""
        used = self.device_used_at_end_bytes
        if used is None:
            return None
        before = self.sampling.card_before_bytes if self.sampling else None
        return used - (before or 0)

    @property
    def beyond_reserved_bytes(self) -> int | None:
        """What of it the allocator had not reserved."""
        held, reserved = self.device_peak_bytes, self.reserved_at_end_bytes
        return None if held is None or reserved is None else held - reserved


def parse_record(document: Any, where: str) -> Record:
    """A record from its JSON form.

    Args:
        document: The parsed JSON.
        where: How to name it in errors.

    Raises:
        RecordError: If it is not a record, or of a newer version.
    """
    check_schema(document, SCHEMA_VERSION, where, "record")
    try:
        return Record.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{where} is not a usable record: {field}: {first['msg']}") from None


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: If it cannot be read, is too large, broken, or of a newer version.
    """
    return parse_record(read_json(path, MAX_RECORD_BYTES, "record"), str(path))


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all.

    Raises:
        EnvironmentProblem: If the disk is full or the folder cannot be written.
    """
    write_text(path, json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
