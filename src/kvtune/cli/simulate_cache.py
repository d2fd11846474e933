"""`kvtune simulate --mode cache`: what a prefix cache of a given size and policy would hit on a trace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.options import Html, TraceBlockSize, TraceFormat
from kvtune.cli.screen import say

if TYPE_CHECKING:
    from kvtune.cache.replay import Replayer
    from kvtune.cache.replay_study import CapacityRow
    from kvtune.workload import Workload

SCHEMA_VERSION = 1
_MOST_TENANTS = 20


def cache(
    trace: Annotated[
        Path | None, typer.Argument(help="Request file or trace: JSON, JSONL or CSV, plain or gzip.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Eviction policies, comma-separated, or all; default the shipped one."),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            "--capacity-blocks",
            "--capacity",
            help="Cache sizes, comma-separated: blocks, inf, 10% of the distinct blocks, 32GiB of KV.",
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens per block; default the trace's own, 16 for text.")
    ] = None,
    full_blocks_only: Annotated[
        bool,
        typer.Option("--full-blocks-only", help="Serve by the engine's rules: only full blocks are cached."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Model whose KV the blocks hold: gives sizes in bytes; see kvtune plan."),
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="KV precision of --model: auto, bf16, fp8, int8, ...; see kvtune plan.")
    ] = None,
    bytes_per_token: Annotated[
        int | None, typer.Option(help="KV bytes per token, where there is no --model.")
    ] = None,
    more: Annotated[
        str | None, typer.Option(help="What would this much more memory (or this many blocks) buy?")
    ] = None,
    tenants: Annotated[
        bool, typer.Option("--tenants", help="Show every tenant, not the largest twenty.")
    ] = False,
    format_: TraceFormat = "auto",
    trace_block_size: TraceBlockSize = None,
    html: Html = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Replay a trace against prefix caches of given sizes and eviction policies."""
    from kvtune.cache.replay import Replayer
    from kvtune.cache.replay_report import study_record
    from kvtune.cache.replay_study import study
    from kvtune.cli.progress import TimeLeft
    from kvtune.cli.simulate_cache_text import as_text
    from kvtune.errors import UsageError
    from kvtune.workload import block_trace, load_workload

    if trace is None:
        raise UsageError("simulate needs a request file or trace; see `kvtune simulate --help`")
    policies = _policies(policy)
    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"--html {html}: there is no folder {html.absolute().parent}; create it first")
    with TimeLeft() as progress:
        workload = load_workload(
            trace,
            format=format_,
            trace_block_size=trace_block_size,
            progress=lambda share: progress(share, f"reading {trace.name}"),
        )
    blocks = block_trace(workload, block_size)
    block_bytes = _block_bytes(blocks.block_size, model, kv_dtype, bytes_per_token)
    capacities = _capacities(capacity, blocks.num_unique, block_bytes)
    extra, extra_text = _more_blocks(more, block_bytes)
    replayer = Replayer(blocks, full_blocks_only=full_blocks_only)
    with TimeLeft() as progress:
        found = study(replayer, policies, capacities, more_blocks=extra, progress=progress)
    record = study_record(replayer, found, block_bytes)
    record = {"schema_version": SCHEMA_VERSION, "path": str(trace), "format": workload.format, **record}
    record["more_memory"] = None if extra is None else {"asked": extra_text, "blocks": extra}
    record["notes"] = [*workload.notes, *blocks.notes, *_notes(replayer, found.rows)]
    if html is not None:
        _write_page(html, record, workload)
    most_tenants = len(blocks.tenants) if tenants else _MOST_TENANTS
    if as_json:
        print(json.dumps(record))
    else:
        say(as_text(record, most_tenants=most_tenants))


# -- what was asked --


def _policies(text: str | None) -> tuple[str, ...]:
    from kvtune.cache.replay import DEFAULT_POLICY, policy_names
    from kvtune.errors import UsageError

    if text is None:
        return (DEFAULT_POLICY,)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if names == ("all",):
        return policy_names()
    unknown = [name for name in names if name not in policy_names()]
    if unknown or not names:
        found = unknown[0] if unknown else text
        raise UsageError(f"unknown eviction policy {found!r}; known: {', '.join(policy_names())}, all")
    return names


