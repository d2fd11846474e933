"""Traces of lengths alone, as CSV with a header.

Azure (Splitwise, ISCA'24): `TIMESTAMP,ContextTokens,GeneratedTokens`. BurstGPT (KDD'25): `Timestamp,
Model,Request tokens,Response tokens,Total tokens,Log Type`, later with `Session ID`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from kvtune.workload.formats.record import Format
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row


def parse_azure(row: Row) -> Iterator[WorkloadRequest]:
    yield WorkloadRequest(
        request_id=f"line-{row.line}",
        arrival_s=row.date("TIMESTAMP"),
        input_length=row.tokens("ContextTokens"),
        output_length=row.tokens("GeneratedTokens"),
    )


def parse_burstgpt(row: Row) -> Iterator[WorkloadRequest]:
    model = row.text("Model", default="")
    yield WorkloadRequest(
        request_id=f"line-{row.line}",
        arrival_s=row.time("Timestamp"),
        input_length=row.tokens("Request tokens"),
        output_length=row.tokens("Response tokens"),
        session_id=row.identifier("Session ID", default=""),
        tags={"model": model} if model else {},
    )


AZURE: Final = Format(
    name="azure",
    title="Azure LLM inference trace (lengths only)",
    matches=lambda first: {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= first.keys(),
    parse=parse_azure,
    columns=frozenset(("TIMESTAMP", "ContextTokens", "GeneratedTokens", "NumImages")),
    is_csv=True,
)
BURSTGPT: Final = Format(
    name="burstgpt",
    title="BurstGPT trace (lengths only)",
    matches=lambda first: {"Timestamp", "Request tokens", "Response tokens"} <= first.keys(),
    parse=parse_burstgpt,
    columns=frozenset(
        (
            "Timestamp",
            "Model",
            "Request tokens",
            "Response tokens",
            "Total tokens",
            "Log Type",
            "Session ID",
            "Elapsed time",
        )
    ),
    is_csv=True,
)
