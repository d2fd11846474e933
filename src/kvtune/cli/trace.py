"""`kvtune trace`: what a request file or trace holds and how much of it repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def trace(
    file: Annotated[Path, typer.Argument(help="Request file or trace: JSON, JSONL or CSV, plain or gzip.")],
    format_: Annotated[
        str, typer.Option("--format", help="auto, or the format's name; an unknown name lists them.")
    ] = "auto",
    trace_block_size: Annotated[
        int | None,
        typer.Option(help="Prompt tokens per hash id, for traces whose rows do not determine it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Read a request file or trace: lengths, arrivals, and the best hit rate prefix caching could reach."""
    from kvtune.workload import load_workload, workload_statistics

    statistics = workload_statistics(load_workload(file, format=format_, trace_block_size=trace_block_size))
    print(json.dumps(statistics) if as_json else _as_text(statistics))


def _as_text(statistics: dict[str, Any]) -> str:
    cv = statistics["arrival_cv"]
    arrivals = "not recorded" if cv is None else f"over {statistics['duration_s']:,.0f} s, gap CV {cv:.2f}"
    lines = [
        f"{statistics['path']}",
        *(f"  {note}" for note in statistics["notes"]),
        f"requests   {statistics['num_requests']:,} in {statistics['num_sessions']:,} sessions",
        f"arrivals   {arrivals}",
        f"prompt     {_lengths(statistics['input_tokens'])}",
        f"output     {_lengths(statistics['output_tokens'])}",
        f"reuse      {_reuse(statistics['prefix'])}",
    ]
    return "\n".join(lines)


def _lengths(lengths: dict[str, Any] | None) -> str:
    if lengths is None:
        return "length not recorded"
    quantiles = ", ".join(f"{name} {lengths[name]:,.0f}" for name in ("p50", "p90", "p99", "max"))
    return f"{quantiles} {lengths['unit']}"


def _reuse(prefix: dict[str, Any]) -> str:
    if prefix["ideal_block_hit_rate"] is None:
        return "unknown: the trace holds lengths only"
    unit, rate = prefix["unit"], prefix["ideal_block_hit_rate"]
    counts = f"{prefix['hit_blocks']:,} of {prefix['total_blocks']:,}, {prefix['block_size']} {unit} each"
    return f"at most {prefix['ideal_token_hit_rate']:.1%} of {unit}, {rate:.1%} of blocks ({counts})"
