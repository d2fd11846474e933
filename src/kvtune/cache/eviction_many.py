"""Verbs of a policy for many blocks at once: LRU has its own, other policies take them one by one."""

from __future__ import annotations

from collections.abc import Sequence

from kvtune.cache.eviction import LRU, EvictionPolicy
from kvtune.types import BlockHash, BlockId

__all__ = ["insert_run", "take_victims", "unpin_each"]


def take_victims(policy: EvictionPolicy, num: int) -> list[BlockId]:
    """The next `num` victims, removed; fewer where there are fewer candidates."""
    if isinstance(policy, LRU):
        return policy.take_oldest(num)
    victims: list[BlockId] = []
    while len(victims) < num:
        victim = policy.victim()
        if victim is None:
            break
        policy.remove(victim)
        victims.append(victim)
    return victims


def insert_run(
    policy: EvictionPolicy,
    block_ids: Sequence[BlockId],
    contents: Sequence[BlockHash],
    *,
    depth: int,
    parent: BlockId | None,
) -> None:
    """Blocks of one sequence became resident, the first one at `depth` behind `parent`."""
    if isinstance(policy, LRU):
        policy.insert_all(block_ids)
        return
    insert = policy.insert
    for at, (block_id, content) in enumerate(zip(block_ids, contents, strict=True), depth):
        insert(block_id, depth=at, content=content, parent=parent)
        parent = block_id


def unpin_each(policy: EvictionPolicy, block_ids: Sequence[BlockId]) -> None:
    """The blocks are candidates, in this order."""
    if isinstance(policy, LRU):
        policy.unpin_all(block_ids)
        return
    unpin = policy.unpin
    for block_id in block_ids:
        unpin(block_id)
