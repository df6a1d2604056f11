"""The settings of PyTorch's CUDA caching allocator: ``PYTORCH_ALLOC_CONF``, read as PyTorch does.

Source: torch 2.11 ``c10/core/AllocatorConfig.{h,cpp}`` (``ConfigTokenizer``,
``AcceleratorAllocatorConfig``), ``c10/cuda/CUDAAllocatorConfig.{h,cpp}``. The same text was once
``PYTORCH_CUDA_ALLOC_CONF``, which still wins where both are set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from vramplan.errors import UnknownNameError, UsageError
from vramplan.units import BLOCK_BYTES, MIB

SMALL_SIZE = MIB  # kSmallSize: largest request of the small pool
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc
INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: from 1 MiB to 64 GiB
NO_LIMIT = 1 << 62
# Settings that decide nothing the allocator keeps on the device.
IDLE = (
    "graph_capture_record_stream_reuse",
    "pinned_free_catch_all",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "release_lock_on_cudamalloc",
    "throw_on_cudamalloc_oom",
)
MODELLED = (
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "roundup_power2_divisions",
)
KNOWN = (*MODELLED, *IDLE, "backend", "per_process_memory_fraction")


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """What ``PYTORCH_ALLOC_CONF`` says, as far as it decides what the device holds.

    Attributes:
        expandable_segments: One growing segment a pool instead of one segment a request.
        max_split_bytes: Blocks this large are not split and serve only requests this large.
        max_non_split_rounding_bytes: How much larger than the request such a block may be.
        garbage_collection_threshold: Share of the limit above which old free segments are given
            back before new ones are taken; 0 for never.
        roundup_power2_divisions: Steps between two powers of two to which requests are rounded up,
            for requests from 2**n MiB on, n from 0 to 15; smaller ones take the first. 0 and 1: to
            multiples of 512 bytes.
        large_segment_bytes: Segment for requests above 1 and below 10 MiB.
    """

    expandable_segments: bool = False
    max_split_bytes: int = NO_LIMIT
    max_non_split_rounding_bytes: int = LARGE_SEGMENT
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    large_segment_bytes: int = LARGE_SEGMENT

    @property
    def rounds_up(self) -> bool:
        """Whether any request becomes larger than the next multiple of 512 bytes."""
        return max(self.roundup_power2_divisions) > 1

    def round_size(self, nbytes: int) -> int:
        """The block that a request gets, before splitting leaves more to it.

        Args:
            nbytes: Bytes asked for.

        Returns:
            Bytes, a multiple of 512; none for none. A request already rounded to 512 bytes gives
            the same.

        Source: torch 2.11 ``CUDACachingAllocator.cpp`` (``round_size``,
        ``roundup_power2_next_division``).
        """
        if nbytes <= BLOCK_BYTES:
            return BLOCK_BYTES if nbytes else 0
        log_size = nbytes.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(log_size - 20, 0), INTERVALS - 1)]
        if divisions > 1 and nbytes > BLOCK_BYTES * divisions:
            step = (1 << log_size) // divisions
            return -(-nbytes // step) * step
        return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


DEFAULT_SETTINGS = AllocatorSettings()


@lru_cache
def parse_alloc_conf(text: str) -> AllocatorSettings:
    """Read ``PYTORCH_ALLOC_CONF``, such as ``expandable_segments:True,max_split_size_mb:128``.

    Args:
        text: Settings ``name:value`` separated by commas; empty for the defaults.

    Returns:
        The settings.

    Raises:
        UsageError: If a name is unknown or a value is one PyTorch would refuse, or take only by
            accident (``40abc`` for 40); or if it chooses ``backend:cudaMallocAsync`` or
            ``per_process_memory_fraction``.

    Known limitations:
        What the pinned_* settings do to host memory is not modelled.
    """
    tokens = re.findall(r"[,:\[\]]|[^,:\[\]]+", re.sub(r"\s", "", text))
    pairs = list(_pairs(tokens, text))
    # every other size is compared with this one, wherever it stands
    large = [value for name, value in pairs if name == "large_segment_size_mb"]
    segment_mb = _whole("large_segment_size_mb", large[-1]) if large else LARGE_SEGMENT // MIB
    if segment_mb <= MIN_LARGE_ALLOC // MIB:
        raise _refused("large_segment_size_mb", f"above {MIN_LARGE_ALLOC // MIB}", large[-1])
    found: dict[str, object] = {"large_segment_bytes": segment_mb * MIB}
    for name, value in pairs:
        if name == "expandable_segments":
            found["expandable_segments"] = _flag(name, value)
        elif name == "max_split_size_mb":
            found["max_split_bytes"] = _at_least(name, value, segment_mb) * MIB
        elif name == "max_non_split_rounding_mb":
            found["max_non_split_rounding_bytes"] = _at_least(name, value, segment_mb) * MIB
        elif name == "garbage_collection_threshold":
            found["garbage_collection_threshold"] = _share(name, value)
        elif name == "roundup_power2_divisions":
            found["roundup_power2_divisions"] = _divisions(name, value)
        elif name == "backend" and value != ["native"]:
            raise _refused(name, "native (no other is modelled)", value)
        elif name == "per_process_memory_fraction":
            raise UsageError(
                f"--alloc-conf {name}: give the card's size instead (--memory, or --limit to "
                "measure)"
            )
    return AllocatorSettings(**found)  # type: ignore[arg-type]


def _pairs(tokens: list[str], text: str) -> Iterator[tuple[str, list[str]]]:
    """Names with the tokens of their values; a list keeps its brackets."""
    index = 0
    while index < len(tokens):
        name = tokens[index]
        if name in ",:[]":
            raise UsageError(f"--alloc-conf {text!r}: expected a name where {name!r} stands")
        if name not in KNOWN:
            raise UnknownNameError("setting in --alloc-conf", name, KNOWN)
        if tokens[index + 1 : index + 2] != [":"]:
            raise UsageError(f"--alloc-conf {text!r}: {name} needs a value, as in {name}:VALUE")
        start = end = index + 2
        if tokens[start : start + 1] == ["["]:
            while end < len(tokens) and tokens[end] != "]":
                end += 1
            if end == len(tokens):
                raise UsageError(f"--alloc-conf {text!r}: the list of {name} has no end")
        value = tokens[start : end + 1]
        if not value or value[0] in ",:]":
            raise UsageError(f"--alloc-conf {text!r}: {name} needs a value, as in {name}:VALUE")
        yield name, value
        if tokens[end + 1 : end + 2] not in ([], [","]):
            raise UsageError(
                f"--alloc-conf {text!r}: expected a comma after the value of {name}, not "
                f"{tokens[end + 1]!r}"
            )
        index = end + 2


def _refused(name: str, wanted: str, value: list[str]) -> UsageError:
    return UsageError(f"--alloc-conf {name} must be {wanted}, not {''.join(value)!r}")


def _whole(name: str, value: list[str]) -> int:
    if not re.fullmatch("[0-9]{1,9}", value[0]):
        raise _refused(name, "a whole number of MiB", value)
    return int(value[0])


def _at_least(name: str, value: list[str], least: int) -> int:
    number = _whole(name, value)
    if number < least:
        raise _refused(name, f"at least {least} (large_segment_size_mb)", value)
    return number


def _flag(name: str, value: list[str]) -> bool:
    if value not in (["True"], ["False"]):
        raise _refused(name, "True or False", value)
    return value == ["True"]


def _share(name: str, value: list[str]) -> float:
    try:
        share = float(value[0])
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise _refused(name, "between 0 and 1", value)
    return share


def _divisions(name: str, value: list[str]) -> tuple[int, ...]:
    """One number for all intervals, or ``[MB:divisions,...,>:divisions]``.

    The first entry also rules all smaller requests, ``>`` all larger ones than the entry before it;
    intervals in between that have no entry are not rounded up.
    """
    if value[0] != "[":
        if not _is_power(value[0]):
            raise _refused(name, "a power of two", value)
        return (int(value[0]),) * INTERVALS
    divisions = [0] * INTERVALS
    first, last = True, 0
    for entry in "".join(value[1:-1]).split(",") if len(value) > 2 else ():
        start, colon, number = entry.partition(":")
        if not colon or not (number == "0" or _is_power(number)):
            raise _refused(name, "a list of MB:DIVISIONS with powers of two", value)
        if start == ">":
            divisions[last + 1 :] = [int(number)] * (INTERVALS - last - 1)
            continue
        if not _is_power(start):
            raise _refused(name, "a list of MB:DIVISIONS with powers of two", value)
        index = min(int(start).bit_length() - 1, INTERVALS - 1)
        if first:
            divisions[:index] = [int(number)] * index
        divisions[index] = int(number)
        first, last = False, index
    return tuple(divisions)


def _is_power(text: str) -> bool:
    return bool(re.fullmatch("[0-9]{1,9}", text)) and int(text).bit_count() == 1
