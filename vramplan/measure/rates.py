"""What the card achieves in three small loops, read after a run: the time model's raw material."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

MATRIX = 4096
THIN = 512
COPY_BYTES = 256 * 1024**2
NUM_LAUNCHES = 50
NUM_LOOPS = 10
NEEDED_BYTES = 4 * COPY_BYTES


def measure_rates(device: torch.device) -> dict[str, float] | None:
    """Launch overhead, matrix rates and copy bandwidth.

    Args:
        device: The card; its caches should be empty.

    Returns:
        ``launch_overhead_s`` (seconds per small operation launched from Python), matrix rates in
        operations per second for each dtype the card has units for (and for a thin product), and
        ``copy_bytes_per_s`` (bytes read plus bytes written). None where there is not enough room,
        or no GPU.

    Known limitations:
        One square matrix size: smaller or thinner products achieve less.
    """
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        return None
    try:
        rates = {"launch_overhead_s": _launch_overhead(device)}
        dtypes = {"fp16": torch.float16}
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtypes["bf16"] = torch.bfloat16
        for name, dtype in dtypes.items():
            a = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
            b = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
            seconds = _seconds(lambda a=a, b=b: a @ b, 20)  # type: ignore[misc]
            rates[f"{name}_flops_per_s"] = 2 * MATRIX**3 / seconds
            seconds = _seconds(lambda a=a[:THIN], b=b: a @ b, 20)  # type: ignore[misc]
            rates["thin_flops_per_s"] = 2 * THIN * MATRIX**2 / seconds
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        rates["copy_bytes_per_s"] = 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), 20)
    except torch.OutOfMemoryError:
        return None
    return rates


def _launch_overhead(device: torch.device) -> float:
    """Seconds that Python, torch and the driver take to launch one small operation.

    The median of some loops: a moment in which the host was busy elsewhere is no pace.
    """
    one = torch.ones(1, device=device)
    for _ in range(50):
        one.add_(1)
    loops = []
    for _ in range(NUM_LOOPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(NUM_LAUNCHES):
            one.add_(1)
        loops.append((time.perf_counter() - began) / NUM_LAUNCHES)
    torch.cuda.synchronize()
    return statistics.median(loops)


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Seconds of one call on the GPU, after warming up."""
    for _ in range(3):
        work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / repeats
