"""The only place where bytes become text or text becomes bytes."""

from __future__ import annotations

import re

from vramplan.errors import UsageError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGTP", start=1):
    _UNITS[f"{_prefix}iB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power
_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)

BLOCK_BYTES = 512  # c10::CachingAllocator::kMinBlockSize
MAX_BYTES = 1024**6  # an exbibyte: beyond it a size is a typing error


def round_block(nbytes: int) -> int:
    """Round a request up as the caching allocator does: to a multiple of 512 bytes."""
    return (nbytes + 511) & -512 if nbytes > 0 else 0


def parse_size(text: str) -> int:
    """Read a memory size such as ``12GiB``, ``12 GB``, ``512MiB`` or ``1073741824``.

    Args:
        text: A number and a unit; binary units end in ``iB``, decimal ones in ``B``.

    Returns:
        The size in bytes.

    Raises:
        UsageError: If the text is not a positive size below one exbibyte.
    """
    match = _SIZE.fullmatch(text)
    factor = _BY_LOWER.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"cannot read {text!r} as a size; write for example 12GiB, 24GB or 512MiB")
    size = int(float(match[1]) * factor)
    if not 0 < size <= MAX_BYTES:
        raise UsageError(f"a size must be above 0 and at most 1 EiB, not {text!r}")
    return size


def format_bytes(num_bytes: int | None, digits: int = 2) -> str:
    """Write bytes for people, in GiB, or in smaller units below 0.1 GiB.

    Args:
        num_bytes: A size in bytes (negative for a shortage); None when unknown.
        digits: Digits behind the point for GiB.

    Returns:
        Text such as ``"9.65 GiB"``, ``"72.0 MiB"`` or ``"unknown"``.
    """
    if num_bytes is None:
        return "unknown"
    size = abs(num_bytes)
    if size >= GIB // 10:
        return f"{num_bytes / GIB:,.{digits}f} GiB"
    if size >= MIB // 10:
        return f"{num_bytes / MIB:.1f} MiB"
    if size >= KIB:
        return f"{num_bytes / KIB:.1f} KiB"
    return f"{num_bytes} B"


def format_count(count: int) -> str:
    """Write a count for people: ``6.05 B``, ``135 M``, ``4,096``."""
    if count >= 10**9:
        return f"{count / 1e9:.2f} B"
    if count >= 10**6:
        return f"{count / 1e6:.1f} M"
    return f"{count:,}"


def format_seconds(seconds: float) -> str:
    """Write a time for people: ``1.24 s``, ``83 ms``, ``5.2 us``."""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def format_rate(per_s: float, what: str) -> str:
    """Write a rate for people: ``4,970 tokens/s``, ``712 Tflop/s``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if per_s >= factor:
            return f"{per_s / factor:.3g} {prefix}{what}/s"
    return f"{per_s:,.0f} {what}/s"
