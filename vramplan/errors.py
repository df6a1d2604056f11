"""Every error a user can meet.

VramplanError
├── UsageError            a request that cannot be answered as asked
│   ├── UnknownNameError  a family, card, optimizer or option that does not exist
│   └── ConfigError       a config.json that is missing, broken or not a model we can plan
├── EnvironmentProblem    the machine stands in the way: no network, no permission, no GPU
└── RecordError           a record or profile that cannot be read or must not be overwritten

Each message says what is wrong, where, and what to do about it. The command line prints it in one
line and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VramplanError(Exception):
    """Base of every error raised on purpose; never a bug."""


class UsageError(VramplanError, ValueError):
    """The request itself cannot be answered: a wrong value or a wrong combination."""


class ConfigError(UsageError):
    """A model's ``config.json`` is missing, unreadable, hostile or inconsistent."""


class EnvironmentProblem(VramplanError):
    """The request is fine but this machine cannot serve it (network, permission, GPU, disk)."""


class RecordError(VramplanError):
    """A file of ours cannot be read, is newer than this version, or would be overwritten."""


class UnknownNameError(UsageError):
    """A name that is in none of our catalogues.

    Args:
        what: What kind of name it is ("GPU", "model", "optimizer", ...).
        name: What the user typed.
        known: Every name that would have been understood.
        hint: A further sentence (where to look, how to add one).
    """

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(set(known))
        lowered = {n.lower(): n for n in names}
        near = [lowered[m] for m in difflib.get_close_matches(name.lower(), lowered, 3, 0.5)]
        near += [n for n in names if name and name.lower() in n.lower() and n not in near][
            : 3 - len(near)
        ]
        self.suggestions = tuple(near)
        text = f"unknown {what} {name!r}"
        if near:
            text += "; did you mean " + " or ".join(near) + "?"
        elif len(names) <= 12:
            text += "; known: " + ", ".join(names)
        if hint:
            text += f" {hint}" if text.endswith("?") else f". {hint}"
        super().__init__(text)
