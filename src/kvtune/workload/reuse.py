"""How a trace reuses its prompts' blocks: how often, how soon, from where, and by which law.

Everything here is about an endless cache; what a cache of a given size hits is `kvtune.cache`'s matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtune.workload.blocks import BlockTrace
from kvtune.workload.reuse_law import fit_gap_law

__all__ = ["is_seen_before", "previous_reference", "reuse_statistics"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_SAMPLED_REFERENCES: Final = 4_000_000
"""Above, gaps are those of a random share of the blocks, all their references kept."""
_WITHIN_S: Final = (1.0, 10.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 86_400.0)
_TOP_SHARE: Final = 0.1
_NUM_DEPTHS: Final = 24


def is_seen_before(trace: BlockTrace) -> BoolArray:
    """bool [N]: whether a reference's block was referenced by an earlier request. As ids name whole prefixes,
    the references of a request for which this holds are its longest prefix ever seen."""
    ids = trace.block_ids
    if not len(ids):
        return np.zeros(0, dtype=np.bool_)
    # Ids are dense in order of first appearance, so a new one is above all before it.
    highest = np.maximum.accumulate(ids)
    return np.concatenate([[False], ids[1:] <= highest[:-1]])


def previous_reference(block_ids: IntArray) -> IntArray:
    """int64 [N]: index of the reference to the same block before, -1 for a block's first."""
    order = np.argsort(block_ids, kind="stable")
    same = block_ids[order[1:]] == block_ids[order[:-1]]
    previous = np.full(len(block_ids), -1, dtype=np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def reuse_statistics(trace: BlockTrace) -> dict[str, Any]:
    """Shares of blocks and tokens, gaps in seconds and requests, and where reuse comes from.

    `ideal_*`: hits of a cache that never evicts; output is not inserted. `popularity`: how unevenly reuse
    falls on blocks. `depth`: hits by the place in the prompt, doubling. `sources`: whether the reference
    before was the same session's. `gaps` and `reused_within_s` are of a random share of the blocks in very
    long traces (`sampled_share`).
    """
    seen = is_seen_before(trace)
    request = trace.request_of_reference()
    return {
        "hit_blocks": int(seen.sum()),
        "total_blocks": trace.num_references,
        "unique_blocks": trace.num_unique,
        "ideal_block_hit_rate": _share(seen.sum(), len(seen)),
        "ideal_token_hit_rate": _share(
            trace.block_tokens[seen].sum(dtype=np.int64), trace.prompt_tokens.sum()
        ),
        "second_half": _second_half(trace, seen, request),
        "requests_without_hit": _requests_without_hit(trace, seen),
        "popularity": _popularity(trace),
        "depth": _by_depth(trace, seen),
        **_gaps(trace, request),
    }


def _share(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def _second_half(trace: BlockTrace, seen: BoolArray, request: IntArray) -> dict[str, float | None]:
    """The same over the later half of the requests: what a cache that is already warm sees."""
    middle = trace.num_requests // 2
    later = request >= middle
    hit_tokens = trace.block_tokens[seen & later].sum(dtype=np.int64)
    return {
        "ideal_block_hit_rate": _share((seen & later).sum(), later.sum()),
        "ideal_token_hit_rate": _share(hit_tokens, trace.prompt_tokens[middle:].sum()),
    }


def _requests_without_hit(trace: BlockTrace, seen: BoolArray) -> float | None:
    starts = trace.request_start[:-1]
    has_blocks = np.diff(trace.request_start) > 0
    return _share((~seen[starts[has_blocks]]).sum(), has_blocks.sum())


def _popularity(trace: BlockTrace) -> dict[str, float | None]:
    uses = np.bincount(trace.block_ids, minlength=trace.num_unique)
    reuses = np.sort(uses - 1)[::-1]
    top = max(1, math.ceil(_TOP_SHARE * len(reuses)))
    return {
        "never_reused_share": _share((reuses == 0).sum(), len(reuses)),
        "top_tenth_share_of_reuse": _share(reuses[:top].sum(), reuses.sum()),
        "max_uses": float(uses.max()) if len(uses) else None,
    }


def _by_depth(trace: BlockTrace, seen: BoolArray) -> list[dict[str, Any]]:
    """Rows {from_block, to_block, references, hit_rate}: block indices [0, 1), [1, 2), [2, 4), [4, 8) ..."""
    index = np.arange(trace.num_references) - np.repeat(
        trace.request_start[:-1], np.diff(trace.request_start)
    )
    bucket = np.zeros(len(index), dtype=np.int64)
    positive = index > 0
    bucket[positive] = np.minimum(1 + np.log2(index[positive]).astype(np.int64), _NUM_DEPTHS)
    references = np.bincount(bucket, minlength=1)
    hits = np.bincount(bucket[seen], minlength=len(references))
    return [
        {
            "from_block": 0 if depth == 0 else 1 << (depth - 1),
            "to_block": 1 << depth,
            "references": int(references[depth]),
            "hit_rate": _share(hits[depth], references[depth]),
        }
        for depth in range(len(references))
        if references[depth]
    ]


@dataclass(frozen=True, slots=True)
class _Episodes:
    """Times from a reference to the next one to the same block, or to the end of the trace."""

    wait_s: FloatArray
    is_reused: BoolArray

    def reused_within(self, limit_s: float) -> float:
        """Kaplan-Meier: the share reused within the limit, as if the trace did not end."""
        order = np.argsort(self.wait_s, kind="stable")
        waits, reused = self.wait_s[order], self.is_reused[order]
        times, first = np.unique(waits, return_index=True)
        events = np.add.reduceat(reused.astype(np.int64), first)
        at_risk = len(waits) - first
        survival = np.cumprod(1 - events / at_risk)
        place = int(np.searchsorted(times, limit_s, side="right")) - 1
        return 0.0 if place < 0 else float(1 - survival[place])


def _gaps(trace: BlockTrace, request: IntArray) -> dict[str, Any]:
    share = min(1.0, _SAMPLED_REFERENCES / max(1, trace.num_references))
    chosen = np.arange(trace.num_references) if share == 1 else _of_sampled_blocks(trace, share)
    at = request[chosen]
    previous = previous_reference(trace.block_ids[chosen])
    later = np.flatnonzero(previous >= 0)
    before = previous[later]
    gap_s = trace.arrival_s[at[later]] - trace.arrival_s[at[before]]
    has_times = bool(trace.arrival_s[-1] > trace.arrival_s[0]) if trace.num_requests else False
    return {
        "sampled_share": share,
        "gaps": {
            "seconds": _quantiles(gap_s) if has_times else None,
            "requests": _quantiles((at[later] - at[before]).astype(np.float64)),
        },
        "reused_within_s": _reused_within(trace, at, later, before, gap_s) if has_times else None,
        "law": fit_gap_law(gap_s) if has_times else None,
        "sources": _sources(trace, at[later], at[before]),
    }


def _of_sampled_blocks(trace: BlockTrace, share: float) -> IntArray:
    # Fibonacci hashing: neighbouring ids, which are one prompt's, fall apart.
    mixed = (trace.block_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return np.flatnonzero(mixed < np.uint64(share * 2**32))


def _reused_within(
    trace: BlockTrace, at: IntArray, later: IntArray, before: IntArray, gap_s: FloatArray
) -> dict[str, float]:
    wait = trace.arrival_s[-1] - trace.arrival_s[at]
    is_reused = np.zeros(len(at), dtype=np.bool_)
    wait[before] = gap_s
    is_reused[before] = True
    episodes = _Episodes(wait, is_reused)
    duration = float(trace.arrival_s[-1])
    return {f"{limit:g}": episodes.reused_within(limit) for limit in _WITHIN_S if limit <= duration}


def _sources(trace: BlockTrace, at: IntArray, before: IntArray) -> dict[str, float] | None:
    """Shares of reuse by who referenced the block before; None where the file names no sessions."""
    if not len(at) or bool((trace.session < 0).all()):
        return None
    session = trace.session
    is_named = (session[at] >= 0) & (session[before] >= 0)
    is_same = is_named & (session[at] == session[before])
    return {
        "same_session": float(is_same.mean()),
        "other_session": float((is_named & ~is_same).mean()),
        "unknown": float((~is_named).mean()),
    }


def _quantiles(values: FloatArray, levels: Sequence[int] = (10, 50, 90, 99)) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.percentile(values, levels).tolist()
    return {"n": len(values), "mean": float(values.mean())} | {
        f"p{level}": value for level, value in zip(levels, found, strict=True)
    }
