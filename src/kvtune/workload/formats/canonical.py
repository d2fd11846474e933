"""kvtune's own JSONL: a header line, then one request a line. `write_workload` and the reader are
inverse for everything a request holds. Lone surrogates survive (JSON escapes)."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

from kvtune.errors import UsageError
from kvtune.workload.formats.record import Format
from kvtune.workload.request import Message, Workload, WorkloadRequest
from kvtune.workload.row import Row

__all__ = ["FORMAT", "HEADER", "write_workload"]

HEADER: Final = "kvtune_workload"
VERSION: Final = 1


def parse(row: Row) -> Iterator[WorkloadRequest]:
    if HEADER in row.fields:
        if row.integer(HEADER) != VERSION:
            row.fail(f"'{HEADER}' is version {row.integer(HEADER)}; this kvtune reads version {VERSION}")
        return
    optional = row.fields.get
    yield WorkloadRequest(
        request_id=row.identifier("request_id"),
        arrival_s=row.time("arrival_s", default=0.0),
        prompt=None if optional("prompt") is None else row.text("prompt"),
        messages=tuple(Message(m.text("role"), m.text("content")) for m in _optional_rows(row, "messages")),
        token_ids=None if optional("token_ids") is None else row.integers("token_ids"),
        hash_ids=None if optional("hash_ids") is None else row.integers("hash_ids", low=0),
        hash_lengths=None if optional("hash_lengths") is None else row.integers("hash_lengths", low=0),
        tools=tuple(_texts(row, "tools")),
        input_length=row.optional_integer("input_length"),
        output_length=row.optional_integer("output_length"),
        max_tokens=row.optional_integer("max_tokens"),
        answer=None if optional("answer") is None else row.text("answer"),
        session_id=row.text("session_id", default=""),
        cache_salt=row.text("cache_salt", default=""),
        priority=row.integer("priority", default=0),
        tags=_tags(row),
        problem=None if optional("problem") is None else row.text("problem"),
    )


def _optional_rows(row: Row, name: str) -> list[Row]:
    return [] if row.fields.get(name) is None else row.rows(name)


def _texts(row: Row, name: str) -> list[str]:
    if row.fields.get(name) is None:
        return []
    found = row.items(name)
    if not all(isinstance(text, str) for text in found):
        row.fail(f"'{name}' must be a list of texts")
    return list(found)


def _tags(row: Row) -> dict[str, str]:
    if row.fields.get("tags") is None:
        return {}
    tags = row.row("tags")
    return {name: tags.text(name) for name in tags.fields}


def write_workload(workload: Workload, path: str | Path) -> None:
    """Write a workload as kvtune JSONL, packed where the name ends in .gz. Raises UsageError when the file
    cannot be written."""
    header = {
        HEADER: VERSION, "block_size": workload.block_size, "is_synthetic_text": workload.is_synthetic_text,
        "source_format": workload.format, "source_sha256": workload.sha256, "notes": list(workload.notes),
    }  # fmt: skip
    try:
        with _open(Path(path)) as file:
            file.write(json.dumps(header).encode("ascii") + b"\n")
            for request in workload.requests:
                file.write(json.dumps(_record(request)).encode("ascii") + b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}; choose another file") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix != ".gz":
        return path.open("wb")
    return cast("IO[bytes]", gzip.open(path, "wb", compresslevel=6))


def _record(request: WorkloadRequest) -> dict[str, Any]:
    """Only what differs from the defaults, so that hash traces stay small."""
    record: dict[str, Any] = {"request_id": request.request_id, "arrival_s": request.arrival_s}
    empty = WorkloadRequest(request_id="")
    for item in dataclasses.fields(request):
        value = getattr(request, item.name)
        if item.name not in record and value != getattr(empty, item.name):
            record[item.name] = value
    if request.messages:
        record["messages"] = [dataclasses.asdict(message) for message in request.messages]
    if request.tags:
        record["tags"] = dict(request.tags)
    return record


FORMAT: Final = Format(
    name="kvtune",
    title="kvtune workload",
    matches=lambda first: HEADER in first or ("request_id" in first and "arrival_s" in first),
    parse=parse,
    columns=frozenset(
        (
            HEADER,
            "block_size",
            "is_synthetic_text",
            "source_format",
            "source_sha256",
            "notes",
            *(item.name for item in dataclasses.fields(WorkloadRequest)),
        )
    ),
)
