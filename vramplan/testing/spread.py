"""Spreading xdist's workers over the GPUs of a machine."""

from __future__ import annotations

import os
import re
import sys

from vramplan.errors import EnvironmentProblem, UsageError
from vramplan.measure.machine import Machine


def choose_gpu(worker: str) -> None:
    """Leave this process one GPU: worker n that of number n modulo their count.

    Args:
        worker: Xdist's name of it, such as "gw3".

    Raises:
        UsageError: If CUDA has been begun already, so that it is too late.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UsageError("--vram-spread: a conftest.py used CUDA before the GPU could be chosen")
    try:
        machine = Machine()
    except EnvironmentProblem:
        return  # said by the tests that need it
    count = machine.count()
    number = re.search(r"\d+$", worker)
    if count and number:
        os.environ["CUDA_VISIBLE_DEVICES"] = machine.device(int(number[0]) % count).uuid
