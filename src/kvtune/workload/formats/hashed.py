"""Traces of lengths and block hashes, one JSON object a line.

Mooncake (FAST'25): `timestamp` ms, `input_length`, `output_length`, `hash_ids`, one id per block of the
prompt; AIPerf also writes `text_input` or `messages` in place of the hashes, and `delay` ms after the
session's turn before. Bailian (ATC'25): seconds, `chat_id` and `parent_chat_id`, 16-token blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvtune.workload.formats.openai_chat import parse_chat
from kvtune.workload.formats.record import Format
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

_MILLISECOND: Final = 1e-3
_DELAY: Final = "delay_ms"


def parse_mooncake(row: Row) -> Iterator[WorkloadRequest]:
    delay = row.fields.get("delay")
    yield dataclasses.replace(
        _prompt(row),
        arrival_s=row.time("timestamp", default=0.0) * _MILLISECOND,
        output_length=row.optional_tokens("output_length"),
        session_id=row.identifier("session_id", default=""),
        priority=row.integer("priority", default=0),
        tags={} if delay is None else {_DELAY: str(row.time("delay"))},
    )


def _prompt(row: Row) -> WorkloadRequest:
    if row.fields.get("messages") is not None:
        return next(parse_chat(row))
    request_id = row.identifier("request_id", default=f"line-{row.line}")
    if row.fields.get("text_input") is not None:
        return WorkloadRequest(request_id=request_id, prompt=row.text("text_input"))
    has_hashes = row.fields.get("hash_ids") is not None
    return WorkloadRequest(
        request_id=request_id,
        input_length=row.tokens("input_length"),
        hash_ids=row.integers("hash_ids", low=0) if has_hashes else None,
    )


def place_turns(requests: list[WorkloadRequest], _: Path) -> tuple[list[WorkloadRequest], list[str]]:
    """Let a turn with a delay arrive that long after the turn of its session before it."""
    last: dict[str, float] = {}
    placed: list[WorkloadRequest] = []
    num_delays = 0
    for request in requests:
        delay = request.tags.get(_DELAY)
        if delay is not None:
            num_delays += 1
            arrival = last.get(request.session_id, request.arrival_s) + float(delay) * _MILLISECOND
            request = dataclasses.replace(request, arrival_s=arrival, tags={})  # noqa: PLW2901
        if request.session_id:
            last[request.session_id] = request.arrival_s
        placed.append(request)
    if not num_delays:
        return placed, []
    return placed, [
        f"{num_delays} turns arrive their delay after the turn before; the time it took to answer is unknown"
    ]


def parse_bailian(row: Row) -> Iterator[WorkloadRequest]:
    kind = row.text("type", default="")
    yield WorkloadRequest(
        request_id=row.identifier("chat_id"),
        arrival_s=row.time("timestamp", default=0.0),
        input_length=row.tokens("input_length"),
        output_length=row.optional_tokens("output_length"),
        hash_ids=row.integers("hash_ids", low=0),
        session_id=row.identifier("parent_chat_id", default="-1"),
        tags={"kind": kind} if kind else {},
    )


def join_chains(requests: list[WorkloadRequest], _: Path) -> tuple[list[WorkloadRequest], list[str]]:
    """Replace each parent id by the id of the chat at the head of the chain (itself where unknown)."""
    roots: dict[str, str] = {}
    joined: list[WorkloadRequest] = []
    for request in requests:
        root = roots.get(request.session_id, request.request_id)
        roots.setdefault(request.request_id, root)
        joined.append(dataclasses.replace(request, session_id=root))
    return joined, []


MOONCAKE: Final = Format(
    name="mooncake",
    title="Mooncake trace (lengths and block hashes)",
    matches=lambda first: (
        ("input_length" in first and bool({"hash_ids", "timestamp", "delay"} & first.keys()))
        or "text_input" in first
        or ("messages" in first and "delay" in first)
    ),
    parse=parse_mooncake,
    finish=place_turns,
    columns=frozenset(
        (
            "timestamp",
            "input_length",
            "output_length",
            "hash_ids",
            "text_input",
            "messages",
            "tools",
            "delay",
            "session_id",
            "request_id",
            "priority",
            "model",
            "max_tokens",
            "max_completion_tokens",
        )
    ),
)
BAILIAN: Final = Format(
    name="bailian",
    title="Bailian trace (lengths and block hashes)",
    matches=lambda first: "hash_ids" in first and "chat_id" in first,
    parse=parse_bailian,
    finish=join_chains,
    columns=frozenset(
        (
            "chat_id",
            "parent_chat_id",
            "timestamp",
            "input_length",
            "output_length",
            "type",
            "turn",
            "hash_ids",
        )
    ),
)
