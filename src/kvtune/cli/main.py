"""The `kvtune` command: finds the verb, runs it, turns errors into one line and an exit code.

Only the verb asked for is imported, so that `plan` starts as fast as numpy allows.
Exit codes: 0 ok, 1 the gate said no, 2 bad usage or input, 3 environment, 130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from kvtune._version import __version__
from kvtune.errors import KVTuneError

VERBS = {
    "plan": "size a model's KV cache exactly: bytes per token, capacity",
    "trace": "read a request file or trace: lengths, arrivals, prefix reuse",
    "tune": "find the smallest KV cache that passes the quality gate",
    "emit": "print the command or snippet that runs a recipe",
    "check": "judge a recipe on requests: exit 0 only on PASS",
    "bench": "measure latency and throughput of a server or a model",
    "doctor": "what is here, what is missing, the line that fixes it",
}
"""Verb -> one line of help; the function of the same name lives in `kvtune.cli.<verb>`."""


def build_app(verbs: Sequence[str]) -> typer.Typer:
    """The typer application holding just `verbs`."""
    app = typer.Typer(
        name="kvtune",
        no_args_is_help=True,
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
        app.command(verb, help=None if function.__doc__ else VERBS[verb])(function)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    asked = next((arg for arg in args if not arg.startswith("-")), None)
    try:
        app = build_app([asked] if asked in VERBS else list(VERBS))
        code = app(args, standalone_mode=False, prog_name="kvtune")
    except KVTuneError as error:
        return _fail(str(error), error.exit_code, as_json="--json" in args)
    except TyperException as error:
        describe = getattr(error, "format_message", None)  # click's errors have it, typer's root does not
        return _fail(str(error) if describe is None else describe(), 2, as_json="--json" in args)
    except (KeyboardInterrupt, Abort):
        print("kvtune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    return code if isinstance(code, int) else 0


def _fail(message: str, exit_code: int, *, as_json: bool) -> int:
    line = " ".join(message.split())
    if as_json:
        print(json.dumps({"error": {"message": line, "exit_code": exit_code}}))
    print(f"kvtune: error: {line}", file=sys.stderr)
    return exit_code
