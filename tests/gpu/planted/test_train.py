"""What the program may take; run by ``tests/gpu/planted.py``."""

from __future__ import annotations

import train


def test_training(vram, checkpoint):
    with vram.measure("build"):
        model = train.build(checkpoint)
    optimizer = train.make_optimizer(model)
    with vram.measure("train"):
        kept = train.train(model, optimizer)
    del kept
