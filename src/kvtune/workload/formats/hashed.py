"""Traces of lengths and block hashes, one JSON object a line.

Mooncake (FAST'25): `timestamp` ms, `input_length`, `output_length`, `hash_ids`, one id per block of
the prompt. Bailian (ATC'25): the same with seconds, `chat_id` and `parent_chat_id`, 16-token blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from kvtune.workload.formats.record import Format
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

_MILLISECOND: Final = 1e-3


def parse_mooncake(row: Row) -> Iterator[WorkloadRequest]:
    yield WorkloadRequest(
        request_id=row.identifier("request_id", default=f"line-{row.line}"),
        arrival_s=row.number("timestamp", default=0.0) * _MILLISECOND,
        input_length=row.integer("input_length"),
        output_length=row.optional_integer("output_length"),
        hash_ids=row.integers("hash_ids", low=0),
        session_id=row.identifier("session_id", default=""),
        priority=row.integer("priority", default=0),
    )


def parse_bailian(row: Row) -> Iterator[WorkloadRequest]:
    kind = row.text("type", default="")
    yield WorkloadRequest(
        request_id=row.identifier("chat_id"),
        arrival_s=row.number("timestamp", default=0.0),
        input_length=row.integer("input_length"),
        output_length=row.optional_integer("output_length"),
        hash_ids=row.integers("hash_ids", low=0),
        session_id=row.identifier("parent_chat_id", default="-1"),
        tags={"kind": kind} if kind else {},
    )


def join_chains(requests: list[WorkloadRequest]) -> list[WorkloadRequest]:
    """Replace each parent id by the id of the chat at the head of the chain (itself where unknown)."""
    roots: dict[str, str] = {}
    joined: list[WorkloadRequest] = []
    for request in requests:
        root = roots.get(request.session_id, request.request_id)
        roots.setdefault(request.request_id, root)
        joined.append(dataclasses.replace(request, session_id=root))
    return joined


MOONCAKE: Final = Format(
    name="mooncake",
    title="Mooncake trace (lengths and block hashes)",
    matches=lambda first: "hash_ids" in first and "input_length" in first,
    parse=parse_mooncake,
)
BAILIAN: Final = Format(
    name="bailian",
    title="Bailian trace (lengths and block hashes)",
    matches=lambda first: "hash_ids" in first and "chat_id" in first,
    parse=parse_bailian,
    finish=join_chains,
)
