"""From a block's hash to the block that holds it: one index per KV cache group."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count, repeat
from typing import Final, Protocol

from kvtune.types import BlockHash, BlockId

__all__ = ["HashIndex", "PrefixIndex"]

_STRETCH: Final = 64  # hashes looked up before asking whether the run goes on
_NOBODY: Final = repeat(-1)


class PrefixIndex(Protocol):
    """Finds published blocks. Verbs cost O(1); at most one block per hash; one thread."""

    def find(self, block_hash: BlockHash) -> BlockId | None:
        """The block with this content and prefix, or None. No side effect."""
        ...

    def insert(self, block_hash: BlockHash, block_id: BlockId) -> None:
        """Make a block findable. KeyError when the hash has a block already."""
        ...

    def evict(self, block_hash: BlockHash) -> None:
        """Forget the block, remember (for a bounded while) that it was here. KeyError when absent."""
        ...

    def forget(self, block_hash: BlockHash) -> None:
        """As if the block had never been here. KeyError when absent."""
        ...

    def was_evicted(self, block_hash: BlockHash) -> bool:
        """Whether the block was here once and was evicted; may forget the oldest evictions."""
        ...

    def clear(self) -> None:
        """Forget all blocks and all evictions."""
        ...

    def items(self) -> Iterable[tuple[BlockHash, BlockId]]:
        """Every findable block."""
        ...

    def __len__(self) -> int: ...


class HashIndex:
    """One dict of blocks and the last `max_evicted` evictions: an id, or minus the number of an eviction."""

    def __init__(self, *, max_evicted: int) -> None:
        self._known: dict[BlockHash, int] = {}
        self._evictions: deque[BlockHash] = deque()  # the last ones, in order; some are back
        self._max_evicted = max_evicted
        self._num_evicted = self._num_blocks = 0

    def find(self, block_hash: BlockHash) -> BlockId | None:
        found = self._known.get(block_hash, -1)
        return None if found < 0 else BlockId(found)

    def insert(self, block_hash: BlockHash, block_id: BlockId) -> None:
        if self._known.get(block_hash, -1) >= 0:
            raise KeyError(block_hash)
        self._known[block_hash] = block_id
        self._num_blocks += 1

    def evict(self, block_hash: BlockHash) -> None:
        if self._known[block_hash] < 0:
            raise KeyError(block_hash)
        self.evict_all((block_hash,))

    def forget(self, block_hash: BlockHash) -> None:
        if self._known[block_hash] < 0:
            raise KeyError(block_hash)
        del self._known[block_hash]
        self._num_blocks -= 1

    def was_evicted(self, block_hash: BlockHash) -> bool:
        return self._known.get(block_hash, 0) < 0

    def clear(self) -> None:
        self._known.clear()
        self._evictions.clear()
        self._num_blocks = 0

    def items(self) -> Iterable[tuple[BlockHash, BlockId]]:
        return ((block_hash, BlockId(found)) for block_hash, found in self._known.items() if found >= 0)

    def __len__(self) -> int:
        return self._num_blocks

    # --- many at once

    def run(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the leading run of findable hashes."""
        run: list[int] = []
        find = self._known.get
        for start in range(0, len(hashes), _STRETCH):
            found = list(map(find, hashes[start : start + _STRETCH], _NOBODY))
            run += found
            if min(found) < 0:
                return run[: next(i for i, block_id in enumerate(run) if block_id < 0)]
        return run

    def evict_all(self, hashes: Sequence[BlockHash]) -> None:
        """Forget these blocks, all of them findable, and remember that they were evicted in this order."""
        known, evictions = self._known, self._evictions
        known.update(zip(hashes, count(-self._num_evicted - 1, -1), strict=False))
        evictions += hashes
        self._num_evicted += len(hashes)
        self._num_blocks -= len(hashes)
        while len(evictions) > self._max_evicted:
            oldest = evictions.popleft()
            if known.get(oldest) == len(evictions) - self._num_evicted:
                del known[oldest]

    def insert_all(self, hashes: Sequence[BlockHash], block_ids: Sequence[BlockId]) -> bool:
        """Make blocks findable. False, and nothing done, where one of the hashes has a block."""
        known, num = self._known, len(self._known)
        found = list(map(known.setdefault, hashes, block_ids))
        if len(known) != num + len(hashes):  # some were known
            new = {h for h, was, own in zip(hashes, found, block_ids, strict=True) if was == own}
            if any(was >= 0 and h not in new for h, was in zip(hashes, found, strict=True)):
                for block_hash in new:
                    del known[block_hash]
                return False
            known.update(zip(hashes, block_ids, strict=True))
        self._num_blocks += len(hashes)
        return True

    def mark_seen(self, hashes: Sequence[BlockHash], seen: array[int]) -> None:
        """Set seen[i] where hash i is findable or its eviction is remembered."""
        known = self._known
        if known.keys().isdisjoint(hashes):
            return
        for i, block_hash in enumerate(hashes):
            if block_hash in known:
                seen[i] = 1
