"""`kvtune simulate`: one verb, a mode each for the prefix cache alone and for a whole server.

Each mode is a function of its own file, `kvtune.cli.simulate_<mode>.<mode>`, all of whose parameters have
defaults. The verb takes the options of all modes (the help of one that two share is the first mode's),
refuses those that belong to another mode, and calls the one that was asked for.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvtune.errors import UsageError

MODES = ("cache", "serve")

_Mode = Annotated[
    str | None,
    typer.Option(
        "--mode", help="cache: the prefix cache alone; serve: a whole server. Default: by the other options."
    ),
]


def _modes() -> dict[str, Callable[..., None]]:
    return {mode: getattr(importlib.import_module(f"kvtune.cli.simulate_{mode}"), mode) for mode in MODES}


def _parameters(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """The function's parameters with annotations resolved."""
    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    return {name: p.replace(annotation=hints[name]) for name, p in signature.parameters.items()}


def _verb(modes: dict[str, Callable[..., None]]) -> Callable[..., None]:
    options = {mode: _parameters(function) for mode, function in modes.items()}
    merged: dict[str, inspect.Parameter] = {}
    for of_mode in options.values():
        for name, parameter in of_mode.items():
            merged.setdefault(name, parameter)

    def simulate(mode: str | None, **values: Any) -> None:
        if mode is not None and mode not in modes:
            raise UsageError(f"unknown --mode {mode!r}; known: {', '.join(modes)}")
        # Only what was said is passed on: a mode has its own defaults.
        said = {name: value for name, value in values.items() if value != merged[name].default}
        if mode is None:
            mode = next((m for m in modes if options[m].keys() >= said.keys()), MODES[0])
        for name in said:
            if name not in options[mode]:
                others = [other for other in modes if name in options[other]]
                raise UsageError(
                    f"{_option(merged[name])} belongs to --mode {' and '.join(others)}, not to --mode {mode}"
                )
        modes[mode](**said)

    mode = inspect.Parameter("mode", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Mode)
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in merged.values()]
    parameters = [mode, *keyword_only]
    simulate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    simulate.__annotations__ = {p.name: p.annotation for p in parameters}
    simulate.__doc__ = "Replay a trace: what a prefix cache would hit, what a server would achieve."
    return simulate


def _option(parameter: inspect.Parameter) -> str:
    """The option as the user types it."""
    for detail in getattr(parameter.annotation, "__metadata__", ()):
        for name in getattr(detail, "param_decls", None) or ():
            if name.startswith("--"):
                return name.split("/")[0]
    return f"--{parameter.name.replace('_', '-')}"


simulate = _verb(_modes())
