"""What a cache's size and policy are worth on a trace: beside LRU, the best possible, and twice the blocks.

No hit rate stands alone here. Each capacity shows LRU, the pinned offline optimum (nothing an engine could
do beats it), the share of the gap between them that a policy closes, and what LRU would hit with twice the
blocks in the same memory (half the bytes per block) or with more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvtune.cache.replay import LRUCurve, Progress, Replayer, ReplayResult

__all__ = ["SHARES_OF_UNIQUE", "CapacityRow", "Hits", "Study", "default_capacities", "study"]

ORACLE: Final = "optimal_pinned"
SHARES_OF_UNIQUE: Final = (0.001, 0.005, 0.01, 0.05, 0.10, 0.25, 0.50)
_COST: Final = {"lru": 1, "fifo": 1, "lfu": 2, "optimal": 8, "optimal_pinned": 8}
_COST_OF_OTHERS: Final = 20
_COST_OF_CURVE: Final = 3
"""Rough relative times of a reference, for the time left alone."""


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of a whole trace at one capacity in blocks, None for an unbounded cache."""

    capacity_blocks: int | None
    blocks_hit: int
    block_hit_rate: float
    token_hit_rate: float


@dataclass(frozen=True, slots=True, eq=False)
class CapacityRow:
    """One capacity: the asked policies' results, LRU, the oracle, and what other capacities would give LRU.

    `half_bytes`: twice the blocks. `more`: `more_blocks` on top, None where no amount was asked for.
    `lru_blocks_for_oracle`: blocks with which LRU hits what the oracle hits here, None where not known.
    """

    capacity_blocks: int | None
    results: tuple[ReplayResult, ...]
    lru: Hits
    oracle: Hits
    half_bytes: Hits
    more: Hits | None
    lru_blocks_for_oracle: int | None

    def gap_closed(self, hits: Hits | ReplayResult) -> float | None:
        """(hits - LRU) / (oracle - LRU), in blocks; None where there is no gap to close."""
        gap = self.oracle.blocks_hit - self.lru.blocks_hit
        return (hits.blocks_hit - self.lru.blocks_hit) / gap if gap > 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """One row per capacity, and the exact LRU curve of all capacities (None under an engine's rules)."""

    rows: tuple[CapacityRow, ...]
    curve: LRUCurve | None


def default_capacities(num_unique: int) -> tuple[int, ...]:
    """0.1 to 50 % of the distinct blocks."""
    return tuple(dict.fromkeys(max(1, round(share * num_unique)) for share in SHARES_OF_UNIQUE))


def study(
    replayer: Replayer,
    policies: Sequence[str],
    capacities: Sequence[int | None],
    *,
    more_blocks: int | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Study:
    """Replay `policies` at `capacities`, beside LRU and the oracle. `progress` is told (share done, what)."""
    runs = [(policy, capacity) for capacity in capacities for policy in dict.fromkeys((*policies, ORACLE))]
    costs = [_COST.get(policy, _COST_OF_OTHERS) for policy, _ in runs]
    work = _Work([_COST_OF_CURVE, *costs], progress)
    lru = _LRU(replayer, work.next("lru, every size"))
    found: dict[tuple[str, int | None], ReplayResult] = {}
    for policy, capacity in runs:
        size = "unbounded" if capacity is None else f"{capacity:,} blocks"
        found[policy, capacity] = replayer.replay(policy, capacity, progress=work.next(f"{policy}, {size}"))
    rows = (
        _row(
            lru,
            tuple(found[policy, capacity] for policy in policies),
            _hits(found[ORACLE, capacity]),
            more_blocks,
        )
        for capacity in capacities
    )
    return Study(tuple(rows), lru.curve)


def _row(lru: _LRU, results: tuple[ReplayResult, ...], oracle: Hits, more_blocks: int | None) -> CapacityRow:
    capacity = oracle.capacity_blocks
    more = None
    if more_blocks is not None:
        more = lru.at(None if capacity is None else capacity + more_blocks)
    return CapacityRow(
        capacity_blocks=capacity,
        results=results,
        lru=lru.at(capacity),
        oracle=oracle,
        half_bytes=lru.at(None if capacity is None else 2 * capacity),
        more=more,
        lru_blocks_for_oracle=lru.capacity_for(oracle.blocks_hit),
    )


class _Work:
    """Turns the progress of single runs into a share of all of them."""

    def __init__(self, costs: Sequence[int], progress: Callable[[float, str], None] | None) -> None:
        self._costs, self._progress = list(costs), progress
        self._total, self._done, self._run = sum(costs), 0, 0

    def next(self, label: str) -> Progress | None:
        cost = self._costs[self._run]
        before, report = self._done, self._progress
        self._done += cost
        self._run += 1
        if report is None:
            return None
        return lambda done, total: report((before + cost * done / max(1, total)) / self._total, label)


class _LRU:
    """LRU at any capacity: read off the curve, or, for an engine's rules, replayed."""

    def __init__(self, replayer: Replayer, progress: Progress | None) -> None:
        self._replayer = replayer
        self.curve: LRUCurve | None = None
        if not replayer.full_blocks_only:
            self.curve = replayer.lru_curve(progress=progress)

    def at(self, capacity: int | None) -> Hits:
        if self.curve is None:
            return _hits(self._replayer.replay("lru", capacity))
        return Hits(
            capacity_blocks=capacity,
            blocks_hit=self.curve.blocks_hit(capacity),
            block_hit_rate=self.curve.block_hit_rate(capacity),
            token_hit_rate=self.curve.token_hit_rate(capacity),
        )

    def capacity_for(self, blocks_hit: int) -> int | None:
        return None if self.curve is None else self.curve.capacity_for(blocks_hit)


def _hits(result: ReplayResult) -> Hits:
    return Hits(result.capacity_blocks, result.blocks_hit, result.block_hit_rate, result.token_hit_rate)
