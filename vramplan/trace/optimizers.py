"""The optimizer that Trainer would make, as it works on CUDA.

Source: transformers 5.17.0 ``trainer.py`` (``create_optimizer``, ``get_decay_parameter_names``),
``trainer_optimizer.py``; torch ``optim/optimizer.py`` (``_default_to_fused_or_foreach``).
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainingArguments

from vramplan.job import Job


def make_optimizer(model: Any, job: Job) -> Any:
    """Trainer's optimizer for a model, decayed and other parameters in groups of their own.

    Args:
        model: The model; its trainable parameters are what the optimizer updates.
        job: The job, which names the optimizer.
    """
    arguments = TrainingArguments(
        output_dir="unused", optim=job.optimizer_name, use_cpu=True, report_to="none",
        save_strategy="no",
    )  # fmt: skip
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n in decayed], "weight_decay": 0.0},
        {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
    ]
    if job.optimizer.library == "torch" and not options.get("fused"):
        options = {**options, "foreach": True}  # what CUDA tensors get by default
    optimizer = made(groups, **options)
    if job.optimizer.library == "bitsandbytes" and "8bit" in job.optimizer_name:
        _keep_embeddings_in_32_bits(model, optimizer)
    return optimizer


def _keep_embeddings_in_32_bits(model: Any, optimizer: Any) -> None:
    """Trainer.create_optimizer: 8-bit optimizers keep embeddings' state in 32 bits."""
    import bitsandbytes  # noqa: PLC0415 - only its optimizers need it
    import torch  # noqa: PLC0415

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
