"""Which idle block leaves first. A policy decides; it owns no ids and no bytes.

A block's life as a policy sees it::

    insert ─▶ pinned ─unpin─▶ candidate ─victim()─▶ remove
                 ▲              │
                 └────pin───────┘

`FIFO` is by first insertion, whatever happens later. `LRU` and the policies that learn (gdsf, hazard,
guarded) have modules of their own beside this one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from kvtune.cache.eviction_gdsf import GDSF
from kvtune.cache.eviction_guarded import Guarded
from kvtune.cache.eviction_hazard import Hazard
from kvtune.cache.eviction_lru import LRU
from kvtune.errors import UsageError
from kvtune.types import BlockId

__all__ = ["FIFO", "LRU", "POLICIES", "EvictionPolicy", "PolicyFactory", "policy_factory"]


class EvictionPolicy(Protocol):
    """Orders the idle blocks of one pool. Every verb costs O(log n) or less, amortised; one thread.

    The caller inserts a block once, pins and unpins it in turn, and removes it once; anything else
    is a caller's bug and raises KeyError. Block ids are places in the pool and are used again for other
    content; `content` names what a block holds, its whole prefix included, and outlives an eviction.
    Decide by these calls alone, never by a clock or chance of one's own: the engine, the simulator and
    the replay core make the same calls in the same order.
    """

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        """A request was admitted: the contents of its prompt's full blocks, head to tail, of which the
        first `num_hit` are resident and pinned next. The rest is inserted once it is computed. Blocks that
        another request uses at this moment are pinned already and not pinned again."""
        ...

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        """The block became resident, pinned. `depth` is its index in the sequence, 0 for the head;
        `parent` is the resident block before it, None for a head or where that block left its window."""
        ...

    def pin(self, block_id: BlockId) -> None:
        """Someone uses the block again: it is no candidate until unpinned."""
        ...

    def unpin(self, block_id: BlockId) -> None:
        """Nobody uses the block: it is a candidate, and this moment is its last use."""
        ...

    def victim(self) -> BlockId | None:
        """The candidate that should leave next, None when there is none. Changes no answer."""
        ...

    def remove(self, block_id: BlockId) -> None:
        """The block is not resident any more (evicted or dropped); it must be a candidate."""
        ...

    def __len__(self) -> int:
        """Number of candidates."""
        ...


class FIFO:
    """First inserted, first out; use does not matter. O(log n): a heap whose stale tops are skipped."""

    def __init__(self, capacity: int = 0) -> None:
        self._inserted: dict[BlockId, int] = {}
        self._num_inserted = 0
        self._candidates: set[BlockId] = set()
        self._heap: list[tuple[int, BlockId]] = []
        self._queued: set[BlockId] = set()  # resident blocks that already have a live heap entry

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        pass

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        if block_id in self._inserted:
            raise KeyError(block_id)
        self._inserted[block_id] = self._num_inserted
        self._num_inserted += 1

    def pin(self, block_id: BlockId) -> None:
        self._candidates.remove(block_id)

    def unpin(self, block_id: BlockId) -> None:
        order = self._inserted[block_id]
        if block_id in self._candidates:
            raise KeyError(block_id)
        self._candidates.add(block_id)
        if block_id not in self._queued:
            self._queued.add(block_id)
            heapq.heappush(self._heap, (order, block_id))

    def victim(self) -> BlockId | None:
        while self._heap:
            order, block_id = self._heap[0]
            is_live = self._inserted.get(block_id) == order
            if is_live and block_id in self._candidates:
                return block_id
            heapq.heappop(self._heap)
            if is_live:  # pinned now: unpinning queues it again
                self._queued.discard(block_id)
        return None

    def remove(self, block_id: BlockId) -> None:
        self._candidates.remove(block_id)
        del self._inserted[block_id]
        self._queued.discard(block_id)  # its heap entry is stale from now on

    def __len__(self) -> int:
        return len(self._candidates)


PolicyFactory = Callable[[int], EvictionPolicy]
"""Builds the policy of one pool from the number of blocks the pool has."""

POLICIES: dict[str, PolicyFactory] = {
    "guarded": Guarded,
    "lru": LRU,
    "fifo": FIFO,
    "gdsf": GDSF,
    "hazard": Hazard,
}


def policy_factory(policy: str | PolicyFactory) -> PolicyFactory:
    """A built-in by name, or the caller's own factory as it is. UsageError names the known ones."""
    if not isinstance(policy, str):
        return policy
    try:
        return POLICIES[policy]
    except KeyError:
        raise UsageError(f"unknown eviction policy {policy!r}; known: {', '.join(POLICIES)}") from None
