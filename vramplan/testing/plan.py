"""What the options of one pytest run ask for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from vramplan.errors import EnvironmentProblem, UsageError
from vramplan.names import printable
from vramplan.regression import Threshold, thresholds
from vramplan.testing import baselines
from vramplan.testing.baselines import Baseline
from vramplan.testing.session import GpuCard

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._]|-(?!-)){0,63}")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare with and what to save.

    Attributes:
        storage: Folder of the baselines.
        save: Name to save as; empty to save nothing.
        replaced: Digest of the file that --vram-overwrite may replace; empty for none.
        baselines: What may be compared with, the newest first; None to compare nothing.
        allowed: How much worse each figure may get.
    """

    storage: Path
    save: str
    replaced: str
    baselines: Sequence[Baseline] | None
    allowed: Mapping[str, Threshold | None]


def make_plan(config: pytest.Config, card: Callable[[], GpuCard]) -> Plan:
    """The plan that the command line asks for.

    Args:
        config: Pytest's.
        card: Gives the card, to find out before the tests run what would be overwritten.

    Raises:
        UsageError: If the options do not go together or name what is not there.
        RecordError: If a baseline cannot be read.
        EnvironmentProblem: If the folder cannot be written.
    """
    save, compare, fail, overwrite, storage = (
        config.getoption(f"vram_{name}")
        for name in ("save", "compare", "fail", "overwrite", "storage")
    )
    if overwrite and save is None:
        raise UsageError("--vram-overwrite is about --vram-save NAME: add it")
    if fail is not None and compare is None:
        raise UsageError("--vram-fail is about a comparison: add --vram-compare")
    for option, name in (("--vram-save", save), ("--vram-compare", compare)):
        if name:
            _check_name(option, name)
    folder = config.rootpath / storage
    allowed = thresholds(fail or "")
    found = None if compare is None else _known(folder, compare)
    is_worker = hasattr(config, "workerinput")
    replaced = "" if save is None or is_worker else _check_save(folder, save, overwrite, card)
    return Plan(folder, save or "", replaced, found, allowed)


def _check_name(option: str, name: str) -> None:
    if Path(name).exists() or name.endswith(".py") or "::" in name:
        raise UsageError(
            f"{option} took {name!r} for the name of a baseline; write {option}=NAME, or the files "
            "before it"
        )
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{option}: {printable(name)!r} cannot be a name; use letters, digits, '.', '_' and "
            "single '-'"
        )


def _known(folder: Path, name: str) -> list[Baseline]:
    """The baselines of a name, or all of them."""
    everything = baselines.read_all(folder)
    found = [baseline for baseline in everything if name in ("", baseline.name)]
    if found:
        return found
    names = sorted({printable(baseline.name) for baseline in everything})
    there = f"it has {', '.join(names)}" if names else "it has none"
    wanted = f"baseline {name!r}" if name else "baseline"
    raise UsageError(
        f"--vram-compare: there is no {wanted} in {folder} ({there}); save one with "
        f"--vram-save {name or 'NAME'}"
    )


def _check_save(
    folder: Path, name: str, overwrite: bool, card: Callable[[], GpuCard]
) -> str:  # fmt: skip
    """Find out before the tests run whether their figures can be saved."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise EnvironmentProblem(f"--vram-save: {nearest} cannot be written")
    try:
        here = card()
    except (EnvironmentProblem, ImportError):
        return ""  # nothing will be measured, which is said where it happens
    path = baselines.file_path(folder, name, here.where, here.versions)
    if not path.exists():
        return ""
    if not overwrite:
        raise UsageError(
            f"--vram-save: {path} is there already; choose another name, or add --vram-overwrite"
        )
    return baselines.digest(path)
