"""Writing our files whole or not at all, and where each of them comes from."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from vramplan.errors import EnvironmentProblem


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


def provenance() -> dict[str, Any]:
    """Command, time and git commit, which every file of ours carries."""
    # a runner may have the files without their history, or with that of another commit
    commit = os.environ.get("GITHUB_SHA") or _git_commit()
    program = Path(sys.argv[0]).name
    words = ["vramplan" if program == "__main__.py" else program, *sys.argv[1:]]
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
