"""A study of cache sizes and policies as plain JSON: what `simulate --mode cache` and pages are made of."""

from __future__ import annotations

from typing import Any

from kvtune.cache.curve import curve_record
from kvtune.cache.replay import Replayer, ReplayResult
from kvtune.cache.replay_study import CapacityRow, Hits, Study

__all__ = ["study_record"]


def study_record(replayer: Replayer, study: Study, block_bytes: int | None) -> dict[str, Any]:
    """What `kvtune simulate --mode cache --json` says: the first capacity's first policy on top, as a single
    replay; everything else below it. `block_bytes`: KV bytes of a block, None where not known."""
    trace, rows = replayer.trace, study.rows
    first = rows[0].results[0]
    return {
        "num_requests": first.num_requests,
        "policy": first.policy,
        "capacity_blocks": _blocks(first.capacity_blocks),
        **_figures(first),
        "elapsed_s": first.elapsed_s,
        "block_size": trace.block_size,
        "block_bytes": block_bytes,
        "unique_blocks": trace.num_unique,
        "full_blocks_only": replayer.full_blocks_only,
        "is_lower_bound": trace.is_lower_bound,
        "core": replayer.core,
        "capacities": [_row(row, block_bytes) for row in rows],
        "curve": None if study.curve is None else curve_record(study.curve),
        "tenants": _tenants(replayer, first),
    }


def _blocks(capacity: int | None) -> int | str:
    """JSON has no infinity; `bench` writes the word, too."""
    return "inf" if capacity is None else capacity


def _figures(result: ReplayResult) -> dict[str, Any]:
    return {
        "blocks_total": result.blocks_total,
        "blocks_hit": result.blocks_hit,
        "block_hit_rate": result.block_hit_rate,
        "tokens_total": result.tokens_total,
        "tokens_hit": result.tokens_hit,
        "token_hit_rate": result.token_hit_rate,
        "evicted_blocks": result.num_evicted,
        "rejected_requests": result.num_rejected,
        "second_half_block_hit_rate": result.second_half_block_hit_rate,
    }


def _row(row: CapacityRow, block_bytes: int | None) -> dict[str, Any]:
    capacity = row.capacity_blocks
    size = None if capacity is None or block_bytes is None else capacity * block_bytes
    policies = {
        result.policy: {
            **_figures(result),
            "gap_closed": row.gap_closed(result),
            "elapsed_s": result.elapsed_s,
        }
        for result in row.results
    }
    return {
        "capacity_blocks": _blocks(capacity),
        "capacity_bytes": size,
        "policies": policies,
        "lru": _what(row.lru),
        "oracle": {"policy": "optimal_pinned", **_what(row.oracle)},
        "lru_blocks_for_oracle": row.lru_blocks_for_oracle,
        "what_if": {
            "half_bytes_per_block": _gain(row, row.half_bytes),
            "more_memory": None if row.more is None else _gain(row, row.more),
        },
    }


def _what(hits: Hits) -> dict[str, Any]:
    return {
        "capacity_blocks": _blocks(hits.capacity_blocks),
        "blocks_hit": hits.blocks_hit,
        "block_hit_rate": hits.block_hit_rate,
        "token_hit_rate": hits.token_hit_rate,
    }


def _gain(row: CapacityRow, hits: Hits) -> dict[str, Any]:
    """LRU with other blocks: its hits, what they are above LRU's here, and beside the oracle gap here."""
    return {
        "policy": "lru",
        **_what(hits),
        "block_hit_rate_gain": hits.block_hit_rate - row.lru.block_hit_rate,
        "gap_closed": row.gap_closed(hits),
    }


def _tenants(replayer: Replayer, result: ReplayResult) -> list[dict[str, Any]]:
    return [
        {
            "tenant": row.tenant,
            "num_requests": row.num_requests,
            "blocks_total": row.blocks_total,
            "blocks_hit": row.blocks_hit,
            "block_hit_rate": row.blocks_hit / row.blocks_total if row.blocks_total else 0.0,
            "token_hit_rate": row.tokens_hit / row.tokens_total if row.tokens_total else 0.0,
        }
        for row in replayer.tenants(result)
    ]
