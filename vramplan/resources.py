"""Where the shipped data and the user's own lives."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def profiles_dir() -> Path:
    """The folder of shipped profiles: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


@cache
def user_calibrations_dir() -> Path:
    """The folder of the user's own profiles; it need not exist."""
    from platformdirs import user_data_path  # noqa: PLC0415 - not needed by every import

    return user_data_path("vramplan", appauthor=False) / "calibrations"
