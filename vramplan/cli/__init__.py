"""The command line: one file a command, one place that prints (``output``)."""

from __future__ import annotations

import gc
import importlib
import os
import sys

import typer

from vramplan.errors import VramplanError

app = typer.Typer(
    name="vramplan",
    help="Will it fit? The memory of full, LoRA and QLoRA fine-tuning, before renting anything.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        from vramplan import __version__  # noqa: PLC0415

        print(f"vramplan {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Options of vramplan itself."""


MAX_ERROR = 2000  # characters; an error may name what a hostile file holds
COMMANDS = {
    "fit": "fit",
    "estimate": "estimate",
    "trace": "trace",
    "measure": "measure",
    "calibrate": "calibrate",
    "compare": "compare",
    "check": "check",
    "accuracy": "accuracy",
    "gpus": "catalogues",
    "models": "catalogues",
}


def _register(named: list[str]) -> None:
    """Import the command asked for, or all of them for help and completion."""
    wanted = {COMMANDS[name] for name in named if name in COMMANDS} or set(COMMANDS.values())
    for module in sorted(wanted):
        importlib.import_module(f"vramplan.cli.{module}")


def main() -> None:
    """Entry point: every error of ours is one line on stderr and exit code 2."""
    gc.disable()  # a short process that makes many small objects and no garbage cycles
    _register(sys.argv[1:2])
    try:
        app()
    except VramplanError as error:
        from vramplan.names import printable  # noqa: PLC0415 - most calls need it not

        print(f"error: {printable(str(error), MAX_ERROR)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE; 0 and 1 would be answers
    except Exception as error:
        if os.environ.get("VRAMPLAN_DEBUG"):
            raise
        print(
            f"error: vramplan failed in a way it should not ({type(error).__name__}: {error}); "
            "please report it, with the output of the same command under VRAMPLAN_DEBUG=1",
            file=sys.stderr,
        )
        sys.exit(2)
