"""`kvtune trace`: what a request file or trace holds, what breaks its prefixes, what it will hit.

`kvtune trace FILE` is `kvtune trace stats FILE`. Each verb below prints its own tables from `trace_text`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from kvtune.cli.options import TraceBlockSize, TraceFormat
from kvtune.cli.screen import say

if TYPE_CHECKING:
    from kvtune.workload import Workload

DEFAULT_VERB = "stats"


class _DefaultsToStats(TyperGroup):
    """A group in which a file's name in the place of a verb means statistics."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)


trace = typer.Typer(
    cls=_DefaultsToStats,
    help="Read a request file or trace: statistics (the default), lint, forecast, anonymise.",
    pretty_exceptions_enable=False,
)

_File = Annotated[Path, typer.Argument(help="Request file or trace: JSON, JSONL or CSV, plain or gzip.")]
_BlockSize = Annotated[
    int | None, typer.Option(help="Tokens per block to cut prompts at; default the trace's own, else 16.")
]
_Limit = Annotated[int | None, typer.Option(help="Use the first so many requests.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@trace.command("stats")
def stats(
    file: _File,
    format_: TraceFormat = "auto",
    trace_block_size: TraceBlockSize = None,
    block_size: _BlockSize = None,
    limit: _Limit = None,
    anonymise_to: Annotated[
        Path | None, typer.Option("--anonymise", help="Also write the requests without text to this file.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Lengths, arrivals, and the best hit rate prefix caching could reach; how reuse behaves and whether it
    stays so."""
    from kvtune.workload import workload_statistics

    workload = _load(file, format_, trace_block_size, limit)
    statistics = workload_statistics(workload, block_size=block_size)
    if anonymise_to is not None:
        statistics["anonymised"] = _write_anonymised(workload, file, anonymise_to, None, None)
    if as_json:
        _print_json(statistics)
        return
    from kvtune.cli.trace_text import statistics_text

    say(statistics_text(statistics))


@trace.command("lint")
def lint(
    file: _File,
    format_: TraceFormat = "auto",
    trace_block_size: TraceBlockSize = None,
    limit: _Limit = None,
    max_loss: Annotated[
        str, typer.Option(help="Share of prompt tokens one cause may lose before it is an error.")
    ] = "1%",
    as_json: _Json = False,
) -> int:
    """Find what breaks prefixes in prompts: the place, the tokens of reuse lost, what to change. Exit 1 where
    a cause loses more than --max-loss."""
    from kvtune.workload import lint_workload

    tolerated = _share(max_loss)
    workload = _load(file, format_, trace_block_size, limit)
    report = lint_workload(workload, max_loss=tolerated)
    if as_json:
        head = {"schema_version": 1, "path": str(file), "format": workload.format}
        _print_json(head | report.to_dict() | {"warnings": list(workload.warnings)})
    else:
        from kvtune.cli.trace_text import lint_text

        say(lint_text(str(file), report))
    return 0 if report.is_clean else 1


@trace.command("forecast")
def forecast(
    file: _File,
    capacity_blocks: Annotated[
        str, typer.Option(help="Capacities in blocks, comma-separated; inf for unbounded.")
    ] = "inf",
    policy: Annotated[str, typer.Option(help="Eviction policy.")] = "lru",
    history: Annotated[
        float, typer.Option(help="Share of the requests to forecast from; 1 for what comes after the file.")
    ] = 0.5,
    format_: TraceFormat = "auto",
    trace_block_size: TraceBlockSize = None,
    block_size: _BlockSize = None,
    limit: _Limit = None,
    as_json: _Json = False,
) -> None:
    """Forecast from the first half of a trace what a cache will hit, and compare with its second half; a
    trace that drifts is flagged instead."""
    capacities = _capacities(capacity_blocks)
    workload = _load(file, format_, trace_block_size, limit)
    from kvtune.cache.forecast import forecast_hit_rate
    from kvtune.workload import block_trace

    blocks = block_trace(workload, block_size)
    found = [forecast_hit_rate(blocks, c, policy=policy, history=history) for c in capacities]
    if as_json:
        _print_json(
            {
                "schema_version": 1, "path": str(file), "format": workload.format,
                "block_size": blocks.block_size, "num_requests": blocks.num_requests,
                "forecasts": [one.to_dict() for one in found],
                "notes": [*workload.notes, *blocks.notes], "warnings": list(workload.warnings),
            }
        )  # fmt: skip
        return
    from kvtune.cli.trace_text import forecast_text

    say(forecast_text(str(file), blocks.block_size, found))


@trace.command("anonymise")
def anonymise(
    file: _File,
    out: Annotated[Path, typer.Argument(help="File to write, kvtune JSONL; packed where it ends in .gz.")],
    salt_file: Annotated[
        Path | None,
        typer.Option(
            help="File of 16 or more secret bytes, to hash alike again; default a new, unkept salt."
        ),
    ] = None,
    format_: TraceFormat = "auto",
    trace_block_size: TraceBlockSize = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens per block for text and token ids; default 16.")
    ] = None,
    limit: _Limit = None,
    as_json: _Json = False,
) -> None:
    """Write a workload with salted block hashes in place of its text; it replays to the same block reuse."""
    workload = _load(file, format_, trace_block_size, limit)
    written = _write_anonymised(workload, file, out, salt_file, block_size)
    if as_json:
        _print_json({"schema_version": 1, "path": str(file), **written})
        return
    say(
        f"{written['num_requests']:,} requests written to {out} without text\n"
        f"next: kvtune trace {out}"
    )  # fmt: skip


def _load(file: Path, format_: str, trace_block_size: int | None, limit: int | None) -> Workload:
    """The workload, with one line on stderr for each thing that was wrong with the file."""
    from kvtune.cli.progress import TimeLeft
    from kvtune.workload import load_workload

    with TimeLeft() as time_left:
        workload = load_workload(
            file,
            format=format_,
            trace_block_size=trace_block_size,
            limit=limit,
            progress=(lambda share: time_left(share, f"reading {file.name}")) if _is_watched() else None,
        )
    for warning in workload.warnings:
        say(f"kvtune: warning: {warning}", is_aside=True)
    return workload


def _is_watched() -> bool:
    """Elsewhere stderr is for warnings and the one line of an error."""
    return sys.stderr is not None and sys.stderr.isatty()


def _write_anonymised(
    workload: Workload, file: Path, out: Path, salt_file: Path | None, block_size: int | None
) -> dict[str, Any]:
    from kvtune.errors import UsageError
    from kvtune.workload import anonymise, write_workload

    if out.exists() and out.samefile(file):
        raise UsageError(f"{out}: is the file to be anonymised; name another file to write")
    hidden = anonymise(workload, salt=_salt(salt_file), block_size=block_size)
    write_workload(hidden, out)
    return {
        "written": str(out),
        "num_requests": len(hidden.requests),
        "block_size": hidden.block_size,
        "notes": list(hidden.notes),
    }


def _salt(path: Path | None) -> bytes:
    from kvtune.errors import InputFileError

    if path is None:
        import secrets

        return secrets.token_bytes(32)
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError as error:
        raise InputFileError(
            f"{path}: cannot be read: {error.strerror}; name a file of secret bytes"
        ) from error


def _share(text: str) -> float:
    from kvtune.errors import UsageError

    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--max-loss is a share such as 1% or 0.01, found {text!r}") from None


def _capacities(text: str) -> list[int | None]:
    from kvtune.errors import UsageError

    found: list[int | None] = []
    for word in text.split(","):
        if word.strip() == "inf":
            found.append(None)
        elif word.strip().isdecimal() and int(word) >= 1:
            found.append(int(word))
        else:
            raise UsageError(f"--capacity-blocks takes whole numbers of at least 1, or inf, found {word!r}")
    return found


def _print_json(found: dict[str, Any]) -> None:
    print(json.dumps(found, allow_nan=False))
