"""Reading a workload file: recognise the format, say so, check every record."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvtune.errors import InputFileError, UsageError
from kvtune.workload.formats import FORMATS, Format
from kvtune.workload.formats.canonical import HEADER
from kvtune.workload.records import read_rows
from kvtune.workload.request import Workload, WorkloadRequest
from kvtune.workload.row import Row
from kvtune.workload.source import Source

__all__ = ["load_workload"]


def load_workload(
    path: str | Path, *, format: str = "auto", trace_block_size: int | None = None, limit: int | None = None  # noqa: A002
) -> Workload:  # fmt: skip
    """Read a workload file, plain or gzip, in any format of `FORMATS`.

    `trace_block_size`: prompt tokens per hash id; without it, it is the only size under which every row
    has as many ids as blocks. `limit`: keep the first so many requests of the file (all rows still help
    to find the block size). Arrivals are shifted so that the first is 0 s.

    Raises InputFileError (with the line) for what cannot be parsed, UsageError for an unknown format,
    a limit or block size below 1, or a block size that the file does not determine.
    """
    for name, value in (("trace_block_size", trace_block_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, found {value}")
    source = Source(Path(path))
    is_csv, rows = read_rows(source)
    first = next(rows, None)
    if first is None:
        raise InputFileError(
            f"{source.path}: holds one line that is not JSON and no rows below it; nothing to read"
        )
    chosen, note = _choose_format(source, first, format, is_csv=is_csv)
    trace_block_size = trace_block_size or chosen.block_size
    requests, sizes = _read(chosen, itertools.chain([first], rows), trace_block_size, limit)
    if not requests:
        raise InputFileError(f"{source.path}: no request found in {chosen.title}; nothing to serve")
    header = first.fields if HEADER in first.fields else {}
    has_hashes = any(request.hash_ids is not None for request in requests)
    block_size = _block_size(source, chosen, sizes, trace_block_size, header) if has_hashes else None
    notes = [note, *_arrival_notes(requests)]
    if block_size:
        notes.append(f"trace block size: {block_size} tokens per hash id")
    return Workload(
        requests=tuple(_arrange(chosen, requests)),
        format=chosen.name,
        path=source.path,
        sha256=source.sha256(),
        notes=tuple(notes),
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


@dataclass(slots=True)
class _BlockSizes:
    """The block sizes B in [low, high] with ceil(input_length / B) == len(hash_ids) in every row so far."""

    low: int = 1
    high: int | None = None

    def narrow(self, input_length: int, num_ids: int) -> None:
        if num_ids == 0 or input_length <= 0:
            if input_length > 0:
                self.high = 0
            return
        self.low = max(self.low, -(-input_length // num_ids))
        if num_ids > 1:
            # ceil(L / B) > n - 1  <=>  B < L / (n - 1)
            high = -(-input_length // (num_ids - 1)) - 1
            self.high = high if self.high is None else min(self.high, high)


def _read(
    chosen: Format, rows: Iterator[Row], trace_block_size: int | None, limit: int | None
) -> tuple[list[WorkloadRequest], _BlockSizes]:
    requests: list[WorkloadRequest] = []
    seen: set[str] = set()
    sizes = _BlockSizes()
    for row in rows:
        for request in chosen.parse(row):
            if request.hash_ids is not None:
                _check_hashes(row, request, trace_block_size)
                sizes.narrow(request.input_length or 0, len(request.hash_ids))
            if limit is not None and len(requests) >= limit:
                if request.hash_ids is None or trace_block_size is not None:
                    return requests, sizes
                continue
            requests.append(_with_unique_id(request, row.line, seen))
    return requests, sizes


def _check_hashes(row: Row, request: WorkloadRequest, trace_block_size: int | None) -> None:
    if request.input_length is None:
        row.fail("'input_length' is missing; a request with 'hash_ids' needs it")
    ids = request.hash_ids or ()
    if (
        trace_block_size
        and request.input_length > 0
        and len(ids) > -(-request.input_length // trace_block_size)
    ):
        row.fail(
            f"{len(ids)} hash ids for {request.input_length} tokens, more than blocks of "
            f"{trace_block_size} tokens; give another --trace-block-size"
        )


def _with_unique_id(request: WorkloadRequest, line: int, seen: set[str]) -> WorkloadRequest:
    """Engines need unique ids; files repeat them (ShareGPT splits long conversations, logs retry)."""
    unique = request.request_id
    if unique in seen:
        unique = next(
            name for n in itertools.count() if (name := f"{unique}@{line}" + f".{n}" * (n > 0)) not in seen
        )
    seen.add(unique)
    return request if unique == request.request_id else dataclasses.replace(request, request_id=unique)


def _block_size(source: Source, chosen: Format, sizes: _BlockSizes, asked: int | None, header: object) -> int:
    if asked is not None:
        return asked
    stated = header.get("block_size") if isinstance(header, dict) else None
    if isinstance(stated, int) and stated >= 1:
        return stated
    if sizes.low == sizes.high:
        return sizes.low
    if sizes.high is None or sizes.low < sizes.high:
        found = f"every size from {sizes.low} to {sizes.high or 'any'} fits"
    else:
        found = "no size gives every row as many blocks as it has hash ids"
    raise UsageError(
        f"{source.path}: the block size of this {chosen.name} trace cannot be told from its rows: {found}; "
        "say it with --trace-block-size"
    )


def _arrival_notes(requests: list[WorkloadRequest]) -> list[str]:
    if len(requests) > 1 and len({request.arrival_s for request in requests}) == 1:
        return ["no arrival times: all requests arrive at 0 s"]
    return []


def _arrange(chosen: Format, requests: list[WorkloadRequest]) -> list[WorkloadRequest]:
    if chosen.finish is not None:
        requests = chosen.finish(requests)
    start = min(request.arrival_s for request in requests)
    if start:
        requests = [dataclasses.replace(r, arrival_s=r.arrival_s - start) for r in requests]
    return sorted(requests, key=lambda request: request.arrival_s)
