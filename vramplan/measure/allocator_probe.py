"""Plays request sequences through PyTorch's real caching allocator and writes what it did.

``python -m vramplan.measure.allocator_probe OUT.json.gz`` needs a GPU and about 6 GiB of its memory
for half a minute. Every sequence runs in a fresh process under every setting; the file keeps, after
each request, the block's address and what the allocator says it holds, every segment it took or
gave back, and its last snapshot. ``tests/unit/test_allocator_recorded.py`` plays the same requests
through ``vramplan.allocator`` and asks for the same numbers, to the byte.

Source: torch 2.11 ``torch/cuda/memory.py`` (``caching_allocator_alloc``, ``_snapshot``).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from vramplan.units import GIB, KIB, MIB

SCHEMA_VERSION = 1
MIN_BLOCK = 512
MAX_ENTRIES = 1_000_000
AT_ONCE = 3
EMPTY_CACHE = [0, 0]  # a request for no bytes by nobody
SETTINGS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:128",
    "max_split_size_mb:32",
    "garbage_collection_threshold:0.6",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "roundup_power2_divisions:[1:8,16:4,64:2,128:0]",
    "max_split_size_mb:64,max_non_split_rounding_mb:128",
    "max_split_size_mb:128,garbage_collection_threshold:0.6",
    "expandable_segments:True,roundup_power2_divisions:4",
    "expandable_segments:True,garbage_collection_threshold:0.6",
    "expandable_segments:True,max_split_size_mb:64",
    "large_segment_size_mb:40",
)

Requests = list[list[int]]  # [identity, bytes]: bytes allocate, none release; [0, 0] empties


class Script:
    """Writes a sequence of requests."""

    def __init__(self) -> None:
        self.requests: Requests = []
        self.count = 0

    def take(self, nbytes: int) -> int:
        """Allocate; returns the block's identity."""
        self.count += 1
        self.requests.append([self.count, nbytes])
        return self.count

    def drop(self, *blocks: int) -> None:
        """Release blocks in this order."""
        self.requests += ([block, 0] for block in blocks)

    def empty_cache(self) -> None:
        """Call ``torch.cuda.empty_cache``."""
        self.requests.append(EMPTY_CACHE)


