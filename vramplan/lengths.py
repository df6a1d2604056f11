"""How long a data set's samples are: a JSONL or CSV file of lengths, read as what it is, untrusted.

Peaks come from the longest sample of a batch, not from the mean: the collator pads every batch to
it. A histogram of lengths says which length to plan, and what a ceiling would cut.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vramplan.errors import UsageError

MAX_FILE_BYTES = 4 * 1024**3
MAX_LINE_BYTES = 32 * 1024**2
MAX_LENGTH = 100_000_000
MAX_DIFFERENT = 1_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of the samples of a data set, in tokens.

    Attributes:
        name: The file.
        counts: Pairs of (length, samples of it), shortest first; never empty.
    """

    name: str
    counts: tuple[tuple[int, int], ...]

    @property
    def num_samples(self) -> int:
        """Samples."""
        return sum(count for _, count in self.counts)

    @property
    def mean(self) -> float:
        """Mean length."""
        return sum(length * count for length, count in self.counts) / self.num_samples

    @property
    def longest(self) -> int:
        """Longest length."""
        return self.counts[-1][0]

    def percentile(self, percent: int) -> int:
        """The shortest length that so many percent of the samples do not exceed (nearest rank)."""
        left = -(-percent * self.num_samples // 100)
        for length, count in self.counts:
            left -= count
            if left <= 0:
                return length
        return self.longest

    def share_above(self, length: int) -> float:
        """Share of the samples that are longer."""
        return sum(count for own, count in self.counts if own > length) / self.num_samples


def read_lengths(path: Path) -> Lengths:
    """The lengths in a file, read line by line.

    Args:
        path: A CSV file with a column ``length`` where its name ends in .csv; otherwise JSON lines,
            each with a number ``length`` or a list ``input_ids``.

    Raises:
        UsageError: If it cannot be read or a line is not usable; names file and line.
    """
    counts: Counter[int] = Counter()
    try:
        if not path.is_file():
            raise UsageError(f"{path} is not a file; give JSON lines or a CSV of lengths")
        with path.open("rb") as file:
            rows = _from_csv if path.suffix.lower() == ".csv" else _from_json
            for number, length in rows(_lines(path, file), path):
                if isinstance(length, bool) or not isinstance(length, int):
                    raise _unusable(path, number, "length is not a whole number")
                if not 0 < length <= MAX_LENGTH:
                    raise _unusable(path, number, f"length must be from 1 to {MAX_LENGTH:,}")
                counts[length] += 1
                if len(counts) > MAX_DIFFERENT:
                    raise _unusable(path, number, f"more than {MAX_DIFFERENT:,} different lengths")
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not counts:
        raise UsageError(f"{path} has no samples")
    return Lengths(path.name, tuple(sorted(counts.items())))


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Its lines, numbered; no line and no file is read beyond what one may be."""
    total = 0
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        total += len(line)
        if len(line) > MAX_LINE_BYTES:
            raise _unusable(path, number, f"is longer than {MAX_LINE_BYTES:,} bytes")
        if total > MAX_FILE_BYTES:
            raise _unusable(path, number, f"the file is larger than {MAX_FILE_BYTES:,} bytes")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _unusable(path, number, "is not UTF-8") from None


def _from_json(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            raise _unusable(path, number, "is not JSON") from None
        if not isinstance(sample, dict):
            raise _unusable(path, number, "is not a JSON object")
        if "length" in sample:
            yield number, sample["length"]
        elif isinstance(sample.get("input_ids"), list):
            yield number, len(sample["input_ids"])
        else:
            raise _unusable(path, number, "has neither a length nor a list of input_ids")


def _from_csv(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[int, Any]]:
    reached = 0

    def text() -> Iterator[str]:
        nonlocal reached
        for number, line in lines:
            reached = number
            yield line

    column = None
    try:
        for row in csv.reader(text()):
            if column is None:
                names = [name.strip() for name in row]
                if "length" not in names:
                    raise _unusable(path, reached, "the header has no column length")
                column = names.index("length")
            elif row:
                value = row[column].strip() if column < len(row) else ""
                whole = value.isascii() and value.isdigit() and len(value) <= len(str(MAX_LENGTH))
                yield reached, int(value) if whole else None
    except csv.Error as error:
        raise _unusable(path, reached, f"is not CSV: {error}") from None


def _unusable(path: Path, number: int, why: str) -> UsageError:
    return UsageError(f"{path}, line {number}: {why}")
