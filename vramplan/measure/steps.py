"""The stock Trainer on one job, with its memory read at every step."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.quantizers import AutoHfQuantizer

from vramplan.job import Job

SCHEMA_VERSION = 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STACK_DEPTH = 14


# -- the model -----------------------------------------------------------------------------------


def build_model(config: dict[str, Any], job: Job, device: torch.device) -> Any:
    """A model as ``from_pretrained`` would hand it over, with random weights.

    Args:
        config: Values of a config.json.
        job: Method, dtype, quantisation and attention.
        device: Where its weights go.
    """
    values = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
    hf_config = AutoConfig.for_model(**values)
    options: dict[str, Any] = {"dtype": DTYPES[job.dtype]}
    if job.attn_implementation:
        options["attn_implementation"] = job.attn_implementation
    if not job.quantised:
        with device:
            return AutoModelForCausalLM.from_config(hf_config, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, **options)
    settings = quantization_config(job)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    for module in model.modules():
        _materialise(module, DTYPES[job.dtype], device)
    model.tie_weights()
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = settings.quant_method
    model.is_loaded_in_4bit = job.quant_type != "int8"
    model.is_loaded_in_8bit = job.quant_type == "int8"
    model.config.quantization_config = settings
    if device.type == "cuda":
        model.hf_device_map = {"": device.index or 0}
    return model


def quantization_config(job: Job) -> BitsAndBytesConfig:
    """The job's BitsAndBytesConfig."""
    if job.quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.quant_type,
        bnb_4bit_use_double_quant=job.double_quant,
        bnb_4bit_compute_dtype=DTYPES[job.compute_dtype.name],
    )


def _materialise(module: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Give one module's own parameters and buffers random contents, quantising as it goes."""
    import bitsandbytes as bnb  # noqa: PLC0415 - only quantised runs need it

    for name, param in list(module.named_parameters(recurse=False)):
        kind = type(param).__name__
        if kind in ("Params4bit", "Int8Params"):
            shape = (module.out_features, module.in_features)
            weight = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02)
            options = {k: v for k, v in param.__dict__.items() if k not in ("SCB", "CB")}
            if kind == "Params4bit":
                options["module"] = module
                new = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(device)
            else:
                new = bnb.nn.Int8Params(weight, requires_grad=False, **options)._quantize(device)
            del weight
        else:
            value = torch.empty(param.shape, dtype=dtype, device=device)
            if param.dim() > 1:
                value.normal_(0.0, 0.02)
            else:
                value.fill_(1.0 if name == "weight" else 0.0)
            new = torch.nn.Parameter(value, requires_grad=param.requires_grad)
        setattr(module, name, new)
    for name, buffer in list(module.named_buffers(recurse=False)):
        value = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
        module.register_buffer(name, value, persistent=False)


def prepare(model: Any, job: Job) -> Any:
    """Peft's part: k-bit preparation and the adapters."""
    if job.method == "full":
        return model
    from peft import (  # noqa: PLC0415 - full fine-tuning does not need it
        LoraConfig,
        get_peft_model,
        prepare_model_for_kbit_training,
    )

    if job.quantised and job.prepare_kbit:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=job.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    targets = job.target_modules
    return get_peft_model(
        model,
        LoraConfig(
            r=job.lora_r,
            lora_alpha=2 * job.lora_r,
            lora_dropout=job.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=list(job.modules_to_save) or None,
            task_type="CAUSAL_LM",
        ),
    )


class RandomTokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):  # type: ignore[misc]
    """Sequences of random tokens, all of the same length, labels equal to inputs."""

    def __init__(self, count: int, length: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocab_size, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()}


# -- reading the device --------------------------------------------------------------------------


class Gauge:
    """Memory readings; on a machine without a GPU every one of them is None."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.handle: Any = None
        if self.cuda:
            torch.cuda.init()
            with contextlib.suppress(Exception):
                import pynvml  # noqa: PLC0415

                pynvml.nvmlInit()
                self.handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())

    def allocated(self) -> int | None:
        """Torch's memory_allocated, in bytes."""
        return torch.cuda.memory_allocated() if self.cuda else None

    def device_used(self) -> int | None:
        """What the driver counts as used on the card, in bytes."""
        if not self.cuda:
            return None
        free, total = torch.cuda.mem_get_info()
        return int(total) - int(free)

    def identity(self) -> dict[str, Any]:
        """Name, driver, size and capability of the card."""
        if not self.cuda:
            return {"name": None, "driver": None, "total_bytes": None, "compute_capability": None}
        driver = None
        if self.handle is not None:
            import pynvml  # noqa: PLC0415

            driver = pynvml.nvmlSystemGetDriverVersion()
        major, minor = torch.cuda.get_device_capability()
        return {
            "name": torch.cuda.get_device_name(),
            "driver": driver,
            "total_bytes": torch.cuda.mem_get_info()[1],
            "compute_capability": f"{major}.{minor}",
        }


