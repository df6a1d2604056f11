"""A small fine-tuning program, as users write them, and regressions that can be planted in it."""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

BATCH, SEQ_LEN, STEPS, VOCAB = 4, 512, 5, 32000
LAYERS, HIDDEN, GUILTY = 8, 1024, 5
PLANTS = (
    "logits_copy",  # a cap on the logits keeps one more full-size copy for backward
    "unchecked_layer",  # checkpointing is off in one layer
    "fp32_adapter",  # the adapter is kept in fp32
    "extra_state",  # the optimizer holds one more state
    "leak",  # 1 % of the peak stays behind each step
    "kbit",  # prepare_model_for_kbit_training was left in
    "load_doubled",  # loading holds the weights twice
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAK = 1024**3  # about what a step takes; what leaks and grows is a share of it


def plant() -> str:
    """What is planted now."""
    return os.environ.get("PLANT", "")


def grown() -> float:
    """Share of the peak that is held on top of everything while a step runs."""
    return float(os.environ.get("GROWN", "0"))


def make_checkpoint(folder: str) -> None:
    """A checkpoint with random weights."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def build(folder: str) -> torch.nn.Module:
    """The checkpoint, quantised, with an adapter."""
    options = {"dtype": torch.bfloat16, "device_map": {"": DEVICE}}
    whole = None
    if plant() == "load_doubled":
        whole = AutoModelForCausalLM.from_pretrained(folder, **options)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, **options)
    del whole
    if plant() == "kbit":
        model = prepare_model_for_kbit_training(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if plant() == "unchecked_layer":
        model.model.layers[GUILTY].gradient_checkpointing = False
    model.config.use_cache = False
    lora = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=plant() == "fp32_adapter")
    model.train()
    if plant() == "logits_copy":
        base = model.get_base_model()
        loss_function = base.loss_function
        base.loss_function = lambda logits, *args, **kwargs: loss_function(
            30 * torch.tanh(logits / 30), *args, **kwargs
        )
    return model


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=1e-4, fused=DEVICE == "cuda", amsgrad=plant() == "extra_state"
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list:
    """Some steps on random tokens; returns what a leak left behind."""
    kept = []
    for _ in range(steps):
        held = torch.empty(int(grown() * PEAK), dtype=torch.uint8, device=DEVICE)
        tokens = torch.randint(VOCAB, (BATCH, SEQ_LEN), device=DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if plant() == "leak":
            kept.append(torch.empty(PEAK // 100, dtype=torch.uint8, device=DEVICE))
        del held, loss, tokens
    return kept
