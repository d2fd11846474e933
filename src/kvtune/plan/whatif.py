"""What a change would do to a trace: which share of the requests it touches, what capacity it wins.

Capacity is stated twice. *Expected*: how many requests of this trace a budget holds at once on average, each
counted for the same time. *Guaranteed*: how many it holds if every one were as long as the longest allowed,
which is what an engine promises when it starts ("maximum concurrency").
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.plan.lengths import IntArray
from kvtune.plan.planner import Sizing
from kvtune.plan.request import MAX_CONTEXT, PlanRequest
from kvtune.spec import AllocatorModel, Paging, kv_format, kv_formats

__all__ = ["Change", "Holding", "WhatIf", "changes_from_text", "default_changes", "holding", "what_if"]

HitRate = Callable[[AllocatorModel], float | None]
BoolArray = npt.NDArray[np.bool_]
_STEP = 256
"""Proposed limits are multiples of this."""
_LIMITS = ("cap", "truncate", "route")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """`kind`: cap (refuse longer requests), truncate (cut them), route (send them to a second pool), all at
    `limit` tokens; or codec (store keys and values as `codec`)."""

    kind: str
    limit: int | None = None
    codec: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}={self.limit if self.codec is None else self.codec}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Requests in one pool: mean and longest allocator bytes, and how many a budget holds (None without
    a budget)."""

    num_requests: int
    mean_bytes: float
    longest_tokens: int
    longest_bytes: int
    expected: float | None
    guaranteed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """One change beside the trace as it is.

    `touched_share` of the requests; `lost_tokens_share` of their tokens is refused or cut. `gain_expected`
    and `gain_guaranteed`: requests held, as a multiple of today's, from the same memory. A route splits
    it by bytes: `second_memory_share` goes to the pool of the long ones. `hit_rate`: of prompt tokens, if
    the whole budget were prefix cache; None where that is not known for the change.
    """

    change: str
    kind: str
    limit: int | None
    codec: str | None
    touched_share: float
    lost_tokens_share: float
    main: Holding
    second: Holding | None
    second_memory_share: float
    gain_expected: float
    gain_guaranteed: float
    hit_rate: float | None = None


def changes_from_text(text: str) -> tuple[Change, ...]:
    """`"cap=8192,route=16384,codec=int8"` -> changes. UsageError for anything else."""
    changes: list[Change] = []
    for part in text.split(","):
        kind, _, value = (piece.strip() for piece in part.partition("="))
        if kind in _LIMITS and re.fullmatch(r"[0-9]{1,9}", value) and 1 <= int(value) <= MAX_CONTEXT:
            changes.append(Change(kind=kind, limit=int(value)))
        elif kind == "codec" and value:
            changes.append(Change(kind=kind, codec=value))
        else:
            raise UsageError(
                "--what-if expects cap=TOKENS, truncate=TOKENS, route=TOKENS or codec=NAME, "
                f"comma-separated, found {part.strip()[:60]!r}"
            )
    return tuple(changes)