def _block_bytes(
    block_size: int, model: str | None, kv_dtype: str | None, bytes_per_token: int | None
) -> int | None:
    """Bytes of KV one block of the trace stands for, None where neither model nor figure is given."""
    from kvtune.errors import UsageError

    if bytes_per_token is not None:
        if model is not None:
            raise UsageError("--model and --bytes-per-token say the same thing twice; give one of them")
        if bytes_per_token < 1:
            raise UsageError(f"--bytes-per-token must be at least 1, found {bytes_per_token}")
        return bytes_per_token * block_size
    if model is None:
        if kv_dtype is not None:
            raise UsageError("--kv-dtype needs --model, whose KV cache it sizes")
        return None
    from kvtune.plan import PlanRequest, find_model, size_model

    engine_block = 16 if block_size % 16 == 0 else block_size
    sizing = size_model(find_model(model), PlanRequest(kv_dtype=kv_dtype or "auto", block_size=engine_block))
    size = sizing.model.prefix_bytes(block_size)
    if not size:
        raise UsageError(f"{model} keeps no KV per token, so memory is not counted in blocks of it")
    return size


def _capacities(text: str | None, num_unique: int, block_bytes: int | None) -> tuple[int | None, ...]:
    from kvtune.cache.replay_study import default_capacities
    from kvtune.errors import UsageError

    if text is None:
        return default_capacities(num_unique)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked:
        raise UsageError(f"--capacity needs at least one size, found {text!r}")
    return tuple(dict.fromkeys(_capacity(part, num_unique, block_bytes) for part in asked))


def _capacity(text: str, num_unique: int, block_bytes: int | None) -> int | None:
    from kvtune.errors import UsageError

    if text.lower() in {"inf", "infinite", "unbounded"}:
        return None
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if share is not None:
        return max(1, round(float(share[1]) / 100 * num_unique))
    blocks = (
        int(text.replace("_", "")) if re.fullmatch(r"[0-9][0-9_]*", text) else _in_blocks(text, block_bytes)
    )
    if not 1 <= blocks < 1 << 62:
        raise UsageError(f"a capacity is at least 1 block and no astronomical number, found {text!r}")
    return blocks


def _in_blocks(text: str, block_bytes: int | None) -> int:
    from kvtune.config import parse_bytes
    from kvtune.errors import UsageError

    try:
        size = parse_bytes(text)
    except UsageError:
        raise UsageError(
            f"a capacity is a number of blocks, inf, a share (10%) or a size (32GiB), found {text!r}"
        ) from None
    if block_bytes is None:
        raise UsageError(f"{text} of KV memory is so many blocks only with --model or --bytes-per-token")
    return size // block_bytes


def _more_blocks(text: str | None, block_bytes: int | None) -> tuple[int | None, str]:
    """Blocks to add and how to say it; 32 GiB where sizes are known and nothing was asked."""
    if text is None:
        return (None, "") if block_bytes is None else (_in_blocks("32GiB", block_bytes), "32GiB")
    if re.fullmatch(r"[0-9][0-9_]*", text):
        return int(text.replace("_", "")), f"{text} blocks"
    return _in_blocks(text, block_bytes), text


# -- what is answered --


def _write_page(path: Path, record: dict[str, Any], workload: Workload) -> None:
    from kvtune.errors import UsageError
    from kvtune.report.pages import render_simulation
    from kvtune.workload import workload_statistics

    page = render_simulation({**record, "statistics": workload_statistics(workload)})
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path}: cannot be written: {error.strerror}; choose another file") from None


def _notes(replayer: Replayer, rows: tuple[CapacityRow, ...]) -> list[str]:
    notes: list[str] = []
    if replayer.core == "python":
        notes.append("pure-Python replay: the native core was not built (no C++ compiler at installation)")
    for row in rows:
        if row.results[0].num_rejected:
            notes.append(
                f"{row.results[0].num_rejected:,} requests need more than {row.capacity_blocks:,} blocks and "
                "are refused, as an engine would"
            )
    return notes
