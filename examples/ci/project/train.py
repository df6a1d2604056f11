"""A fine-tune as one might write it: GPT-2 with an adapter, in a loop of its own."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config


def build():
    """A model to train; random weights, so that a test downloads nothing."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(GPT2Config(), dtype=torch.bfloat16)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def train(model, optimizer, num_steps=4, batch_size=8, seq_len=512):
    """Some steps; returns their losses."""
    losses = []
    for _ in range(num_steps):
        tokens = torch.randint(50257, (batch_size, seq_len), device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
