"""Hazard eviction guarded by LRU: the default policy.

As long as it has not fallen behind a pure LRU cache of the same size on this very traffic, the learned policy
decides; once it has, LRU does. The pure LRU cache is a shadow: names only, its last `capacity` blocks by use.
Hits of both are counted for each request. The allowance is what may be lost before the guard acts: a quarter
of a percent of all references and a little to begin with. Then LRU decides, for at least four capacities of
references (each time twice as long) and until half the percentage is made good. Eviction by last use turns
the cache into the shadow's copy, so that what is lost stays within the allowance and that change. The
learned policy goes on learning. csrc/policy_guarded.h is the twin.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from kvtune.cache.eviction_hazard import Hazard
from kvtune.types import BlockId

if TYPE_CHECKING:
    from kvtune.cache.eviction import EvictionPolicy

__all__ = ["Guarded"]


class Guarded:
    """`learned` builds the policy under guard. It needs names of two capacities besides."""

    def __init__(self, capacity: int = 0, *, learned: Callable[[int], EvictionPolicy] = Hazard) -> None:
        self._capacity = capacity
        self._learned = learned(capacity)
        self._pinned: set[BlockId] = set()
        self._recency: OrderedDict[BlockId, None] = OrderedDict()  # candidates, oldest use first
        self._content: dict[BlockId, Hashable] = {}
        self._resident: set[Hashable] = set()
        self._shadow: OrderedDict[Hashable, None] = OrderedDict()
        self._behind = 0  # hits of the shadow more than of the cache
        self._num_references = self._since = 0
        self._wait = max(5000, 4 * capacity)
        self._is_lru = False

    @property
    def is_lru(self) -> bool:
        """Whether the guard has taken over."""
        return self._is_lru

    @property
    def num_behind(self) -> int:
        """Blocks that a pure LRU cache would have hit more so far; negative: fewer."""
        return self._behind

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        self._learned.begin(contents, num_hit)
        # What is resident, not what was hit: an engine computes the last token of a prompt it knows.
        self._behind += _leading_run(contents, self._shadow) - _leading_run(contents, self._resident)
        self._num_references += len(contents)
        self._decide()

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        self._learned.insert(block_id, depth=depth, content=content, parent=parent)
        self._pinned.add(block_id)
        self._content[block_id] = content
        self._resident.add(content)

    def pin(self, block_id: BlockId) -> None:
        self._learned.pin(block_id)
        del self._recency[block_id]
        self._pinned.add(block_id)

    def unpin(self, block_id: BlockId) -> None:
        self._learned.unpin(block_id)
        self._pinned.remove(block_id)
        self._recency[block_id] = None
        content = self._content[block_id]
        self._shadow[content] = None
        self._shadow.move_to_end(content)
        if len(self._shadow) > self._capacity:
            self._shadow.popitem(last=False)

    def victim(self) -> BlockId | None:
        return next(iter(self._recency), None) if self._is_lru else self._learned.victim()

    def remove(self, block_id: BlockId) -> None:
        self._learned.remove(block_id)
        del self._recency[block_id]
        self._resident.discard(self._content.pop(block_id))

    def __len__(self) -> int:
        return len(self._recency)

    def _decide(self) -> None:
        if not self._is_lru:
            allowance = self._num_references // 400 + 32 + self._capacity // 200
            if self._behind > allowance:
                self._is_lru, self._since = True, self._num_references
        elif self._num_references - self._since > self._wait and self._behind < self._num_references // 800:
            self._is_lru = False
            self._wait *= 2


def _leading_run(contents: Sequence[Hashable], residents: OrderedDict[Hashable, None] | set[Hashable]) -> int:
    run = 0
    for content in contents:
        if content not in residents:
            break
        run += 1
    return run
