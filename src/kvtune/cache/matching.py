"""How far a prefix is cached in every group at once, and why the rest is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.cache.group import GroupCache
from kvtune.types import BlockHash, BlockId, MissCause

__all__ = ["Found", "longest_match", "miss_causes"]


@dataclass(frozen=True, slots=True)
class Found:
    """`boundary` blocks hit; `full_run` leading blocks are resident in every full-attention group."""

    boundary: int
    blocks: tuple[tuple[BlockId, ...], ...]
    full_run: int


def longest_match(groups: Sequence[GroupCache], hashes: Sequence[BlockHash], limit: int) -> Found:
    """The longest boundary <= `limit` blocks that is valid in every group.

    A full group needs every block; a sliding group those that hold the last W-1 tokens before it.
    """
    full_run = len(hashes)
    resident: list[Sequence[BlockId | None]] = [()] * len(groups)
    for g, group in enumerate(groups):
        if group.window is None:
            resident[g] = group.longest_run(hashes[:full_run])
            full_run = len(resident[g])
    boundary = min(full_run, limit)
    sliding = [g for g, group in enumerate(groups) if group.window is not None]
    for g in sliding:
        resident[g] = groups[g].residents(hashes[:boundary])
    is_settled = not sliding
    while not is_settled:  # each group may lower the boundary below what another one accepted
        before = boundary
        for g in sliding:
            boundary = groups[g].boundary(resident[g], boundary)
        is_settled = boundary == before
    blocks = tuple(g.visible_blocks(r, boundary) for g, r in zip(groups, resident, strict=True))
    return Found(boundary, blocks, full_run)


def miss_causes(
    groups: Sequence[GroupCache], hashes: Sequence[BlockHash], found: Found, num_tokens: int
) -> dict[MissCause, int]:
    """Tokens not hit, by cause. Blocks beyond the leading run of the full groups were never seen or
    evicted; blocks inside it failed a window, or hold the last token, which is always computed."""
    block_size = groups[0].block_size
    causes: Counter[MissCause] = Counter()
    limit = (num_tokens - 1) // block_size
    for i in range(found.boundary, len(hashes)):
        if i >= found.full_run or all(group.window is not None for group in groups):
            cause = _absence(groups, hashes[i])
        else:
            cause = MissCause.WINDOW
        if i == limit and found.boundary == limit and _is_everywhere(groups, hashes, i, found):
            cause = MissCause.LAST_TOKEN
        causes[cause] += block_size
    partial = num_tokens - len(hashes) * block_size
    if partial:
        causes[MissCause.PARTIAL_BLOCK] = partial
    return dict(causes)


def _absence(groups: Sequence[GroupCache], block_hash: BlockHash) -> MissCause:
    """Seen once if some group still holds the block or remembers its eviction."""
    for group in groups:
        if group.index.was_evicted(block_hash) or group.index.find(block_hash) is not None:
            return MissCause.EVICTED
    return MissCause.NEVER_SEEN


def _is_everywhere(groups: Sequence[GroupCache], hashes: Sequence[BlockHash], i: int, found: Found) -> bool:
    return i < found.full_run and all(group.index.find(hashes[i]) is not None for group in groups)
