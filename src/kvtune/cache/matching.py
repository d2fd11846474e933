"""How far a prefix is cached in every group at once, and why the rest is not."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.cache.group import GroupCache
from kvtune.cache.in_flight import InFlight
from kvtune.cache.records import PrefixMatch
from kvtune.cache.table import Table
from kvtune.types import BlockHash, MissCause, RequestId

__all__ = ["Found", "Looked", "Matching", "WholeMatching", "longest_match", "miss_causes"]


class Matching:
    """The half of `KVCacheManager` that looks for prefixes."""

    def __init__(self, groups: Sequence[GroupCache], in_flight: InFlight, *, block_size: int) -> None:
        self._groups = groups
        self._in_flight = in_flight
        self._block_size = block_size

    def match(self, hashes: Sequence[BlockHash], num_tokens: int, root: BlockHash) -> PrefixMatch:
        """Of a prompt of so many tokens, of whose full blocks these are the hashes."""
        limit = (num_tokens - 1) // self._block_size
        found = longest_match(self._groups, hashes, limit)
        leader, awaited = self._in_flight.awaited(hashes[found.boundary : limit])
        return PrefixMatch(
            num_tokens=found.boundary * self._block_size,
            blocks=found.blocks,
            misses=miss_causes(self._groups, hashes, found, num_tokens),
            leader=leader,
            awaited=awaited,
            root=root,
            block_hashes=hashes,
        )


@dataclass(frozen=True, slots=True)
class Looked:
    """Of the hashes given, the leading ones have these `blocks`; `num_seen` behind them were here before. The
    first one without a block is computed by the `leader`, and so are those up to `awaited`."""

    blocks: Table[int]
    num_seen: int
    leader: RequestId | None
    awaited: BlockHash | None


class WholeMatching(Matching):
    """For a cache of one group that sees the whole context and whose low planes stay."""

    def match(self, hashes: Sequence[BlockHash], num_tokens: int, root: BlockHash) -> PrefixMatch:
        size, num = self._block_size, len(hashes)
        limit = (num_tokens - 1) // size
        looked = self._look(hashes, limit)
        run, num_seen = len(looked.blocks), looked.num_seen
        boundary = min(run, limit)
        misses: dict[MissCause, int] = {}
        if num_seen:
            misses[MissCause.EVICTED] = num_seen * size
        if run + num_seen < num:
            misses[MissCause.NEVER_SEEN] = (num - run - num_seen) * size
        if boundary < run:  # the last token is always computed, and with it the rest of its block
            misses[MissCause.LAST_TOKEN] = size
        if num * size < num_tokens:
            misses[MissCause.PARTIAL_BLOCK] = num_tokens - num * size
        return PrefixMatch(
            num_tokens=boundary * size,
            blocks=(looked.blocks if boundary == run else looked.blocks[:boundary],),
            misses=misses,
            root=root,
            leader=looked.leader,
            awaited=looked.awaited,
            block_hashes=hashes,
        )

    def _look(self, hashes: Sequence[BlockHash], limit: int) -> Looked:
        """Names from `limit` on are not waited for."""
        blocks = self._groups[0].pool.find_run(hashes)
        num_seen = _num_seen_before(self._groups, hashes[len(blocks) :])
        leader, awaited = self._in_flight.awaited(hashes[len(blocks) : limit])
        return Looked(blocks, num_seen, leader, awaited)


@dataclass(frozen=True, slots=True)
class Found:
    """`boundary` blocks hit; `full_run` leading blocks are resident in every full-attention group."""

    boundary: int
    blocks: tuple[Table[int], ...]
    full_run: int


def longest_match(groups: Sequence[GroupCache], hashes: Sequence[BlockHash], limit: int) -> Found:
    """The longest boundary <= `limit` blocks that is valid in every group.

    A full group needs every block; a sliding group those that hold the last W-1 tokens before it.
    """
    full_run = len(hashes)
    runs: dict[int, Table[int]] = {}
    for g, group in enumerate(groups):
        if group.window is None:
            runs[g] = group.pool.find_run(hashes if full_run == len(hashes) else hashes[:full_run])
            full_run = len(runs[g])
    boundary = min(full_run, limit)
    sliding = [group for group in groups if group.window is not None]
    is_settled = not sliding
    while not is_settled:  # each group may lower the boundary below what another one accepted
        before = boundary
        for group in sliding:
            boundary = group.boundary(hashes, boundary)
        is_settled = boundary == before
    blocks = tuple(
        runs[g][:boundary] if g in runs else group.visible_blocks(hashes, boundary)
        for g, group in enumerate(groups)
    )
    return Found(boundary, blocks, full_run)


def miss_causes(
    groups: Sequence[GroupCache], hashes: Sequence[BlockHash], found: Found, num_tokens: int
) -> dict[MissCause, int]:
    """Tokens not hit, by cause. Blocks beyond the leading run of the full groups were never seen or
    evicted; blocks inside it failed a window, or hold the last token, which is always computed."""
    block_size = groups[0].block_size
    causes: Counter[MissCause] = Counter()
    limit = (num_tokens - 1) // block_size
    # all blocks if every group slides, else those behind the leading run
    absent_from = found.boundary if all(g.window is not None for g in groups) else found.full_run
    absent = hashes[max(absent_from, found.boundary) :]
    others = _without_lost(groups, absent)
    num_evicted = _num_seen_before(groups, others)
    causes[MissCause.LOWERED] = len(absent) - len(others)
    causes[MissCause.EVICTED] = num_evicted
    causes[MissCause.NEVER_SEEN] = len(others) - num_evicted
    causes[MissCause.WINDOW] = len(hashes) - found.boundary - len(absent)
    if limit == found.boundary < len(hashes) and _is_everywhere(groups, hashes, limit, found):
        causes[MissCause.LAST_TOKEN] = 1
        seen = limit >= max(absent_from, found.boundary)
        causes[MissCause.EVICTED if seen else MissCause.WINDOW] -= 1
    tokens = {cause: count * block_size for cause, count in causes.items() if count}
    partial = num_tokens - len(hashes) * block_size
    if partial:
        tokens[MissCause.PARTIAL_BLOCK] = partial
    return tokens


def _without_lost(groups: Sequence[GroupCache], hashes: Sequence[BlockHash]) -> Sequence[BlockHash]:
    """Blocks but those that left some group's index with their low plane."""
    for pool in (group.pool for group in groups if group.pool.planes is not None):
        hashes = [h for h in hashes if not pool.was_lost(h)]
    return hashes


def _num_seen_before(groups: Sequence[GroupCache], hashes: Sequence[BlockHash]) -> int:
    """Blocks that some group still holds, or of which one remembers the eviction."""
    seen = array("B", bytes(len(hashes)))
    for group in groups:
        group.pool.mark_seen(hashes, seen)
    return seen.tobytes().count(1)


def _is_everywhere(groups: Sequence[GroupCache], hashes: Sequence[BlockHash], i: int, found: Found) -> bool:
    return i < found.full_run and all(group.pool.last_gap(hashes, i, i + 1) < i for group in groups)
