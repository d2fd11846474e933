"""Greedy dual size frequency with frequency remembered after eviction (Cherkasova 1998), for prefix trees.

At each use a block's priority becomes H = L + uses * (1 + depth / 256) ** 0.25. L is the priority of the
last victim, so that old popularity fades; the root of the recompute cost favours deep blocks mildly (its full
weight costs hits); depth 256 stands for the context at which attention costs as much as the rest of the
model. The leaf with the lowest priority leaves, of equals the one released first. Uses of the last 8
capacities of evicted blocks are remembered. csrc/policy_gdsf.h is the twin.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from math import sqrt
from typing import Final

from kvtune.cache.eviction_tree import TreeBlock, TreePolicy
from kvtune.types import BlockId

__all__ = ["GDSF"]

_GHOSTS: Final = 8  # evicted blocks remembered, in capacities
_COST_DEPTH: Final = 256  # blocks of context that double a block's recompute cost


class _Block(TreeBlock):
    __slots__ = ("block_id", "content", "depth", "order", "priority", "uses")

    def __init__(self, content: Hashable, block_id: BlockId, depth: int, uses: int) -> None:
        super().__init__()
        self.content = content
        self.block_id = block_id
        self.depth = depth
        self.uses = uses
        self.priority = 0.0
        self.order = 0  # of its last release


class GDSF(TreePolicy[_Block]):
    """Memory: facts of the resident blocks, uses of 8 capacities of evicted ones. O(log n)."""

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self._capacity = capacity
        self._ghosts: OrderedDict[Hashable, int] = OrderedDict()  # uses; evicted first in front
        self._heap: list[tuple[float, int, BlockId]] = []  # stale entries are skipped
        self._num_released = 0
        self._inflation = 0.0

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        pass

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        if block_id in self._resident:
            raise KeyError(block_id)
        above = None if parent is None else self._resident.get(parent)
        uses = self._ghosts.pop(content, 0)
        block = _Block(object() if content is None else content, block_id, depth, uses)
        self._resident[block_id] = block
        self._use(block)
        if block.enter(above) and above is not None:
            self._queue(above)

    def pin(self, block_id: BlockId) -> None:
        block = self._candidate(block_id)
        self._num_candidates -= 1
        self._use(block)
        if block.pin() and isinstance(block.parent, _Block):
            self._queue(block.parent)

    def unpin(self, block_id: BlockId) -> None:
        block = self._pinned(block_id)
        block.unpin()
        self._num_candidates += 1
        block.order = self._num_released
        self._num_released += 1
        if block.may_leave:
            self._queue(block)

    def victim(self) -> BlockId | None:
        heap = self._heap
        while heap:
            _, order, block_id = heap[0]
            block = self._resident.get(block_id)
            if block is not None and block.order == order and not block.is_pinned and block.may_leave:
                return block_id
            heapq.heappop(heap)
        return None

    def remove(self, block_id: BlockId) -> None:
        block = self._candidate(block_id)
        self._num_candidates -= 1
        del self._resident[block_id]
        self._inflation = max(self._inflation, block.priority)
        self._ghosts[block.content] = block.uses
        if len(self._ghosts) > _GHOSTS * self._capacity:
            self._ghosts.popitem(last=False)
        parent = block.parent
        if block.leave() and isinstance(parent, _Block):
            self._queue(parent)

    def _use(self, block: _Block) -> None:
        block.uses += 1
        block.priority = self._inflation + block.uses * sqrt(sqrt(1 + block.depth / _COST_DEPTH))

    def _queue(self, block: _Block) -> None:
        if self._resident.get(block.block_id) is not block:
            return  # evicted before its child: its window had passed
        if len(self._heap) > 64 + 2 * len(self._resident):
            self._drop_stale()
        heapq.heappush(self._heap, (block.priority, block.order, block.block_id))

    def _drop_stale(self) -> None:
        self._heap = [
            (block.priority, block.order, block.block_id)
            for block in self._resident.values()
            if not block.is_pinned and block.may_leave
        ]
        heapq.heapify(self._heap)
