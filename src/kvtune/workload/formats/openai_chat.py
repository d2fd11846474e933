"""OpenAI requests, one JSON object a line: `{messages, max_tokens?, ...}`, the batch form
`{custom_id, method, url, body}`, and `{prompt, output_tokens?}` as vLLM's custom data set has it;
GuideLLM's data sets are the latter with `output_tokens_count`, as JSON lines or as CSV.

A log whose last message is the assistant's holds the recorded answer; it is not part of the prompt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Final, cast

from kvtune.workload.formats.record import Format
from kvtune.workload.request import Message, WorkloadRequest
from kvtune.workload.row import Row

_OUTPUT_COUNTS: Final = ("output_tokens_count", "completion_tokens_count", "generated_tokens_count")
"""GuideLLM's names, which its CSV and JSONL data sets use."""
_FIRST_EPOCH_SECOND: Final = 1e8
_FIRST_EPOCH_MILLISECOND: Final = 1e11


def parse_chat(row: Row) -> Iterator[WorkloadRequest]:
    yield _request(
        row, row.identifier("request_id", default=row.identifier("id", default=f"line-{row.line}"))
    )


def parse_batch(row: Row) -> Iterator[WorkloadRequest]:
    body = row.row("body")
    yield _request(body, row.identifier("custom_id", default=f"line-{row.line}"))


def _request(row: Row, request_id: str) -> WorkloadRequest:
    common = WorkloadRequest(
        request_id=request_id,
        arrival_s=_arrival(row),
        session_id=row.identifier("session_id", default=row.identifier("conversation_id", default="")),
        tags=_user(row),
        cache_salt=row.text("cache_salt", default=""),
        priority=row.integer("priority", default=0),
        max_tokens=_first_integer(row, "max_completion_tokens", "max_tokens"),
        output_length=_first_integer(row, "output_tokens", "output_length", *_OUTPUT_COUNTS),
    )
    if row.fields.get("messages") is None:
        return _completion(row, common)
    messages, problem = [], None
    for turn in row.rows("messages"):
        content, part_problem = _content(turn)
        problem = problem or part_problem
        messages.append(Message(turn.text("role"), content))
    answer = messages.pop().content if len(messages) > 1 and messages[-1].role == "assistant" else None
    return dataclasses.replace(
        common, messages=tuple(messages), tools=_tools(row), answer=answer,
        problem=problem or (None if messages else "the list of messages is empty"),
    )  # fmt: skip


def _arrival(row: Row) -> float:
    """Seconds. `created` is OpenAI's own, in seconds; `timestamp` may be written out, or a number: since
    1970 in seconds or milliseconds, else, as in Mooncake's and AIPerf's traces, milliseconds."""
    if row.fields.get("arrival_s") is not None:
        return row.time("arrival_s")
    if row.fields.get("created") is not None:
        return row.time("created")
    stamp = row.fields.get("timestamp")
    if stamp is None:
        return 0.0
    if isinstance(stamp, str) and not stamp.replace(".", "", 1).isdecimal():
        return row.date("timestamp")
    number = row.time("timestamp")
    return number if _FIRST_EPOCH_SECOND <= number < _FIRST_EPOCH_MILLISECOND else number * 1e-3


def _user(row: Row) -> dict[str, str]:
    return {"user": row.identifier("user")} if row.fields.get("user") is not None else {}


def _tools(row: Row) -> tuple[str, ...]:
    """JSON of each tool with its keys in the order sent: that order reaches the prompt."""
    tools = row.fields.get("tools")
    if tools is None:
        return ()
    return tuple(json.dumps(tool, ensure_ascii=False) for tool in row.items("tools"))


def _completion(row: Row, common: WorkloadRequest) -> WorkloadRequest:
    prompt = row.fields.get("prompt")
    if isinstance(prompt, list):
        return dataclasses.replace(common, token_ids=row.integers("prompt"))
    return dataclasses.replace(common, prompt=row.text("prompt"))


def _first_integer(row: Row, *names: str) -> int | None:
    # A CSV cell is text; row.number reads both.
    found = (
        row.optional_tokens(name) if isinstance(row.fields.get(name), str) else row.optional_integer(name)
        for name in names
    )
    return next((value for value in found if value is not None), None)


def _content(turn: Row) -> tuple[str, str | None]:
    """(text, why it cannot be served or None) of a message; its parts are joined."""
    content = turn.fields.get("content")
    if content is None:  # an assistant turn that only calls tools
        return "", None
    if not isinstance(content, list):
        return turn.text("content"), None
    texts: list[str] = []
    problem = None
    for part in cast("list[Any]", content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            turn.fail(f"'content' must be text or a list of parts, found {ascii(part)[:60]}")
        fields = Row(turn.path, turn.line, cast("dict[str, Any]", part))
        kind = fields.text("type")
        if kind == "text":
            texts.append(fields.text("text"))
        else:
            problem = f"a message holds a part of type {ascii(kind)[:40]}; only text can be served"
    return "".join(texts), problem


CHAT: Final = Format(
    name="openai_chat",
    title="OpenAI chat requests",
    matches=lambda first: "messages" in first,
    parse=parse_chat,
)
BATCH: Final = Format(
    name="openai_batch",
    title="OpenAI batch requests",
    matches=lambda first: "body" in first and "custom_id" in first,
    parse=parse_batch,
)
PROMPTS: Final = Format(
    name="prompts",
    title="plain prompts",
    matches=lambda first: "prompt" in first,
    parse=parse_chat,
)
GUIDELLM: Final = Format(
    name="guidellm",
    title="GuideLLM data set (prompts)",
    matches=lambda first: "prompt" in first,
    parse=parse_chat,
    is_csv=True,
)
