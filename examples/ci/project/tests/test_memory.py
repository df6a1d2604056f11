"""What our fine-tune may take: a job, our own loop, and what an epoch leaves behind."""

import pytest
import torch
import train

MIB = 1024**2


@pytest.mark.limit_vram("11.5 GiB", kind="device")
def test_gpt_j_fits_12_gb(vram):
    vram.run("gpt-j-6b", method="qlora", batch_size=3, seq_len=1024, steps=3)


@pytest.mark.limit_vram("9 GiB")
def test_our_loop(vram):
    model = train.build()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with vram.measure("train"):
        train.train(model, optimizer)


def test_a_second_epoch_needs_no_more(vram):
    model = train.build()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    train.train(model, optimizer)  # the first step makes the optimizer's state
    with vram.measure("second epoch") as region:
        train.train(model, optimizer)
    assert region.leaked_bytes < 1 * MIB, region.left