def default_changes(tokens: IntArray, sizing: Sizing, request: PlanRequest) -> tuple[Change, ...]:
    """Limits at the lengths that 90 % and 99 % of the requests stay under, and every other codec the
    engine has."""
    limits = [-(-int(q) // _STEP) * _STEP for q in np.percentile(tokens, [90, 99], method="higher")]
    useful = [limit for limit in dict.fromkeys(limits) if limit < tokens.max()]
    codecs = [
        name for name in kv_formats(request.engine, sizing.spec) if name not in _stored(sizing, request)
    ]
    return (
        *(Change(kind=kind, limit=limit) for kind in _LIMITS for limit in useful),
        *(Change(kind="codec", codec=name) for name in codecs),
    )


def _stored(sizing: Sizing, request: PlanRequest) -> set[str]:
    """Names of the codec in use and of those that are no smaller."""
    wide = {"fp32", "fp16", "bf16"}
    return wide | {request.kv_dtype, sizing.kv.k.name if sizing.kv.k == sizing.kv.v else ""}


def holding(tokens: IntArray, size: Callable[[int], int], budget: int | None, longest: int) -> Holding:
    """What requests of these lengths take, and how many of them `budget` bytes hold."""
    lengths, counts = np.unique(tokens, return_counts=True)
    total = sum(size(int(n)) * int(count) for n, count in zip(lengths, counts, strict=True))
    mean, worst = total / max(1, len(tokens)), size(longest)
    return Holding(
        num_requests=len(tokens),
        mean_bytes=mean,
        longest_tokens=longest,
        longest_bytes=worst,
        expected=None if budget is None or not mean else budget / mean,
        guaranteed=None if budget is None else budget // max(1, worst),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Trace:
    """What every change is compared on."""

    tokens: IntArray
    sizing: Sizing
    request: PlanRequest
    budget: int | None
    today: Holding
    hit_rate: HitRate

    @property
    def longest(self) -> int:
        return int(self.tokens.max())

    def share_of(self, budget_share: float) -> int | None:
        return None if self.budget is None else round(self.budget * budget_share)


def _unknown(_model: AllocatorModel) -> float | None:
    return None


def what_if(
    changes: Sequence[Change],
    tokens: IntArray,
    sizing: Sizing,
    request: PlanRequest,
    *,
    budget: int | None,
    hit_rate: HitRate = _unknown,
) -> tuple[WhatIf, ...]:
    """Every change on requests of these lengths. `hit_rate` tells what a budget full of prefixes would hit
    under other allocator settings. UsageError for a codec the engine does not have and for a limit below
    the shortest request."""
    today = holding(tokens, sizing.model.bytes, budget, int(tokens.max()))
    trace = _Trace(tokens, sizing, request, budget, today, hit_rate)
    return tuple(_CHANGES[change.kind](change, trace) for change in changes)


def _result(
    change: Change, trace: _Trace, is_touched: BoolArray, main: Holding, *, lost_share: float = 0.0
) -> WhatIf:
    return WhatIf(
        change=str(change), kind=change.kind, limit=change.limit, codec=change.codec,
        touched_share=float(is_touched.mean()), lost_tokens_share=lost_share, main=main, second=None,
        second_memory_share=0.0, gain_expected=trace.today.mean_bytes / main.mean_bytes,
        gain_guaranteed=trace.today.longest_bytes / main.longest_bytes,
    )  # fmt: skip


def _limit(change: Change, trace: _Trace) -> tuple[int, BoolArray]:
    """(the limit, which requests are longer)."""
    limit = change.limit or 0
    is_long = trace.tokens > limit
    if is_long.all() and change.kind != "truncate":
        raise UsageError(
            f"{change}: every request is longer; the shortest has {int(trace.tokens.min()):,} tokens"
        )
    return limit, is_long


def _cap(change: Change, trace: _Trace) -> WhatIf:
    limit, is_long = _limit(change, trace)
    lost = float(trace.tokens[is_long].sum() / trace.tokens.sum())
    size, longest = trace.sizing.model.bytes, min(limit, trace.longest)
    main = holding(trace.tokens[~is_long], size, trace.budget, longest)
    return _result(change, trace, is_long, main, lost_share=lost)


def _truncate(change: Change, trace: _Trace) -> WhatIf:
    limit, is_long = _limit(change, trace)
    lost = float((trace.tokens - limit)[is_long].sum() / trace.tokens.sum())
    kept = np.minimum(trace.tokens, limit)
    main = holding(kept, trace.sizing.model.bytes, trace.budget, min(limit, trace.longest))
    return _result(change, trace, is_long, main, lost_share=lost)


def _codec(change: Change, trace: _Trace) -> WhatIf:
    sizing, request = trace.sizing, trace.request
    kv = kv_format(request.engine, change.codec or "", sizing.spec)
    paging = Paging(block_size=request.block_tokens, tp=request.tp, chunk=request.in_flight)
    model = AllocatorModel(sizing.spec, kv, request.engine, paging)
    main = holding(trace.tokens, model.bytes, trace.budget, trace.longest)
    result = _result(change, trace, np.ones(len(trace.tokens), dtype=bool), main)
    return dataclasses.replace(result, hit_rate=trace.hit_rate(model))


def _route(change: Change, trace: _Trace) -> WhatIf:
    """Two pools whose memory is split by the bytes of their requests, so that neither fills first."""
    limit, is_long = _limit(change, trace)
    size, today = trace.sizing.model.bytes, trace.today
    longest = min(limit, trace.longest)
    short, long_ = trace.tokens[~is_long], trace.tokens[is_long]
    short_bytes = holding(short, size, None, longest).mean_bytes * len(short)
    share = 1 - short_bytes / (today.mean_bytes * len(trace.tokens)) if len(long_) else 0.0
    main = holding(short, size, trace.share_of(1 - share), longest)
    guaranteed = (1 - share) / main.longest_bytes
    second = None
    if len(long_):
        second = holding(long_, size, trace.share_of(share), trace.longest)
        guaranteed += share / second.longest_bytes
    return WhatIf(
        change=str(change), kind=change.kind, limit=limit, codec=None, touched_share=float(is_long.mean()),
        lost_tokens_share=0.0, main=main, second=second, second_memory_share=share, gain_expected=1.0,
        gain_guaranteed=today.longest_bytes * guaranteed,
    )  # fmt: skip


_CHANGES: Final[Mapping[str, Callable[[Change, _Trace], WhatIf]]] = {
    "cap": _cap,
    "truncate": _truncate,
    "route": _route,
    "codec": _codec,
}
