"""One run of the stock Trainer, from the bare context to the last step."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from vramplan.evaluate import num_samples
from vramplan.job import Job
from vramplan.measure.build import RandomTokens, build_model, load_checkpoint, prepare
from vramplan.measure.gauge import Gauge, PhaseBook
from vramplan.measure.history import HistoryTap
from vramplan.measure.paging import PagingTap, PagingUnavailableError, guard_managed_memory
from vramplan.measure.rates import measure_rates
from vramplan.measure.spec import RunSpec
from vramplan.measure.watch import StepWatch
from vramplan.optimizers import PAGED_MIN_NUMEL

_CPU_REQUEST = re.compile(r"you tried to allocate (\d+) bytes")


class Run:
    """One run; ``record`` is filled as it goes, so that whatever ends it, something is kept.

    Args:
        spec: What to run.
        record: The record's JSON form.
        folder: A folder for checkpoints, removed by whoever made it.
        progress: Called when something worth keeping is known.
    """

    def __init__(
        self,
        spec: RunSpec,
        record: dict[str, Any],
        folder: str,
        progress: Callable[[], None],
    ) -> None:
        self.spec, self.record, self.folder, self.progress = spec, record, folder, progress
        self.device = _device(spec)
        self.gauge = Gauge(self.device)
        self.book = PhaseBook(self.gauge)
        self.watch: StepWatch | None = None
        self.history: HistoryTap | None = None
        self.modules: dict[int, str] = {}
        self.failed_request: int | None = None

    def perform(self) -> None:
        """Build, prepare and train.

        Raises:
            torch.OutOfMemoryError: If the memory (or its limit) does not suffice.
        """
        self._identify()
        self._limit()
        if self.spec.job.optimizer.paged and self.gauge.cuda:
            guard_managed_memory()
        paging = self._start_paging()
        if self.spec.history:
            self.history = HistoryTap(self.gauge, self.book, self.spec.job.allocator_settings)
        model = self._load()
        model = self._prepare(model)
        trainer = self._trainer(model)
        assert self.watch is not None
        if self.history is not None:
            self.history.attach(self.watch, trainer, model)
        if paging is not None:
            paging.attach(self.watch)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        self.record["status"] = "done"
        self._finish(trainer, model)
        if paging is not None:
            self.record["paging"] = paging.finish(self.record)

    # -- the parts -------------------------------------------------------------------------------

    def _identify(self) -> None:
        self.record["times"] = {"began": time.monotonic()}
        gpu = self.record["gpu"]
        if self.gauge.cuda:
            major, minor = torch.cuda.get_device_capability()
            gpu |= {
                "name": torch.cuda.get_device_name(),
                "total_bytes": self.gauge.total(),
                "compute_capability": f"{major}.{minor}",
            }
        used = self.gauge.device_used()
        before = self.record.pop("card_before_bytes", None) or 0
        self.record["context_bytes"] = None if used is None else max(0, used - before)
        self.progress()

    def _limit(self) -> None:
        if self.spec.limit_bytes is None:
            return
        if self.gauge.cuda:
            total = self.gauge.total()
            assert total is not None
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.spec.limit_bytes / total))
            return
        # without a GPU the address space stands in for the card
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - Linux only
            pages = int(file.read().split()[0])
        top = pages * os.sysconf("SC_PAGESIZE") + self.spec.limit_bytes
        resource.setrlimit(resource.RLIMIT_AS, (top, top))

    def _start_paging(self) -> PagingTap | None:
        if not self.spec.paging:
            return None
        try:
            return PagingTap(self.device)
        except PagingUnavailableError as error:
            self.record["paging"] = {"measured": False, "reason": str(error)}
            return None

    def _load(self) -> Any:
        self._phase("load")
        job = self.spec.job
        if self.spec.weights is not None:
            model = load_checkpoint(self.spec.weights, job, self.device)
        else:
            model = build_model(dict(self.spec.config), job, self.device)
        gc.collect()
        self.record["after_load_bytes"] = self.gauge.allocated()
        self.book.close()
        self.record["load_peak_bytes"] = self.book.steady["load"].get("peak_allocated_bytes")
        self.progress()
        return model

    def _prepare(self, model: Any) -> Any:
        self._phase("prepare")
        model = prepare(model, self.spec.job)
        gc.collect()
        self.modules = {
            id(module): name.removeprefix("base_model.model.")
            for name, module in model.named_modules()
        }
        return model

    def _phase(self, name: str) -> None:
        self.record["phase"] = name
        self.book.enter(name)

    def _trainer(self, model: Any) -> Trainer:
        spec, job = self.spec, self.spec.job
        self.record["phase"] = "prepare"
        before_last = spec.num_steps - 1
        self.watch = StepWatch(
            self.book,
            self.record,
            evaluate_at=before_last if spec.evaluate else 0,
            save_at=before_last if spec.save else 0,
            progress=self.progress,
        )
        self.book.on_enter.append(self._note_phase)
        vocab_size = model.config.vocab_size
        keep_logits: dict[str, Any] = {"compute_metrics": lambda _: {}} if spec.eval_logits else {}
        trainer = Trainer(
            model=model,
            args=arguments(spec, self.folder, cuda=self.gauge.cuda),
            train_dataset=RandomTokens(
                spec.num_steps * job.gradient_accumulation_steps * job.batch_size,
                job.seq_len,
                vocab_size,
            ),
            eval_dataset=RandomTokens(num_samples(job.evaluated(spec)), job.seq_len, vocab_size)
            if spec.evaluate
            else None,
            data_collator=default_data_collator,
            callbacks=[self.watch],
            **keep_logits,
        )
        self.watch.attach(trainer, model)
        if self.gauge.cuda:
            torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)
        return trainer

    def _note_phase(self, phase: str) -> None:
        self.record["phase"] = phase

    def _finish(self, trainer: Trainer, model: Any) -> None:
        record = self.record
        record["times"]["trained"] = time.monotonic()
        record["reserved_at_end_bytes"] = self.gauge.reserved()
        record["device_used_at_end_bytes"] = self.gauge.device_used()
        self.keep_steps()
        if self.gauge.cuda:
            record |= optimizer_facts(trainer.optimizer)
        record["num_trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.progress()
        before = self.gauge.requested()
        if self.history is not None:
            self.history.stop()  # clears cuBLAS' workspaces too
        elif self.gauge.cuda:
            torch._C._cuda_clearCublasWorkspaces()
        after = self.gauge.requested()
        if before is not None and after is not None:
            record["cublas_workspace_bytes"] = before - after
        if self.spec.limit_bytes is None and not self.spec.history and not self.spec.paging:
            record["rates"] = measure_rates(self.device)

    def keep_steps(self) -> None:
        """Book what the finished steps showed; also after a run that failed half-way."""
        record, watch = self.record, self.watch
        record["host_rss_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if watch is None:
            record["phases"] = {
                name: dict(peaks) for name, peaks in self.book.steady.items() if name != "start"
            }
            return
        watch.finish()
        record["steps"] = watch.steps
        record["phases"] = watch.phases()
        if not watch.steps:
            return
        first, later = watch.steps[0], watch.steps[1:]
        for figure in ("allocated", "reserved"):
            key = f"peak_{figure}_bytes"
            record[f"first_step_{key}"] = first.get(key)
            if later:
                record[key] = _highest(later, key)
        if later:
            undisturbed = watch.steps[: watch.evaluate_at or watch.save_at or None]
            record["peak_reserved_bytes"] = _highest(undisturbed, "peak_reserved_bytes")
            record["peak_requested_bytes"] = _highest(later, "peak_requested_bytes")
            times = [step["time_s"] for step in later]
            job = self.spec.job
            tokens = job.tokens * job.gradient_accumulation_steps
            record["step_time_s"] = spread(times)
            record["tokens_per_s"] = spread([tokens / seconds for seconds in times])
        for key in ("num_alloc_retries", "num_ooms"):
            record[key] = watch.steps[-1].get(key)

    # -- out of memory ---------------------------------------------------------------------------

    def _out_of_memory(self, _device: int, requested: int, _used: int, _free: int) -> None:
        self.failed_request = requested

    def out_of_memory(self, error: BaseException) -> dict[str, Any]:
        """What is known of the allocation that failed."""
        requested = self.failed_request
        if requested is None:
            found = _CPU_REQUEST.search(str(error))
            requested = int(found[1]) if found else None
        module = where = None
        for frame, line in traceback.walk_tb(error.__traceback__):
            name = self.modules.get(id(frame.f_locals.get("self")))
            module = name or module
            file = frame.f_code.co_filename
            if "-packages/" in file:
                where = f"{file.rsplit('-packages/', 1)[1]}:{line}:{frame.f_code.co_name}"
        return {
            "phase": self.book.phase,
            "requested_bytes": requested,
            "module": module,
            "where": where,
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory did not suffice, on a card or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text or "alloc_failed" in text
    )


def _device(spec: RunSpec) -> torch.device:
    if spec.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; is this a CUDA build of torch?")
    return torch.device("cuda", torch.cuda.current_device())


def _highest(steps: list[dict[str, Any]], key: str) -> int | None:
    values = [step[key] for step in steps if step.get(key) is not None]
    return max(values, default=None)


def spread(values: list[float]) -> dict[str, float | int]:
    """Minimum, median and maximum of some values."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {
        "minimum": ordered[0],
        "median": median,
        "maximum": ordered[-1],
        "count": len(ordered),
    }