class StepWatch(TrainerCallback):  # type: ignore[misc]
    """Reads the allocator around every optimizer step."""

    def __init__(self, gauge: Gauge, record: dict[str, Any], history: bool) -> None:
        self.gauge = gauge
        self.record = record
        self.history = history
        self.steps: list[dict[str, Any]] = []
        self.began = 0.0
        self.marks: list[int] = []

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """The model is prepared, the optimizer has no state yet."""
        gc.collect()
        self.record["ready_bytes"] = self.gauge.allocated()
        self.record["phase"] = "train"
        if self.history and self.gauge.cuda:
            torch.cuda.memory._record_memory_history(
                enabled="all", context="alloc", stacks="python", max_entries=2_000_000
            )

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Restart the peaks."""
        self.marks.append(time.time_ns() // 1000)
        if self.gauge.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start_event = torch.cuda.Event(enable_timing=True)
            self.start_event.record()
        self.before = self.gauge.allocated()
        self.began = time.perf_counter()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Note the step's peaks and time."""
        step: dict[str, Any] = {"begin_allocated_bytes": self.before}
        if self.gauge.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            step |= {
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
                "peak_requested_bytes": stats["requested_bytes.all.peak"],
                "num_alloc_retries": stats["num_alloc_retries"],
                "device_used_bytes": self.gauge.device_used(),
                "time_s": self.start_event.elapsed_time(end) / 1000,
            }
        else:
            step["time_s"] = time.perf_counter() - self.began
        self.steps.append(step)


# -- one run -------------------------------------------------------------------------------------


def run(spec: dict[str, Any], record: dict[str, Any]) -> None:
    """Build, prepare and train; fills ``record`` as it goes."""
    job = Job.from_dict(spec["job"])
    gauge = Gauge()
    record["gpu"] = gauge.identity()
    record["context_bytes"] = gauge.device_used()
    device = (
        torch.device("cuda", torch.cuda.current_device()) if gauge.cuda else torch.device("cpu")
    )
    record["phase"] = "load"
    model = build_model(spec["config"], job, device)
    gc.collect()
    record["after_load_bytes"] = gauge.allocated()
    record["phase"] = "prepare"
    model = prepare(model, job)
    gc.collect()
    if gauge.cuda and spec.get("limit_bytes"):
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(spec["limit_bytes"] / total)
    steps = spec.get("steps", 3)
    watch = StepWatch(gauge, record, bool(spec.get("history")))
    record["steps"] = watch.steps
    with tempfile.TemporaryDirectory(prefix="vramplan-") as folder:
        trainer = Trainer(
            model=model,
            args=arguments(job, steps, folder, gauge.cuda),
            train_dataset=RandomTokens(
                steps * job.gradient_accumulation_steps * job.batch_size,
                job.seq_len,
                model.config.vocab_size,
            ),
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    record["status"] = "done"
    record["host_rss_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record["reserved_at_end_bytes"] = torch.cuda.memory_reserved() if gauge.cuda else None
    record["device_used_at_end_bytes"] = gauge.device_used()
    record |= optimizer_facts(trainer.optimizer)
    record["num_trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if watch.history and gauge.cuda:
        record["marks_us"] = watch.marks
    later = [s["peak_allocated_bytes"] for s in watch.steps[1:] if "peak_allocated_bytes" in s]
    record["peak_allocated_bytes"] = max(later) if later else None
    reserved = [s["peak_reserved_bytes"] for s in watch.steps if "peak_reserved_bytes" in s]
    record["peak_reserved_bytes"] = max(reserved) if reserved else None


def arguments(job: Job, steps: int, folder: str, cuda: bool) -> TrainingArguments:
    """The job in Trainer's words; everything else stays at its default."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        gradient_checkpointing=job.gradient_checkpointing,
        gradient_checkpointing_kwargs=(
            {"use_reentrant": False} if job.gradient_checkpointing else None
        ),
        bf16=job.mixed_precision == "bf16",
        fp16=job.mixed_precision == "fp16" and cuda,
        optim=job.optimizer_name,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not cuda,
    )


def optimizer_facts(optimizer: Any) -> dict[str, Any]:
    """Bytes of the optimizer's state on the device and in managed memory, and how many tensors."""
    inner = getattr(optimizer, "optimizer", optimizer)
    device = paged = num_paged = 0
    seen: set[int] = set()
    for state in inner.state.values():
        for value in state.values():
            if not torch.is_tensor(value) or id(value) in seen:
                continue
            seen.add(id(value))
            nbytes = value.numel() * value.element_size()
            if getattr(value, "is_paged", False):
                paged += nbytes
                num_paged += 1
            elif value.is_cuda:
                device += nbytes
    return {
        "optimizer_bytes": device,
        "paged_bytes": paged,
        "num_paged_tensors": num_paged,
    }


def write_history(path: Path, record: dict[str, Any]) -> None:
    """Save the allocator's trace: actions, sizes, times and the innermost Python frames."""
    strings: dict[str, int] = {}
    stacks: dict[tuple[int, ...], int] = {}
    events = []
    for entry in torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]:
        key = tuple(strings.setdefault(name, len(strings)) for name in _frames(entry))
        stack = stacks.setdefault(key, len(stacks))
        events.append([entry["action"], entry["addr"], entry["size"], stack, entry["time_us"]])
    document = {
        "schema_version": SCHEMA_VERSION,
        "record": record,
        "strings": list(strings),
        "stacks": list(stacks),
        "events": events,
    }
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(document, file)


def _frames(entry: dict[str, Any]) -> Iterator[str]:
    count = 0
    for frame in entry.get("frames") or ():
        name = frame["filename"]
        if count < STACK_DEPTH and ("-packages/" in name or "vramplan" in name):
            count += 1
            yield f"{name.rsplit('-packages/', 1)[-1]}:{frame['line']}:{frame['name']}"
