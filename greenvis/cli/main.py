"""The command line: parse, call, print. Exit codes: 0 done, 1 failed, 2 bad input (nothing was
changed).

Every verb prints for people, and with `--json` one JSON document on standard output for programs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from greenvis import __version__
from greenvis.cli import (
    benchmarks,
    datasets,
    labels,
    models,
    output,
    planning,
    runs,
    starting,
    tables,
    unlabelled,
)
from greenvis.cli.app import app, option
from greenvis.cli.failures import describe  # now: without memory or descriptors it is too late
from greenvis.errors import BadInput, GreenvisError, nearest

VERBS = (
    starting,
    runs,
    tables,
    datasets,
    models,
    planning,
    unlabelled,
    labels,
    benchmarks,
)  # modules in which verbs register themselves


def _version(requested: bool) -> None:
    if requested:
        print(f"greenvis {__version__}")
        raise typer.Exit()


@app.callback()
def _greenvis(
    version: Annotated[
        bool, option("print the version", name="--version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make vision models cheaper to train, adapt and run, and prove it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words without "greenvis"; those of this process where None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "_GREENVIS_COMPLETE" in os.environ:  # a shell asks how a line may go on
        app(prog_name="greenvis")
    try:
        return _call(words)
    except GreenvisError as error:
        code = 2 if isinstance(error, BadInput) else 1
        return code if error.reported else _failed(words, error, code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not break into the end
        print("greenvis: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the machine failed, or we did: one line, no traceback for a user
        if os.environ.get("GREENVIS_DEBUG"):
            raise
        return _failed(words, describe(error), 1)


def _call(words: list[str]) -> int:
    """Run the command that the words name. Raises BadInput where they name none."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("greenvis", words or ["--help"]) as ctx:
            return command.invoke(ctx) or 0
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        raise BadInput(_wording(error)) from error


def _wording(error: Any) -> str:
    """Return what is wrong with the words; for an option that is not known, with the nearest."""
    ctx = getattr(error, "ctx", None)
    if ctx is None or not hasattr(error, "possibilities"):
        command = ctx.command_path if ctx else "greenvis"
        return f"{error.format_message().rstrip('.')} (see {command} --help)"
    options = [name for param in ctx.command.get_params(ctx) for name in param.opts]
    name = error.option_name
    return f"{ctx.info_name} has no option {name}{nearest(name, options)}"


def _failed(words: list[str], error: object, code: int) -> int:
    """Say what went wrong, and return the exit code."""
    if "--json" in words[: words.index("--") if "--" in words else None]:
        print(json.dumps({"error": str(error), "exit": code}))
    print(output.message(error), file=sys.stderr)
    return code
