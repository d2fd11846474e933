"""Reading a workload file: recognise the format, say so, check every record."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

from kvtune.errors import InputFileError, UsageError
from kvtune.workload.formats import FORMATS, Format
from kvtune.workload.formats.canonical import HEADER
from kvtune.workload.ingest import MAX_HELD_BYTES, BlockSizes, Ingest, check_positive
from kvtune.workload.records import read_rows
from kvtune.workload.request import Workload, WorkloadRequest
from kvtune.workload.row import Row
from kvtune.workload.source import Source

__all__ = ["load_workload"]


def load_workload(
    path: str | Path,
    *,
    format: str = "auto",  # noqa: A002
    trace_block_size: int | None = None,
    limit: int | None = None,
    max_held_bytes: int = MAX_HELD_BYTES,
    progress: Callable[[float], None] | None = None,
) -> Workload:
    """Read a workload file, plain or gzip, in any format of `FORMATS`.

    `trace_block_size`: prompt tokens per hash id; without it, it is the only size under which every row
    has as many ids as blocks. `limit`: keep the first so many requests of the file (all rows still help
    to find the block size). Arrivals are shifted so that the first is 0 s. The file is streamed; what is
    kept takes at most about `max_held_bytes` of memory. `progress` is told the share that was read.

    Raises InputFileError (with the line) for what cannot be parsed or held, UsageError for an unknown
    format, a limit or block size below 1, or a block size that the file does not determine.
    """
    check_positive(trace_block_size=trace_block_size, limit=limit)
    source = Source(Path(path), progress=progress)
    is_csv, rows = read_rows(source)
    first = next(rows, None)
    if first is None:
        raise InputFileError(
            f"{source.path}: holds one line that is not JSON and no rows below it; nothing to read"
        )
    chosen, note = _choose_format(source, first, format, is_csv=is_csv)
    trace_block_size = trace_block_size or chosen.block_size
    ingest = Ingest(chosen, trace_block_size, limit, max_held_bytes)
    ingest.read(itertools.chain([first], rows))
    requests, notes = ingest.requests, [note]
    if chosen.finish is not None:
        requests, found = chosen.finish(requests, source.path)
        notes += found
    if not requests:
        raise InputFileError(f"{source.path}: no request found in {chosen.title}; nothing to serve")
    notes += _arrival_notes(requests)
    header = first.fields if HEADER in first.fields else {}
    is_hashed = any(r.hash_ids is not None and r.hash_lengths is None for r in requests)
    block_size = _block_size(source, chosen, ingest.sizes, trace_block_size, header) if is_hashed else None
    if block_size:
        notes.append(f"trace block size: {block_size} tokens per hash id")
    warnings = tuple(ingest.warnings())
    return Workload(
        requests=tuple(_arrange(requests))[:limit],
        format=chosen.name,
        path=source.path,
        sha256=source.sha256(),
        notes=(*notes, *warnings),
        warnings=warnings,
        is_synthetic_text=header.get("is_synthetic_text") is True or any(r.is_synthetic for r in requests),
        block_size=block_size,
    )


def _choose_format(source: Source, first: Row, asked: str, *, is_csv: bool) -> tuple[Format, str]:
    if asked != "auto":
        if asked not in FORMATS:
            raise UsageError(f"unknown workload format {asked!r}; choose auto or one of {', '.join(FORMATS)}")
        chosen = FORMATS[asked]
        if chosen.is_csv != is_csv:
            expected, found = ("CSV", "JSON") if chosen.is_csv else ("JSON", "CSV")
            raise InputFileError(f"{source.path}: format {asked} is {expected}, found {found}")
        return chosen, f"format: {chosen.name} ({chosen.title}), as asked"
    for chosen in FORMATS.values():
        if chosen.is_csv == is_csv and chosen.matches(first.fields):
            return chosen, f"format: {chosen.name} ({chosen.title}), detected from line {first.line}"
    kind = "text, but its columns are those of no known CSV:" if is_csv else "JSON, but no known format has"
    found = ascii(sorted(first.fields))[:120]
    raise InputFileError(
        f"{source.path}, line {first.line}: {kind} {found}; known formats: {', '.join(FORMATS)}"
    )


def _block_size(source: Source, chosen: Format, sizes: BlockSizes, asked: int | None, header: object) -> int:
    if asked is not None:
        return asked
    stated = header.get("block_size") if isinstance(header, dict) else None
    if isinstance(stated, int) and stated >= 1:
        return stated
    if sizes.low == sizes.high:
        return sizes.low
    raise UsageError(
        f"{source.path}: the block size of this {chosen.name} trace cannot be told from its rows: "
        f"{sizes.describe()}; "
        "say it with --trace-block-size"
    )


def _arrival_notes(requests: list[WorkloadRequest]) -> list[str]:
    if len(requests) > 1 and len({request.arrival_s for request in requests}) == 1:
        return ["no arrival times: all requests arrive at 0 s"]
    return []


def _arrange(requests: list[WorkloadRequest]) -> list[WorkloadRequest]:
    start = min(request.arrival_s for request in requests)
    if start:
        requests = [dataclasses.replace(r, arrival_s=r.arrival_s - start) for r in requests]
    return sorted(requests, key=lambda request: request.arrival_s)
