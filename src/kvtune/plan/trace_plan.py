"""A plan for a trace: how long its requests are, what they share, and what changes would win."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.plan.findings import Finding
from kvtune.plan.lengths import LengthStatistics, length_statistics, sequence_lengths
from kvtune.plan.planner import Sizing
from kvtune.plan.request import PlanRequest
from kvtune.plan.tiers import TierRequest
from kvtune.plan.whatif import Change, Holding, WhatIf, default_changes, holding, what_if
from kvtune.workload import BlockTrace, Workload, block_trace

__all__ = ["PrefixReuse", "TierShare", "TracePlan", "plan_trace"]

_LOST_HITS = 0.2
"""Share of the possible hits whose loss to a large block is worth a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixReuse:
    """What an endless prefix cache could reuse. `hit_rate` of the prompt tokens, in whole blocks of
    `block_size`; `engine_hit_rate` in blocks of `engine_block_size`, where the engine's are longer.
    `unique_bytes`: allocator bytes of every distinct token once, the size at which nothing is evicted."""

    block_size: int
    hit_rate: float
    engine_block_size: int
    engine_hit_rate: float
    unique_tokens: int
    unique_bytes: int
    is_lower_bound: bool
    is_estimated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TierShare:
    """How much of everything a trace ever caches a tier holds."""

    name: str
    size_bytes: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePlan:
    """`today`: the trace as it is; `reuse` is None where only lengths are known."""

    path: str
    format: str
    kv_budget_bytes: int | None
    lengths: LengthStatistics
    today: Holding
    what_ifs: tuple[WhatIf, ...]
    reuse: PrefixReuse | None
    tiers: tuple[TierShare, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The value of `trace` in the JSON object of `kvtune plan --json`."""
        return dataclasses.asdict(self)


def plan_trace(
    workload: Workload,
    sizing: Sizing,
    request: PlanRequest,
    *,
    budget: int | None = None,
    changes: Sequence[Change] | None = None,
    tiers: Sequence[TierRequest] = (),
) -> TracePlan:
    """What the requests of a trace take in a budget of `budget` bytes, and what `changes` (default: limits
    at the 90 % and 99 % lengths, and every codec) would win. UsageError where no request states a length."""
    lengths = sequence_lengths(workload)
    tokens = lengths.tokens
    chosen = default_changes(tokens, sizing, request) if changes is None else changes
    reuse = _reuse(workload, sizing)
    return TracePlan(
        path=str(workload.path or ""),
        format=workload.format,
        kv_budget_bytes=budget,
        lengths=length_statistics(lengths),
        today=holding(tokens, sizing.model.bytes, budget, int(tokens.max())),
        what_ifs=what_if(chosen, tokens, sizing, request, budget),
        reuse=reuse,
        tiers=_tier_shares(tiers, reuse),
        findings=tuple(_findings(reuse, request)),
        notes=(*workload.notes, *lengths.notes),
    )


def _reuse(workload: Workload, sizing: Sizing) -> PrefixReuse | None:
    try:
        own = block_trace(workload)
    except UsageError:  # lengths only: nothing tells what is shared
        return None
    engine_block = max(own.block_size, sizing.model.effective_block_size())
    at_engine = own if engine_block == own.block_size else block_trace(workload, engine_block)
    unique = int(own.block_tokens[_first_occurrences(own)].sum())
    return PrefixReuse(
        block_size=own.block_size,
        hit_rate=_hit_rate(own),
        engine_block_size=engine_block,
        engine_hit_rate=_hit_rate(at_engine),
        unique_tokens=unique,
        unique_bytes=int(unique * _bytes_per_cached_token(sizing)),
        is_lower_bound=own.is_lower_bound or at_engine.is_lower_bound,
        is_estimated=own.is_estimated,
    )


def _bytes_per_cached_token(sizing: Sizing) -> float:
    """Pool bytes a token takes while all layers keep it."""
    model = sizing.model
    per_rank = sum(term.block_bytes / term.block_size for term in model.terms if term.block_bytes)
    return model.paging.tp * per_rank


def _first_occurrences(trace: BlockTrace) -> npt.NDArray[np.bool_]:
    is_first = np.zeros(trace.num_references, dtype=bool)
    is_first[np.unique(trace.block_ids, return_index=True)[1]] = True
    return is_first


def _hit_rate(trace: BlockTrace) -> float:
    """Share of the prompt tokens in whole blocks that an earlier request held."""
    is_last = np.zeros(trace.num_references, dtype=bool)
    ends = trace.request_start[1:][np.diff(trace.request_start) > 0]
    is_last[ends - 1] = True
    is_short = trace.block_tokens < trace.block_size
    is_uneven = bool((is_short & ~is_last).any())  # content chunks, each whole in itself
    is_whole = ~is_short if not is_uneven else np.ones(trace.num_references, dtype=bool)
    is_hit = ~_first_occurrences(trace) & is_whole
    return float(trace.block_tokens[is_hit].sum()) / max(1, int(trace.prompt_tokens.sum()))


def _tier_shares(tiers: Sequence[TierRequest], reuse: PrefixReuse | None) -> tuple[TierShare, ...]:
    if reuse is None or not reuse.unique_bytes:
        return ()
    return tuple(
        TierShare(name=t.name, size_bytes=t.size, share=min(1.0, t.size / reuse.unique_bytes)) for t in tiers
    )


def _findings(reuse: PrefixReuse | None, request: PlanRequest) -> list[Finding]:
    if reuse is None or reuse.engine_block_size == reuse.block_size:
        return []
    lost = reuse.hit_rate - reuse.engine_hit_rate
    if lost <= _LOST_HITS * reuse.hit_rate:
        return []
    return [
        Finding(
            code="prefix-cache-loses-hits",
            severity="warning",
            message=f"{request.engine} shares whole blocks of {reuse.engine_block_size:,} tokens: this trace "
            f"could reuse {reuse.hit_rate:.1%} of its prompt tokens in blocks of {reuse.block_size:,}; the "
            f"engine's leave {'about ' if reuse.is_lower_bound else ''}{reuse.engine_hit_rate:.1%}",
            numbers={"hit_rate": reuse.hit_rate, "engine_hit_rate": reuse.engine_hit_rate},
        )
    ]
