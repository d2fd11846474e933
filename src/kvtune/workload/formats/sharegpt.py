"""ShareGPT: `{id?, conversations: [{from, value}]}`, as a JSON list or JSONL.

Each human turn that a gpt turn follows becomes one request whose messages are the history so far.
Assistant turns before the first human turn are left out (chat templates refuse them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from kvtune.workload.formats.record import Format
from kvtune.workload.request import Message, WorkloadRequest
from kvtune.workload.row import Row

_ROLES: Final = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant",
}  # fmt: skip


def parse(row: Row) -> Iterator[WorkloadRequest]:
    session = row.identifier("id", default=f"line-{row.line}")
    history: list[Message] = []
    for turn in row.rows("conversations"):
        role, text = turn.text("from").lower(), turn.text("value")
        message = Message(_ROLES.get(role, role), text)
        if message.role == "assistant":
            if not any(earlier.role == "user" for earlier in history):
                continue
            if history[-1].role == "user":
                yield WorkloadRequest(
                    request_id=f"{session}#{sum(m.role == 'user' for m in history)}",
                    messages=tuple(history), answer=text, session_id=session,
                )  # fmt: skip
        history.append(message)


FORMAT: Final = Format(
    name="sharegpt",
    title="ShareGPT conversations",
    matches=lambda first: "conversations" in first,
    parse=parse,
)
