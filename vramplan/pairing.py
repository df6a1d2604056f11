"""Two records or two folders of them: what belongs together, and what one side lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vramplan.errors import EnvironmentProblem, RecordError, UsageError
from vramplan.evidence import measurement, merged, read_timeline, timeline_path
from vramplan.files import alone_in, write_all
from vramplan.record import read_record
from vramplan.regression import Accepted, Checked, Measurement, Threshold, check, check_all

REPEAT = re.compile(r"-repeat\d+$")  # as ``vramplan measure --repeat`` names them


class Evidence(NamedTuple):
    """One measurement and the files that it was read from."""

    measurement: Measurement
    paths: tuple[Path, ...]


def compare(current: Path, baseline: Path, allowed: Mapping[str, Threshold | None]) -> Checked:
    """Compare records with their baselines.

    Args:
        current: A record or a folder of them.
        baseline: The same of what was.
        allowed: As ``regression.thresholds`` gives them.

    Raises:
        UsageError: If one is a folder and the other is not, or both are the same.
        RecordError: If a file cannot be read.
    """
    _kinds(current, baseline)
    if not baseline.exists():
        raise RecordError(f"there is no baseline {baseline}; --update makes it of {current}")
    return _compare(gather(current), gather(baseline), allowed, alone=not current.is_dir())


def _kinds(current: Path, baseline: Path) -> None:
    if not current.exists():
        raise RecordError(f"there is no record or folder {current}; `vramplan measure` makes them")
    if not baseline.exists():
        return
    if current.is_dir() != baseline.is_dir():
        raise UsageError(
            f"of {current} and {baseline} one is a folder and one is not; give two of a kind"
        )
    if current.samefile(baseline):
        raise UsageError(f"{current} is its own baseline; nothing would be compared")


def gather(path: Path) -> dict[str, Evidence]:
    """The measurements of a record or a folder, repeats taken together.

    Args:
        path: A record, or a folder with ``*.json`` (not its folders).

    Raises:
        RecordError: If there is none, one cannot be read, or two have the same name.
    """
    own = [path]
    if path.is_dir():
        own = sorted(p for p in path.glob("*.json") if not p.name.startswith("."))
        if not own:
            raise RecordError(f"{path} holds no records (*.json)")
    groups: dict[str, list[Evidence]] = {}
    seen: dict[str, Path] = {}
    for file in own:
        found = _read(file)
        name = found.measurement.name
        if name in seen:
            raise RecordError(f"{seen[name]} and {file} are both the record {name}; remove one")
        seen[name] = file
        groups.setdefault(REPEAT.sub("", name) if path.is_dir() else name, []).append(found)
    return {
        name: Evidence(
            merged(name, [e.measurement for e in parts]), tuple(p for e in parts for p in e.paths)
        )
        for name, parts in groups.items()
    }


def _read(path: Path) -> Evidence:
    record, beside = read_record(path), timeline_path(path)
    if not beside.exists():
        return Evidence(measurement(record), (path,))
    return Evidence(measurement(record, read_timeline(beside)), (path, beside))


def _compare(
    current: Mapping[str, Evidence],
    baseline: Mapping[str, Evidence],
    allowed: Mapping[str, Threshold | None],
    *,
    alone: bool,
) -> Checked:
    if alone:  # two files, whatever they are called
        ((now,), (then,)) = current.values(), baseline.values()
        return Checked((check(now.measurement, then.measurement, allowed),))
    now_all, then_all = (
        {name: evidence.measurement for name, evidence in side.items()}
        for side in (current, baseline)
    )
    return check_all(now_all, then_all, allowed)


def accept(
    current: Path, baseline: Path, allowed: Mapping[str, Threshold | None], *, force: bool = False
) -> Accepted:
    """Make what was measured the baseline: every file of it, or none.

    A measurement's repeats and timelines are replaced together; what only the baseline has stays.

    Args:
        current: A record or a folder of them.
        baseline: A record or a folder; made if it is not there.
        allowed: For the comparison with what is replaced.
        force: Whether runs that did not end well are accepted too.

    Raises:
        UsageError: As ``compare``.
        RecordError: If a file cannot be read, a run did not end well, or another record is in the
            way.
        EnvironmentProblem: If something cannot be written.
    """
    _kinds(current, baseline)
    new = gather(current)
    failed = [e.measurement for e in new.values() if e.measurement.failed]
    if failed and not force:
        raise RecordError(
            f"{failed[0].name} is no baseline: {failed[0].failed}; --force accepts it all the same"
        )
    alone = not current.is_dir()
    with alone_in(baseline.parent if alone else baseline):
        # an empty folder is a baseline to be
        there = baseline.exists() and (alone or any(baseline.glob("*.json")))
        old = gather(baseline) if there else {}
        if alone:
            old = dict(zip(new, old.values(), strict=False))
        checked = _compare(new, old, allowed, alone=alone and bool(old))
        contents: dict[Path, bytes | None] = {}
        fates: dict[str, str] = {}
        for name, evidence in new.items():
            before = old[name].paths if name in old else ()
            changed = _contents(evidence, _targets(evidence, baseline, alone=alone), before)
            contents |= changed
            fates[name] = ("replaced" if before else "added") if changed else "unchanged"
        _nothing_in_the_way(contents, old, set(new))
        write_all(contents)
    fates |= dict.fromkeys(checked.missing, "kept")
    return Accepted(checked, fates)


def _targets(evidence: Evidence, baseline: Path, *, alone: bool) -> tuple[Path, ...]:
    """Where the files of a measurement go."""
    if alone:
        return (baseline, timeline_path(baseline))[: len(evidence.paths)]
    return tuple(baseline / path.name for path in evidence.paths)


def _contents(
    evidence: Evidence, targets: tuple[Path, ...], before: tuple[Path, ...]
) -> dict[Path, bytes | None]:
    """What to write and what to remove; nothing if all is as it was."""
    try:
        data = dict(zip(targets, (path.read_bytes() for path in evidence.paths), strict=True))
        same = {path for path in before if path in data and path.read_bytes() == data[path]}
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {error.filename}: {error.strerror}") from None
    changed = {path: content for path, content in data.items() if path not in same}
    return changed | {path: None for path in before if path not in data}


def _nothing_in_the_way(
    contents: Mapping[Path, bytes | None], old: Mapping[str, Evidence], names: set[str]
) -> None:
    owners = {path: name for name, evidence in old.items() for path in evidence.paths}
    for path in contents:
        if owners.get(path, "") not in {"", *names}:
            raise RecordError(f"{path} is the record {owners[path]}; rename one of the two files")
