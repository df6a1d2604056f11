"""Writing our files whole or not at all, and where each of them comes from."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vramplan.errors import EnvironmentProblem, RecordError


def read_json(path: Path, most_bytes: int, noun: str, remedy: str = "") -> Any:
    """What a JSON file of ours holds; anyone may have written it.

    Args:
        path: The file.
        most_bytes: Size from which on it is refused.
        noun: What it should be: "record".
        remedy: What to do about one that cannot be read, behind a "; ".

    Raises:
        RecordError: If it cannot be read or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise RecordError(f"{path} is larger than any {noun} ({most_bytes} bytes)")
        return json.loads(data.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read as a {noun}: {error}{remedy}") from None


def check_schema(document: Any, newest: int, where: str, noun: str) -> None:
    """Refuse what is not ours, or of a newer version.

    Raises:
        RecordError: If it has no schema_version, or one above ``newest``.
    """
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int:
        raise RecordError(f"{where} is not a {noun} of vramplan: it has no schema_version")
    if version > newest:
        raise RecordError(
            f"{where} has schema_version {version}; this vramplan reads up to {newest}, update it"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all (see ``write_whole``)."""
    write_whole(path, text.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old or the new one, never a part.

    Raises:
        EnvironmentProblem: If the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror or error}") from None


def write_all(contents: Mapping[Path, bytes | None]) -> None:
    """Replace or remove several files: all of them, or none.

    Args:
        contents: What each file shall hold; None to remove it.

    Raises:
        EnvironmentProblem: If one cannot be written; all are as they were.

    Known limitations:
        A process that is killed (not interrupted) between two files leaves the first new and the
        second old; each of them whole.
    """
    new = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    old = {path: path.with_name(f".{path.name}.{os.getpid()}.old") for path in contents}
    begun: list[Path] = []
    try:
        for path, data in contents.items():  # what needs room on the disk comes first
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                shutil.copy2(path, old[path])
            if data is not None:
                new[path].write_bytes(data)
        for path, data in contents.items():
            begun.append(path)
            if data is None:
                path.unlink(missing_ok=True)
            else:
                new[path].replace(path)
    except OSError as error:
        _put_back(begun, old)
        where = error.filename or next(iter(contents)).parent
        raise EnvironmentProblem(
            f"cannot write {where}: {error.strerror or error}; nothing was changed"
        ) from None
    except BaseException:
        _put_back(begun, old)
        raise
    finally:
        for path in (*new.values(), *old.values()):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _put_back(paths: list[Path], copies: Mapping[Path, Path]) -> None:
    """Undo what was done to some files; renaming needs no room."""
    for path in paths:
        with contextlib.suppress(OSError):
            if copies[path].exists():
                copies[path].replace(path)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes of ours from changing a folder at the same time; they wait.

    Args:
        folder: It is made if it is not there.

    Raises:
        EnvironmentProblem: If it cannot be made or held.
    """
    try:
        import fcntl  # noqa: PLC0415 - Windows has none, and no folders that can be locked
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise EnvironmentProblem(f"cannot use {folder}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise EnvironmentProblem(f"cannot lock {folder}: {error.strerror or error}") from None
        yield
    finally:
        os.close(handle)


def provenance() -> dict[str, Any]:
    """Command, time and git commit, which every file of ours carries."""
    # a runner may have the files without their history, or with that of another commit
    commit = os.environ.get("GITHUB_SHA") or _git_commit()
    program = Path(sys.argv[0]).name
    if program == "__main__.py":
        program = "pytest" if Path(sys.argv[0]).parent.name == "pytest" else "vramplan"
    words = [program, *sys.argv[1:]]
    return {
        "command": shlex.join(words),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
    }


def _git_commit() -> str | None:
    """HEAD of the working directory; None outside a repository or without git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
