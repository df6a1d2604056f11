"""Every test starts without a terminal: workers that run side by side are told of one."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


for _name in ("COLUMNS", "LINES"):  # fixtures of whole modules come before
    os.environ.pop(_name, None)
