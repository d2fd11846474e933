"""Verbs of a policy for many blocks at once: LRU has its own, other policies take them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from kvtune.cache.eviction import LRU, EvictionPolicy
from kvtune.cache.eviction_lru import BlockIds
from kvtune.types import BlockHash, BlockId

__all__ = ["insert_run", "pin_each", "take_victims", "unpin_each"]


def take_victims(policy: EvictionPolicy, num: int) -> BlockIds:
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
    return np.array(victims, dtype=np.int32)


def insert_run(
    policy: EvictionPolicy,
    block_ids: BlockIds | Sequence[BlockId],
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
    for at, (block_id, content) in enumerate(zip(_ids(block_ids), contents, strict=True), depth):
        insert(block_id, depth=at, content=content, parent=parent)
        parent = block_id


def pin_each(policy: EvictionPolicy, block_ids: BlockIds | Sequence[BlockId]) -> None:
    """Someone uses these candidates again."""
    if isinstance(policy, LRU):
        policy.pin_all(block_ids)
        return
    for block_id in _ids(block_ids):
        policy.pin(block_id)


def unpin_each(policy: EvictionPolicy, block_ids: BlockIds | Sequence[BlockId]) -> None:
    """The blocks are candidates, in this order."""
    if isinstance(policy, LRU):
        policy.unpin_all(block_ids)
        return
    unpin = policy.unpin
    for block_id in _ids(block_ids):
        unpin(block_id)


def _ids(block_ids: BlockIds | Sequence[BlockId]) -> Sequence[BlockId]:
    return cast("list[BlockId]", block_ids.tolist()) if isinstance(block_ids, np.ndarray) else block_ids
