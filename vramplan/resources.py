"""Where the shipped data lives."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def profiles_dir() -> Path:
    """The folder of shipped profiles: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"
