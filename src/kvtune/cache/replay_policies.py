"""Eviction policies that only replay needs: textbook LFU as a baseline, and the pinned offline optimum."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from kvtune.cache.replay_records import Int32Array, TraceArrays
from kvtune.types import BlockId

__all__ = ["LFU", "NEVER", "OptimalPinned", "next_uses"]

NEVER = np.iinfo(np.int32).max
"""The next use of a block that no later request uses."""


class LFU:
    """Fewest uses since insertion, then the least recent request, then deepest.

    One list for each number of uses. Unpinning comes request by request and deepest first, so appending
    orders each list as ties are broken. O(log n): a heap of the numbers of uses that have candidates.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._uses: dict[BlockId, int] = {}
        self._pinned: set[BlockId] = set()
        self._by_uses: dict[int, OrderedDict[BlockId, None]] = {}
        self._queue: list[int] = []  # keys of _by_uses; empty lists are skipped
        self._num_candidates = 0

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        pass

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        if block_id in self._uses:
            raise KeyError(block_id)
        self._uses[block_id] = 1
        self._pinned.add(block_id)

    def pin(self, block_id: BlockId) -> None:
        self._leave(block_id)
        self._uses[block_id] += 1
        self._pinned.add(block_id)

    def unpin(self, block_id: BlockId) -> None:
        self._pinned.remove(block_id)
        uses = self._uses[block_id]
        if uses not in self._by_uses:
            self._by_uses[uses] = OrderedDict()
            heapq.heappush(self._queue, uses)
        self._by_uses[uses][block_id] = None
        self._num_candidates += 1

    def victim(self) -> BlockId | None:
        while self._queue:
            candidates = self._by_uses[self._queue[0]]
            if candidates:
                return next(iter(candidates))
            del self._by_uses[heapq.heappop(self._queue)]
        return None

    def remove(self, block_id: BlockId) -> None:
        self._leave(block_id)
        del self._uses[block_id]

    def __len__(self) -> int:
        return self._num_candidates

    def _leave(self, block_id: BlockId) -> None:
        del self._by_uses[self._uses[block_id]][block_id]
        self._num_candidates -= 1


def next_uses(arrays: TraceArrays) -> Int32Array:
    """int32 [N]: the request that uses each reference's block next, NEVER where none does."""
    request = np.repeat(np.arange(arrays.num_requests, dtype=np.int32), np.diff(arrays.request_start))
    order = np.argsort(arrays.block_ids, kind="stable")
    following = order[1:][np.diff(arrays.block_ids[order]) == 0]
    before = order[:-1][np.diff(arrays.block_ids[order]) == 0]
    after = np.full(arrays.num_references, NEVER, dtype=np.int32)
    after[before] = request[following]
    return after


class OptimalPinned:
    """Furthest next use first, then deepest, then the higher number: Belady's rule for an engine, which
    must admit the current request. Blocks are their own content; `look_at` moves it along its trace."""

    def __init__(self, arrays: TraceArrays) -> None:
        self._start = arrays.request_start
        self._after = next_uses(arrays)
        self._depth: dict[BlockId, int] = {}
        self._next_use: dict[BlockId, int] = {}  # of candidates
        self._heap: list[tuple[int, int, int]] = []
        self._upcoming: list[int] = []

    def look_at(self, request: int) -> None:
        """The next `begin` is for this request of the trace."""
        low, high = self._start[request], self._start[request + 1]
        self._upcoming = self._after[low:high].tolist()

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        pass

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        if block_id in self._depth:
            raise KeyError(block_id)
        self._depth[block_id] = depth

    def pin(self, block_id: BlockId) -> None:
        del self._next_use[block_id]

    def unpin(self, block_id: BlockId) -> None:
        depth = self._depth[block_id]
        use = self._upcoming[depth]
        self._next_use[block_id] = use
        heapq.heappush(self._heap, (-use, -depth, -block_id))

    def victim(self) -> BlockId | None:
        while self._heap:
            use, _, block_id = self._heap[0]
            if self._next_use.get(BlockId(-block_id)) == -use:
                return BlockId(-block_id)
            heapq.heappop(self._heap)
        return None

    def remove(self, block_id: BlockId) -> None:
        del self._next_use[block_id]
        del self._depth[block_id]

    def __len__(self) -> int:
        return len(self._next_use)
