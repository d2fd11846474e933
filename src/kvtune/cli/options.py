"""Options that several verbs share, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["HighValue", "Html", "Judge", "TraceBlockSize", "TraceFormat"]

HighValue = Annotated[
    Path | None, typer.Option("--high-value", help="Requests that must not change: each is judged alone.")
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge", help="module:function(request, answer) -> bool or 0..1, run over both sides' answers."
    ),
]
TraceFormat = Annotated[
    str, typer.Option("--format", help="auto, or the format's name; an unknown name lists them.")
]
TraceBlockSize = Annotated[
    int | None, typer.Option(help="Prompt tokens per hash id, for traces whose rows do not determine it.")
]
Html = Annotated[
    Path | None, typer.Option("--html", help="Write a self-contained page with the pictures here.")
]
