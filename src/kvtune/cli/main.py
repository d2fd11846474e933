"""The `kvtune` command: finds the verb, runs it, turns errors into one line and an exit code.

Only the verb asked for is imported, so that `plan` starts as fast as numpy allows.
Exit codes: 0 ok, 1 the gate said no, 2 bad usage or input, 3 environment, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from kvtune._version import __version__
from kvtune.errors import HostError, KVTuneError
from kvtune.printable import one_line

VERBS = {
    "plan": "size a model's KV cache exactly: bytes per token, capacity",
    "trace": "read a request file or trace: lengths, arrivals, prefix reuse",
    "simulate": "replay a trace: what a prefix cache would hit, what a server would achieve",
    "tune": "find the smallest KV cache that passes the quality gate",
    "report": "redraw a run's page and Markdown from its JSON alone",
    "emit": "print the command or snippet that runs a recipe",
    "check": "judge a recipe on requests: exit 0 only on PASS",
    "verify": "is what a recipe was proven on still here? exit 0 only if so",
    "bench": "measure latency and throughput of a server or a model",
    "doctor": "what is here, what is missing, the line that fixes it",
}
"""Verb -> one line of help; the function of the same name lives in `kvtune.cli.<verb>`."""
MAX_MESSAGE = 2000
"""Characters of an error: what it quotes may be a megabyte."""


def build_app(verbs: Sequence[str]) -> typer.Typer:
    """The typer application holding just `verbs`."""
    app = typer.Typer(
        name="kvtune",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
        ] = False,
    ) -> None:
        """Find the smallest KV cache that serves your LLM traffic, prove it, run it."""

    for verb in verbs:
        function = getattr(importlib.import_module(f"kvtune.cli.{verb}"), verb)
        if isinstance(function, typer.Typer):  # a verb with verbs of its own
            app.add_typer(function, name=verb)
        else:
            app.command(verb, help=None if function.__doc__ else VERBS[verb])(function)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    as_json = "--json" in args
    try:
        try:
            return _run(args)
        except KVTuneError as error:
            return _fail(f"error: {error}", error.exit_code, as_json=as_json)
        except TyperException as error:
            return _fail(f"error: {_usage_problem(error, args)}", 2, as_json=as_json)
        except (KeyboardInterrupt, Abort) as interruption:
            return _fail(str(interruption) or "interrupted", 130, as_json=as_json)
    except (BrokenPipeError, SystemExit):  # SystemExit: what rich makes of a closed stdout
        _discard_output()
        return 141
    except OSError as error:  # a full disk, a removed folder: the machine, not the request
        with contextlib.suppress(OSError):  # stdout itself may be what failed
            _print_problem(str(error), HostError.exit_code, as_json=as_json)
        _discard_output()
        return _fail(f"error: {error}", HostError.exit_code, as_json=False)


def _run(args: Sequence[str]) -> int:
    """Run the verb with its output flushed, so that what fails at flushing fails in here.

    Not `app(...)`: that turns Ctrl-C into a silent exit and a closed stdout into the gate's exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
    asked = _verb(args)
    command = typer.main.get_command(build_app(list(VERBS) if asked is None else [asked]))
    try:
        with command.make_context("kvtune", list(args)) as context:
            code = command.invoke(context)
    except typer.Exit as ending:
        code = ending.exit_code
    except MemoryError:
        raise HostError("this needs more memory than there is; use a part of the input") from None
    if sys.stdout is not None:  # None where the shell closed it: `>&-`
        sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _verb(args: Sequence[str]) -> str | None:
    first = next((arg for arg in args if not arg.startswith("-")), None)
    return first if first in VERBS else None


def _usage_problem(error: TyperException, args: Sequence[str]) -> str:
    describe = getattr(error, "format_message", None)  # click's errors have it, typer's root does not
    text = " ".join((str(error) if describe is None else describe()).split()).rstrip(".")
    words = ["kvtune", _verb(args), "--help"]
    return f"{text}; see `{' '.join(word for word in words if word)}`"


def _discard_output() -> None:
    """Nothing more can be written: keep the interpreter from trying once more at exit, and complaining."""
    if sys.stdout is sys.__stdout__:  # a caller's own stream stays in its place
        sys.stdout = io.StringIO()


def _fail(message: str, exit_code: int, *, as_json: bool) -> int:
    line = one_line(message, MAX_MESSAGE)
    _print_problem(line.removeprefix("error: "), exit_code, as_json=as_json)
    print(f"kvtune: {line}", file=sys.stderr)
    return exit_code


def _print_problem(message: str, exit_code: int, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"message": message, "exit_code": exit_code}}), flush=True)
