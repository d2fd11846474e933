"""A plan for a trace: how long its requests are, what they share, and what changes would win."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtune.cache.replay import LRUCurve, Replayer
from kvtune.errors import UsageError
from kvtune.plan.findings import Finding
from kvtune.plan.lengths import LengthStatistics, length_statistics, sequence_lengths
from kvtune.plan.planner import Sizing
from kvtune.plan.request import PlanRequest
from kvtune.plan.tiers import TierRequest
from kvtune.plan.whatif import Change, Holding, WhatIf, default_changes, holding, what_if
from kvtune.spec import AllocatorModel
from kvtune.workload import BlockTrace, Workload, block_trace

__all__ = ["CacheLevel", "PrefixReuse", "TracePlan", "plan_trace"]

_LOST_HITS = 0.2
"""Share of the possible hits whose loss to a large block is worth a warning."""
Progress = Callable[[float, str], None]
_CURVE_BEGINS = 0.6
"""Share of the work that cutting the prompts into blocks takes."""
_CURVE_POINTS = 64
_MOST_REFERENCES_IN_PYTHON = 500_000


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
class CacheLevel:
    """A memory size with a name: the KV budget, then each tier with all before it. `token_hit_rate` of the
    prompt tokens, if all of it were prefix cache under LRU."""

    name: str
    size_bytes: int
    token_hit_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePlan:
    """`today`: the trace as it is. `reuse` is None where only lengths are known. `hit_curve`: (bytes, share
    of the prompt tokens hit) of an LRU prefix cache, from empty, for drawing; empty where it is not known."""

    path: str
    format: str
    kv_budget_bytes: int | None
    lengths: LengthStatistics
    today: Holding
    what_ifs: tuple[WhatIf, ...]
    reuse: PrefixReuse | None
    levels: tuple[CacheLevel, ...]
    hit_curve: tuple[tuple[int, float], ...]
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
    progress: Progress | None = None,
) -> TracePlan:
    """What the requests of a trace take in a budget of `budget` bytes, and what `changes` (default: limits
    at the 90 % and 99 % lengths, and every codec) would win. `progress` is told (share done, what is
    running). UsageError where no request states a length."""
    tell = progress or _silent
    tell(0.01, "lengths")
    lengths = sequence_lengths(workload)
    tokens = lengths.tokens
    chosen = default_changes(tokens, sizing, request) if changes is None else changes
    tell(0.1, "blocks")
    traces = _block_traces(workload, sizing)
    tell(_CURVE_BEGINS, "cache sizes")
    reuse = None if traces is None else _reuse(*traces, sizing)
    curve = None if traces is None else _HitCurve.of(traces[1], sizing.model, tell)
    return TracePlan(
        path=str(workload.path or ""),
        format=workload.format,
        kv_budget_bytes=budget,
        lengths=length_statistics(lengths),
        today=holding(tokens, sizing.model.bytes, budget, int(tokens.max())),
        what_ifs=what_if(
            chosen, tokens, sizing, request, budget=budget,
            hit_rate=lambda model: None if curve is None or budget is None else curve.under(model, budget),
        ),
        reuse=reuse,
        levels=() if curve is None else curve.levels(budget, tiers),
        hit_curve=() if curve is None else curve.points(),
        findings=tuple(_findings(reuse, request)),
        notes=(*workload.notes, *lengths.notes),
    )  # fmt: skip


def _silent(_share: float, _what: str) -> None:
    """Nobody wants to know."""


def _block_traces(workload: Workload, sizing: Sizing) -> tuple[BlockTrace, BlockTrace] | None:
    """The trace in its own blocks, and in the engine's where those are longer; None for lengths alone."""
    try:
        own = block_trace(workload)
    except UsageError:  # nothing tells what is shared
        return None
    engine_block = sizing.model.effective_block_size()
    return own, own if engine_block <= own.block_size else block_trace(workload, engine_block)


@dataclass(frozen=True, slots=True, eq=False)
class _HitCurve:
    """Exact LRU hits at every cache size, in bytes of one allocator."""

    curve: LRUCurve
    trace: BlockTrace
    model: AllocatorModel

    @classmethod
    def of(cls, trace: BlockTrace, model: AllocatorModel, tell: Progress) -> _HitCurve | None:
        """None where the pass would take minutes: a long trace and no native core."""
        replayer = Replayer(trace)
        if replayer.core == "python" and trace.num_references > _MOST_REFERENCES_IN_PYTHON:
            return None

        def on(done: int, total: int) -> None:
            tell(_CURVE_BEGINS + (1 - _CURVE_BEGINS) * done / max(1, total), "cache sizes")

        return cls(replayer.lru_curve(progress=on), trace, model)

    def _block_bytes(self, model: AllocatorModel) -> float:
        return max(1.0, self.trace.block_size * model.cached_token_bytes())

    def rate(self, size_bytes: int) -> float:
        return self.curve.token_hit_rate(int(size_bytes // self._block_bytes(self.model)))

    def under(self, model: AllocatorModel, size_bytes: int) -> float | None:
        """The rate under another allocator, None where its blocks are longer than the trace was cut to."""
        if model.effective_block_size() > self.trace.block_size:
            return None
        return self.curve.token_hit_rate(int(size_bytes // self._block_bytes(model)))

    def levels(self, budget: int | None, tiers: Sequence[TierRequest]) -> tuple[CacheLevel, ...]:
        sizes = [] if budget is None else [("KV budget", budget)]
        sizes += [(tier.name, tier.size) for tier in tiers]
        sums = itertools.accumulate(size for _, size in sizes)
        return tuple(
            CacheLevel(name=name, size_bytes=total, token_hit_rate=self.rate(total))
            for (name, _), total in zip(sizes, sums, strict=True)
        )

    def points(self) -> tuple[tuple[int, float], ...]:
        """At most so many sizes, evenly spaced in their logarithm, up to where nothing is ever evicted."""
        most = max(1, self.trace.num_unique)
        counts = np.unique(np.geomspace(1, most, _CURVE_POINTS).astype(np.int64)).tolist()
        size = self._block_bytes(self.model)
        return tuple((int(count * size), self.curve.token_hit_rate(count)) for count in counts)


def _reuse(own: BlockTrace, at_engine: BlockTrace, sizing: Sizing) -> PrefixReuse:
    unique = int(own.block_tokens[_first_occurrences(own)].sum())
    return PrefixReuse(
        block_size=own.block_size,
        hit_rate=_hit_rate(own),
        engine_block_size=at_engine.block_size,
        engine_hit_rate=_hit_rate(at_engine),
        unique_tokens=unique,
        unique_bytes=int(unique * sizing.model.cached_token_bytes()),
        is_lower_bound=own.is_lower_bound or at_engine.is_lower_bound,
        is_estimated=own.is_estimated,
    )


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
