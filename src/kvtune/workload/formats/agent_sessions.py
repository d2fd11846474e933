"""Agent sessions as WEKA's kv-cache-tester publishes them: one session a line, `{id, block_size: 64,
requests: [{t, in, out, hash_ids}]}`, or `hash_runs` = [start, count, ...] in place of `hash_ids`.

Ids mean something within their session only and `t` counts from its start: there is no common clock, so
every session starts at 0 s. A request that holds `requests` itself is a sub-agent: those come in its place,
their `t` counted from its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvtune.workload.formats.record import Format
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row

_BLOCK_SIZE: Final = 64
_ID_BITS: Final = 32
_MAX_DEPTH: Final = 16
_MAX_IDS: Final = 2**24


def parse(row: Row) -> Iterator[WorkloadRequest]:
    session = row.identifier("id", default=f"line-{row.line}")
    if row.integer("block_size", default=_BLOCK_SIZE) != _BLOCK_SIZE:
        row.fail(f"'block_size' must be {_BLOCK_SIZE}, found {row.integer('block_size')}")
    is_local = row.text("hash_id_scope", default="local") == "local"
    base = row.line << _ID_BITS if is_local else 0
    # Histories repeat: requests of a session share the id objects, which saves most of the memory.
    shared: dict[int, int] = {}
    for number, (request, start_s) in enumerate(_flat(row, 0.0), start=1):
        yield WorkloadRequest(
            request_id=f"{session}#{number}",
            arrival_s=start_s + request.time("t", default=0.0),
            input_length=request.tokens("in"),
            output_length=request.optional_tokens("out"),
            hash_ids=tuple(shared.setdefault(i, base + i) for i in _local_ids(request)),
            session_id=session,
            tags={
                name: request.text(name)
                for name in ("model", "group")
                if request.fields.get(name) is not None
            },
        )  # fmt: skip


def _flat(row: Row, start_s: float, depth: int = 0) -> Iterator[tuple[Row, float]]:
    """Every request of a session with the time its `t` counts from, in the order of the file."""
    if depth > _MAX_DEPTH:
        row.fail(f"sub-agents are nested more than {_MAX_DEPTH} deep")
    for request in row.rows("requests"):
        if request.fields.get("requests") is not None:
            yield from _flat(request, start_s + request.time("t", default=0.0), depth + 1)
        else:
            yield request, start_s


def say_clock(requests: list[WorkloadRequest], _: Path) -> tuple[list[WorkloadRequest], list[str]]:
    if len({request.session_id for request in requests}) < 2:
        return requests, []
    return requests, [
        "sessions have no common clock: each starts at 0 s, so load and order between sessions are made up"
    ]


def _local_ids(request: Row) -> tuple[int, ...]:
    if request.fields.get("hash_ids") is not None:
        ids = request.integers("hash_ids", low=0)
    else:
        runs = request.integers("hash_runs", low=0)
        if len(runs) % 2 or sum(runs[1::2]) > min(_MAX_IDS, -(-request.tokens("in") // _BLOCK_SIZE)):
            request.fail(
                "'hash_runs' must be pairs of start and count, with no more ids than blocks of tokens"
            )
        pairs = zip(runs[::2], runs[1::2], strict=True)
        ids = tuple(i for start, count in pairs for i in range(start, start + count))
    if ids and max(ids) >> _ID_BITS:
        request.fail(f"hash ids must be below 2^{_ID_BITS}, found {max(ids)}")
    return ids


FORMAT: Final = Format(
    name="agent_sessions",
    title="agent sessions (lengths and block hashes, each session from 0 s)",
    matches=lambda first: "requests" in first,
    parse=parse,
    finish=say_clock,
    block_size=_BLOCK_SIZE,
    has_clock=False,
)
