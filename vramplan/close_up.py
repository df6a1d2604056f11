"""One job on one card looked at closely: what batch and sequence it has room for, and its step."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.comparison import Comparison, Entry
from vramplan.prediction import Prediction, judge, predict
from vramplan.timeline import Timeline

BATCHES = (1, 2, 4, 8, 16)
SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Tile:
    """One batch and sequence of the job.

    Attributes:
        batch_size: Sequences.
        seq_len: Tokens of each.
        verdict: ``fits``, ``tight`` or ``no``.
        device_peak_bytes: What it would take on a roomy card.
    """

    batch_size: int
    seq_len: int
    verdict: str
    device_peak_bytes: int


@dataclass(frozen=True, slots=True)
class CloseUp:
    """One entry of a comparison.

    Attributes:
        entry: Which.
        tiles: Every batch with every sequence that the model has positions for, by batch.
        timeline: Every allocation of the job.
        phases: Largest allocated in every phase, in bytes.
    """

    entry: Entry
    tiles: tuple[tuple[Tile, ...], ...]
    timeline: Timeline
    phases: dict[str, int]


def chosen(comparison: Comparison) -> Entry | None:
    """The entry to look at: of the first model on the first card, the first that fits best."""
    first = comparison.entries[:1]
    same = [
        entry
        for entry in comparison.entries
        if (entry.model, entry.gpu) == (first[0].model, first[0].gpu)
        and entry.usable_bytes is not None
    ]
    for verdict in ("fits", "tight", "no"):
        found = next((entry for entry in same if entry.verdict == verdict), None)
        if found is not None:
            return found
    return None


def look_closely(entry: Entry) -> CloseUp:
    """Predict an entry's variants in batch and sequence, allocator and all.

    Args:
        entry: An entry whose card has a known memory.

    Known limitations:
        A tile beyond one that does not run does not run either; its size takes the allocator's
        share from the entry's job.
    """
    top = max(entry.model.dims.max_positions, entry.job.seq_len)
    seq_lens = sorted({entry.job.seq_len, *(n for n in SEQ_LENS if n <= top)})
    prediction = predict(entry.model, entry.job, entry.gpu)
    tiles: list[tuple[Tile, ...]] = []
    for batch_size in sorted({entry.job.batch_size, *BATCHES}):
        line: list[Tile] = []
        for column, seq_len in enumerate(seq_lens):
            smaller = [*line[-1:], *(above[column] for above in tiles[-1:])]
            beyond = any(tile.verdict == "no" for tile in smaller)
            line.append(_tile(entry, batch_size, seq_len, prediction if beyond else None))
        tiles.append(tuple(line))
    return CloseUp(entry, tuple(tiles), prediction.estimate.timeline, prediction.phases())


def _tile(entry: Entry, batch_size: int, seq_len: int, beyond: Prediction | None) -> Tile:
    """One tile; for those beyond what runs, the prediction whose shares their size takes."""
    assert entry.usable_bytes is not None
    job = entry.job.but(batch_size=batch_size, seq_len=seq_len)
    prediction = predict(entry.model, job, entry.gpu, like=beyond)
    verdict = "no"
    if beyond is None:
        verdict = judge(prediction, entry.gpu.slug, entry.usable_bytes).verdict
    return Tile(batch_size, seq_len, verdict, prediction.device_peak_bytes)
