"""Tables, charts and pages; what needs jinja2, matplotlib or pandas says so in one line."""

from __future__ import annotations

from vramplan.errors import EnvironmentProblem


def missing(what: str, package: str) -> EnvironmentProblem:
    """The error for an optional package that is not there.

    Args:
        what: What needs it, as typed or called.
        package: The package.
    """
    return EnvironmentProblem(
        f"{what} needs {package}: pip install 'vramplan[report]' (from a checkout '.[report]')"
    )
