"""RAGPulse (arXiv 2511.12979): one JSON object a line, `{timestamp s, input_length, output_length,
session_id, hash_ids: {sys_prompt, passages_ids, history, web_search, user_input}}`.

Ids name content chunks in prompt order, not prefixes, and chunks have lengths of their own. The publisher
keeps those in other files (joined as `kind,id,token_length`), which are looked for beside the trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

from kvtune.errors import InputFileError
from kvtune.workload.formats.record import Format
from kvtune.workload.records import read_rows
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row
from kvtune.workload.source import Source

_KINDS: Final = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")
_CHUNK_COLUMNS: Final = frozenset(("kind", "id", "token_length"))
_MAX_CHUNK_TOKENS: Final = 512
_MAX_TABLE_BYTES: Final = 2**30


def parse(row: Row) -> Iterator[WorkloadRequest]:
    chunks = row.row("hash_ids")
    unknown = chunks.fields.keys() - set(_KINDS)
    if unknown:
        row.fail(f"'hash_ids' has a kind of chunk that RAGPulse does not: {ascii(min(unknown))[:60]}")
    kinds = [kind for kind in _KINDS if chunks.fields.get(kind) is not None]
    yield WorkloadRequest(
        request_id=f"line-{row.line}",
        arrival_s=row.time("timestamp"),
        input_length=row.tokens("input_length"),
        output_length=row.optional_tokens("output_length"),
        hash_ids=tuple(i for kind in kinds for i in chunks.integers(kind, low=0)),
        session_id=row.identifier("session_id", default=""),
    )


def measure(requests: list[WorkloadRequest], path: Path) -> tuple[list[WorkloadRequest], list[str]]:
    """Give each chunk its length: from the table beside the trace, else one mean length for all."""
    table = _table_beside(path)
    lengths = {} if table is None else _read_table(table)
    missing = {i for request in requests for i in request.hash_ids or () if i not in lengths}
    mean = _mean_length(requests)
    lengths.update(dict.fromkeys(missing, mean))
    measured = [
        dataclasses.replace(request, hash_lengths=tuple(lengths[i] for i in request.hash_ids or ()))
        for request in requests
    ]
    notes = [] if table is None else [f"chunk lengths read from {table.name}"]
    if missing:
        notes.append(
            f"lengths of {len(missing)} content chunks are unknown and taken as the mean, {mean} tokens; put "
            "ragpulse_chunk_tokens.csv (kind,id,token_length) beside the trace"
        )
    return measured, notes


def _mean_length(requests: Sequence[WorkloadRequest]) -> int:
    tokens = sum(request.input_length or 0 for request in requests)
    num_chunks = sum(len(request.hash_ids or ()) for request in requests)
    return max(1, min(_MAX_CHUNK_TOKENS, tokens // max(1, num_chunks)))


def _table_beside(path: Path) -> Path | None:
    names = (f"ragpulse_chunk_tokens.csv{end}" for end in (".gz", ""))
    return next((table for name in names if (table := path.parent / name).is_file()), None)


def _read_table(path: Path) -> dict[int, int]:
    source = Source(path)
    if source.size > _MAX_TABLE_BYTES:
        raise InputFileError(f"{path}: over {_MAX_TABLE_BYTES} bytes, too large for a table of chunk lengths")
    is_csv, rows = read_rows(source)
    lengths: dict[int, int] = {}
    for row in rows:
        if not is_csv or not row.fields.keys() >= _CHUNK_COLUMNS:
            row.fail("a table of chunk lengths has the columns kind, id and token_length")
        lengths[_chunk_id(row)] = row.tokens("token_length")
    return lengths


def _chunk_id(row: Row) -> int:
    number = row.text("id")
    if not (number.isascii() and number.isdecimal() and len(number) < 19):
        row.fail(f"'id' must be a whole number, found {ascii(number)[:60]}")
    return int(number)


def parse_chunk(row: Row) -> Iterator[WorkloadRequest]:
    yield WorkloadRequest(
        request_id=f"chunk-{_chunk_id(row)}",
        input_length=row.tokens("token_length"),
        tags={"kind": row.text("kind")},
    )


def say_chunks(requests: list[WorkloadRequest], _: Path) -> tuple[list[WorkloadRequest], list[str]]:
    return requests, [
        "these are content chunks of a RAGPulse trace, not requests: their lengths are read when the trace "
        "beside them is named"
    ]


def _is_ragpulse(hashes: Any) -> bool:
    return isinstance(hashes, dict) and not cast("dict[str, Any]", hashes).keys().isdisjoint(_KINDS)


REQUESTS: Final = Format(
    name="ragpulse",
    title="RAGPulse trace (lengths and content chunks)",
    matches=lambda first: _is_ragpulse(first.get("hash_ids")),
    parse=parse,
    finish=measure,
    columns=frozenset(("timestamp", "input_length", "output_length", "session_id", "hash_ids")),
)
CHUNKS: Final = Format(
    name="ragpulse_chunks",
    title="RAGPulse table of content chunks",
    matches=lambda first: first.keys() >= _CHUNK_COLUMNS,
    parse=parse_chunk,
    finish=say_chunks,
    columns=_CHUNK_COLUMNS,
    is_csv=True,
)