def training() -> Requests:  # noqa: PLR0915 - one run, told in its order
    """Loading, then steps of growing and shrinking length with checkpoints, logits and updates."""
    script = Script()
    take, drop = script.take, script.drop
    layers, hidden, vocabulary = 6, 2048, 32_000
    for _ in range(layers):
        for rows in (hidden, 512, 512, hidden, 4 * hidden, 4 * hidden, 4 * hidden):
            whole = take(2 * rows * hidden)
            take(rows * hidden // 2)
            take(rows * hidden // 64)
            drop(whole)
        take(2 * hidden), take(2 * hidden)
    adapters = [4 * 16 * size for _ in range(layers) for size in (hidden, 512, 4 * hidden)]
    for size in adapters:
        take(size)
    script.empty_cache()
    state: list[int] = []
    for step, tokens in enumerate((512, 640, 512, 900, 768, 1024, 777)):
        ids = [take(8 * tokens) for _ in range(3)]
        carried = [take(2 * tokens * hidden)]
        for _ in range(layers):
            norm, query = take(4 * tokens * hidden), take(2 * tokens * hidden)
            key, value = take(2 * tokens * 512), take(2 * tokens * 512)
            scores = take(2 * 16 * tokens * tokens)
            drop(norm)
            mixed = take(2 * tokens * hidden)
            drop(scores, query, key, value)
            up, gate = take(8 * tokens * hidden), take(8 * tokens * hidden)
            down = take(2 * tokens * hidden)
            drop(up, gate, mixed)
            carried.append(down)
        logits = take(2 * tokens * vocabulary)
        wide = take(4 * tokens * vocabulary)
        chances = take(4 * tokens * vocabulary)
        gradient = take(4 * tokens * vocabulary)
        drop(chances, wide)
        narrow = take(2 * tokens * vocabulary)
        drop(gradient, logits)
        flow = take(2 * tokens * hidden)
        drop(narrow)
        gradients = []
        for layer in reversed(range(layers)):
            kept = [take(2 * tokens * size) for size in (hidden, 512, 512, 4 * hidden, 4 * hidden)]
            weight = take(8 * hidden * hidden)
            gradients += [take(size) for size in adapters[3 * layer : 3 * layer + 3]]
            drop(weight)
            drop(*kept[::2])
            next_flow = take(2 * tokens * hidden)
            drop(*kept[1::2])
            drop(flow, carried[layer + 1])
            flow = next_flow
        drop(flow, carried[0])
        if not step:
            state += [take(size) for size in adapters for _ in range(2)]
        scratch = [take(size) for size in adapters]
        drop(*scratch), drop(*gradients), drop(*ids)
        if step == 3:
            script.empty_cache()
    return script.requests


def mixture(seed: int, *, live_bytes: int, count: int, large: float) -> Requests:
    """Random sizes of 1 byte to 400 MiB, random releases, the cache emptied now and then.

    Args:
        seed: Of the random numbers.
        live_bytes: Most bytes asked for at once.
        count: Requests.
        large: Share of requests above 1 MiB.
    """
    script, choose = Script(), random.Random(seed)  # noqa: S311 - repeatable
    live: list[tuple[int, int]] = []
    common = [int(2 ** choose.uniform(10, 27)) for _ in range(12)]
    held = 0
    while len(script.requests) < count:
        if choose.random() < 0.004:
            script.empty_cache()
            continue
        kind = choose.random()
        if kind < 0.3:
            size = common[int(choose.random() * len(common))]
        elif kind < 0.3 + 0.7 * large:
            size = int(2 ** choose.uniform(20, 28.6))
        else:
            size = int(2 ** choose.uniform(0, 20.2))
        size = min(size, live_bytes // 2)
        while live and (held + size > live_bytes or choose.random() < 0.45):
            block, nbytes = live.pop(int(choose.random() * len(live)))
            held -= nbytes
            script.drop(block)
        live.append((script.take(size), size))
        held += size
    return script.requests


def sequences() -> dict[str, tuple[Requests, int | None]]:
    """Every sequence by name, with the limit it is played under."""
    return {
        "training": (training(), None),
        "training within 640 MiB": (training(), 640 * MIB),
        "mixture": (mixture(1, live_bytes=GIB, count=1200, large=0.5), None),
        "mixture within 1 GiB": (mixture(2, live_bytes=960 * MIB, count=1200, large=0.5), GIB),
        "small": (mixture(3, live_bytes=24 * MIB, count=700, large=0.02), None),
    }


def play(name: str, setting: str) -> dict[str, Any]:
    """Play one sequence through this process's allocator.

    Returns:
        ``fraction`` and ``total_bytes`` (the limit is their product), columns with one entry a
        request (``address`` of the block in units of 512 bytes from ``base``, null where there is
        none or it ran out of memory; ``allocated``, ``small`` and ``large``: changes of allocated
        bytes and of bytes reserved by the two pools; ``retries``: change of num_alloc_retries),
        ``segment_events`` ([requests before, action, address, bytes]) and ``segments``
        ([address, bytes, small, expandable, [[bytes, state], ...]]) of the last snapshot.
    """
    requests, limit = sequences()[name]
    if setting:
        torch._C._accelerator_setAllocatorSettings(setting)
    torch.cuda.init()
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = None if limit is None else limit / total
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction)
    torch.cuda.memory._record_memory_history(
        enabled="all", context=None, stacks="python", max_entries=MAX_ENTRIES
    )
    found: list[int | None] = []
    columns: dict[str, list[int]] = {key: [] for key in ("allocated", "small", "large", "retries")}
    before = dict.fromkeys(columns, 0)
    done: list[int] = []  # allocations and releases made so far, after each request
    actions = 0
    live: dict[int, int] = {}
    for block, nbytes in requests:
        address = None
        if nbytes:
            try:
                address = torch.cuda.caching_allocator_alloc(nbytes, device, stream)
                live[block] = address
                actions += 1
            except torch.cuda.OutOfMemoryError:
                pass
        elif not block:
            torch.cuda.empty_cache()
        elif block in live:
            torch.cuda.caching_allocator_delete(live.pop(block))
            actions += 1
        found.append(address)
        done.append(actions)
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        now = {
            "allocated": stats["allocated_bytes"]["all"]["current"],
            "small": stats["reserved_bytes"]["small_pool"]["current"],
            "large": stats["reserved_bytes"]["large_pool"]["current"],
            "retries": stats["num_alloc_retries"],
        }
        for key, column in columns.items():
            column.append(now[key] - before[key])
        before = now
    snapshot = torch.cuda.memory._snapshot()
    trace = snapshot["device_traces"][device]
    base = min(entry["addr"] for entry in trace if entry["action"].startswith("segment"))

    def place(address: int) -> int:
        units, rest = divmod(int(address - base), MIN_BLOCK)
        assert not rest, "the allocator's addresses are multiples of 512"
        return units

    events: list[list[int | str]] = []
    actions = 0
    for entry in trace:
        action = entry["action"]
        if action.startswith("segment"):
            events.append([actions, action, place(entry["addr"]), entry["size"]])
        elif action in ("alloc", "free_completed"):
            actions += 1
    return {
        "sequence": name,
        "setting": setting,
        "effective": snapshot.get("allocator_settings"),
        "total_bytes": total,
        "fraction": fraction,
        "oom": [n for n, request in enumerate(requests) if request[1] and found[n] is None],
        "address": [None if address is None else place(address) for address in found],
        **columns,
        "segment_events": events,
        "segments": [
            [
                place(segment["address"]),
                segment["total_size"],
                segment["segment_type"] == "small",
                segment.get("is_expandable", False),
                [[block["size"], block["state"]] for block in segment["blocks"]],
            ]
            for segment in snapshot["segments"]
        ],
    }  # fmt: skip


def _fork(name: str, setting: str, out: Path) -> None:
    """Play a sequence in a child of this process, which has not touched the GPU."""
    if os.fork() == 0:
        try:
            result = play(name, setting)
        except BaseException:  # a setting that this torch does not have, for one
            result = {"sequence": name, "setting": setting, "error": traceback.format_exc()[-1500:]}
        out.write_text(json.dumps(result), encoding="utf-8")
        os._exit(0)


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        return told.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main() -> None:
    """Record everything and write the file."""
    parser = argparse.ArgumentParser(prog="python -m vramplan.measure.allocator_probe")
    parser.add_argument("output", type=Path, help="file to write (.json.gz)")
    parser.add_argument("--only", help="play this sequence alone")
    arguments = parser.parse_args()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    names = [arguments.only] if arguments.only else list(sequences())
    jobs = [(name, setting) for name in names for setting in SETTINGS]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.json" for n in range(len(jobs))]
        for number, ((name, setting), file) in enumerate(zip(jobs, files, strict=True)):
            if number >= AT_ONCE:
                os.wait()
            _fork(name, setting, file)
        for _ in range(min(AT_ONCE, len(jobs))):
            os.wait()
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    document = {
        "schema_version": SCHEMA_VERSION,
        "command": "python -m vramplan.measure.allocator_probe " + " ".join(sys.argv[1:]),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "gpu": {"name": torch.cuda.get_device_name(), "driver": _driver()},
        "sequences": {name: sequences()[name][0] for name in names},
        "runs": runs,
    }
    text = json.dumps(document, separators=(",", ":"))
    with gzip.GzipFile(arguments.output, "wb", compresslevel=9, mtime=0) as packed:
        packed.write(text.encode())
    failed = [f"{r['setting']}, {r['sequence']}: {r['error']}" for r in runs if "error" in r]
    for line in failed:
        print(line, file=sys.stderr)
    size = arguments.output.stat().st_size
    print(f"{len(runs)} runs, {len(failed)} failed; {size // KIB} KiB in {arguments.output}")


if __name__ == "__main__":
    main()
