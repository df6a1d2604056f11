"""``--explain``: each term with its formula in the model's own numbers, and where it comes from.

The sizes are the timeline's; the formulas say how they come about.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from vramplan.families import find_family
from vramplan.model import LinearSpec, Model, TracedModel
from vramplan.prediction import Prediction
from vramplan.timeline import Kind, Peak
from vramplan.units import format_bytes

MAX_OWNERS = 12


def print_explanation(out: Console, prediction: Prediction) -> None:
    """Print the terms of the peak, then its largest owners; of a trace the owners alone."""
    parts = prediction.breakdown()
    out.print()
    if isinstance(prediction.model, TracedModel):
        print_owners(out, prediction.peak())
        return
    out.print(Text("Where each term comes from", style="bold"))
    for kind, size in sorted(parts.items(), key=lambda item: -item[1]):
        out.print(f"{kind.value.replace('_', ' ')}: {format_bytes(size)}")
        for line in _formula(kind, prediction):
            out.print(Text("  " + line, style="dim"))
    out.print(f"sum: {format_bytes(sum(parts.values()))} = peak allocated")
    out.print()
    print_owners(out, prediction.peak())
    family = find_family(prediction.model.family)
    out.print(Text(f"Block program: {family.source}", style="dim"))


def print_owners(out: Console, peak: Peak) -> None:
    """The largest owners at the peak."""
    out.print(Text("Largest owners at the peak", style="bold"))
    owners = sorted(peak.by_owner.items(), key=lambda item: -item[1])
    for owner, size in owners[:MAX_OWNERS]:
        out.print(f"{format_bytes(size):>12}  {owner}")


def _formula(kind: Kind, prediction: Prediction) -> list[str]:
    model, job = prediction.model, prediction.job
    assert isinstance(model, Model)
    d = model.dims
    tokens = f"{job.batch_size} x {job.seq_len}"
    arch = model.architecture
    modules = [*arch.outside, *(m for kind in d.kinds for m in arch.block_of(kind))]
    linears = [m for m in modules if isinstance(m, LinearSpec) and m.quantisable]
    weights = sum(m.in_features * m.out_features for m in linears)
    if kind is Kind.WEIGHTS:
        if not job.quantised:
            return [
                f"{model.num_parameters:,} parameters x {job.weight_dtype.size} bytes "
                f"({job.dtype}), each tensor rounded up to 512 bytes"
            ]
        plain = "fp32 after prepare_model_for_kbit_training" if job.prepare_kbit else job.dtype
        return [
            f"{weights:,} weights of {len(linears)} linear layers in "
            f"{job.quant_type}, with their scales",
            f"{model.num_parameters - weights:,} others (embedding, head, norms, biases) in "
            + plain,
            "source: bitsandbytes functional.py quantize_4bit; peft utils/other.py",
        ]
    texts = {
        Kind.ADAPTERS: [
            f"{prediction.estimate.num_trainable:,} trainable parameters, rank {job.lora_r}, fp32 "
            "(peft autocast_adapter_dtype)"
        ],
        Kind.OPTIMIZER: [
            f"{job.optimizer_name}: {job.optimizer.num_states} state(s) of "
            f"{prediction.estimate.num_trainable:,} parameters; on top, paged to managed memory: "
            f"{format_bytes(prediction.paged_bytes)}"
        ],
        Kind.GRADIENTS: [".grad of trainable parameters, in each parameter's dtype"],
        Kind.ACTIVATIONS: [
            f"inputs of {d.num_layers} checkpointed layers, {tokens} x {d.hidden_size} each, and "
            "the layer being recomputed"
            if job.gradient_checkpointing
            else f"what {d.num_layers} layers keep for backward at {tokens} tokens"
        ],
        Kind.LOGITS: [
            f"copies of {tokens} x {d.vocab_size} logits: fp32 log-probabilities and gradients in "
            "backward, 16-bit and fp32 logits in the loss; the head's weight cast by autocast",
            "source: transformers loss/loss_utils.py; accelerate convert_outputs_to_fp32",
        ],
        Kind.WORKSPACE: [
            "cuBLAS workspaces of the forward and the backward thread; weights dequantised inside "
            "an operation; optimizer temporaries"
        ],
        Kind.ACTIVATION_GRADIENTS: ["gradients of activations on their way down"],
        Kind.BATCH: ["token ids, labels, masks and positions"],
        Kind.ROUNDING: ["unsplit remainders of reused allocator blocks (allocator replay)"],
    }
    return texts.get(kind, [])
