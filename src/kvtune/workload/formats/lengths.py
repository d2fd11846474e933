"""Traces of lengths alone, as CSV with a header.

Azure (Splitwise, ISCA'24): `TIMESTAMP,ContextTokens,GeneratedTokens`. BurstGPT (KDD'25): `Timestamp,
Model,Request tokens,Response tokens,Total tokens,Log Type`, later with `Session ID`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from kvtune.workload.formats.record import Format
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d{1,9})?(?:Z|\+00:00)?")


def parse_azure(row: Row) -> Iterator[WorkloadRequest]:
    yield WorkloadRequest(
        request_id=f"line-{row.line}",
        arrival_s=_seconds(row, "TIMESTAMP"),
        input_length=_whole(row, "ContextTokens"),
        output_length=_whole(row, "GeneratedTokens"),
    )


def parse_burstgpt(row: Row) -> Iterator[WorkloadRequest]:
    model = row.text("Model", default="")
    yield WorkloadRequest(
        request_id=f"line-{row.line}",
        arrival_s=row.number("Timestamp"),
        input_length=_whole(row, "Request tokens"),
        output_length=_whole(row, "Response tokens"),
        session_id=row.identifier("Session ID", default=""),
        tags={"model": model} if model else {},
    )


def _whole(row: Row, name: str) -> int:
    value = row.number(name)
    if value != int(value):
        row.fail(f"'{name}' must be a whole number, found {value}")
    return int(value)


def _seconds(row: Row, name: str) -> float:
    """Seconds since 1970. The traces write 100-ns digits, more than datetime parses."""
    text = row.text(name)
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        whole = datetime.fromisoformat(f"{match[1]}T{match[2]}").replace(tzinfo=UTC).timestamp()
    except ValueError:
        row.fail(f"'{name}' must be a time such as 2023-11-16 18:15:46.68, found {ascii(text)[:60]}")
    return whole + float(match[3] or 0)


AZURE: Final = Format(
    name="azure",
    title="Azure LLM inference trace (lengths only)",
    matches=lambda first: {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= first.keys(),
    parse=parse_azure,
    is_csv=True,
)
BURSTGPT: Final = Format(
    name="burstgpt",
    title="BurstGPT trace (lengths only)",
    matches=lambda first: {"Timestamp", "Request tokens", "Response tokens"} <= first.keys(),
    parse=parse_burstgpt,
    is_csv=True,
)