def arguments(spec: RunSpec, folder: str, *, cuda: bool) -> TrainingArguments:
    """The job in Trainer's words; everything else stays at its default."""
    job: Job = spec.job
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=spec.eval_batch_size,
        eval_accumulation_steps=spec.eval_accumulation_steps,
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        gradient_checkpointing=job.gradient_checkpointing,
        gradient_checkpointing_kwargs=(
            {"use_reentrant": False} if job.gradient_checkpointing else None
        ),
        bf16=job.mixed_precision == "bf16",
        fp16=job.mixed_precision == "fp16" and cuda,
        optim=job.optimizer_name,
        max_steps=spec.num_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not cuda,
    )


def optimizer_facts(optimizer: Any) -> dict[str, Any]:
    """Where the optimizer's state lies: on the card, in managed memory, or too small to be paged.

    Source:
        bitsandbytes 0.50.2 ``optim/optimizer.py``, ``get_state_buffer``: paged from 100,000
        elements of the parameter.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    facts = dict.fromkeys(
        ("optimizer_bytes", "paged_bytes", "num_paged_tensors", "unpaged_bytes",
         "num_unpaged_tensors"),
        0,
    )  # fmt: skip
    pages = bool(getattr(inner, "is_paged", False))
    for parameter, value in _state_tensors(inner):
        nbytes = value.numel() * value.element_size()
        if getattr(value, "is_paged", False):
            facts["paged_bytes"] += nbytes
            facts["num_paged_tensors"] += 1
            continue
        if value.is_cuda:
            facts["optimizer_bytes"] += nbytes
        if pages and value.shape == parameter.shape and parameter.numel() < PAGED_MIN_NUMEL:
            facts["unpaged_bytes"] += nbytes
            facts["num_unpaged_tensors"] += 1
    return facts


def _state_tensors(optimizer: Any) -> Iterator[tuple[Any, Any]]:
    seen: set[int] = set()
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if torch.is_tensor(value) and id(value) not in seen:
                seen.add(id(value))
                yield parameter, value
