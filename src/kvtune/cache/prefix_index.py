"""From a block's hash to the block that holds it: one index per KV cache group."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Final, Protocol, cast

from kvtune.types import BlockHash, BlockId

__all__ = ["HashIndex", "PrefixIndex"]

_STRETCH: Final = 64  # hashes looked up before asking whether the run goes on


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
    """A dict, and the last `max_evicted` evictions to tell EVICTED from NEVER_SEEN."""

    def __init__(self, *, max_evicted: int) -> None:
        self._blocks: dict[BlockHash, BlockId] = {}
        self._evicted: dict[BlockHash, int] = {}  # number of its last eviction; it may be back
        self._evictions: deque[BlockHash] = deque()  # the last ones, in order
        self._max_evicted = max_evicted
        self._num_evicted = 0

    def find(self, block_hash: BlockHash) -> BlockId | None:
        return self._blocks.get(block_hash)

    def insert(self, block_hash: BlockHash, block_id: BlockId) -> None:
        if block_hash in self._blocks:
            raise KeyError(block_hash)
        self._blocks[block_hash] = block_id

    def evict(self, block_hash: BlockHash) -> None:
        self.evict_all((block_hash,))

    def forget(self, block_hash: BlockHash) -> None:
        del self._blocks[block_hash]
        self._evicted.pop(block_hash, None)

    def was_evicted(self, block_hash: BlockHash) -> bool:
        return block_hash in self._evicted and block_hash not in self._blocks

    def clear(self) -> None:
        self._blocks.clear()
        self._evicted.clear()
        self._evictions.clear()

    def items(self) -> Iterable[tuple[BlockHash, BlockId]]:
        return self._blocks.items()

    def __len__(self) -> int:
        return len(self._blocks)

    # --- many at once

    def run(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """Blocks of the leading run of findable hashes."""
        run: list[BlockId | None] = []
        find = self._blocks.get
        for start in range(0, len(hashes), _STRETCH):
            found = list(map(find, hashes[start : start + _STRETCH]))
            if None in found:
                run += found[: found.index(None)]
                break
            run += found
        return cast("list[BlockId]", run)

    def evict_all(self, hashes: Sequence[BlockHash]) -> None:
        """`evict` each of them, in this order."""
        deque(map(self._blocks.__delitem__, hashes), maxlen=0)
        self._evicted.update(zip(hashes, count(self._num_evicted + 1), strict=False))
        self._evictions += hashes
        self._num_evicted += len(hashes)
        while len(self._evictions) > self._max_evicted:
            oldest = self._evictions.popleft()
            if self._evicted.get(oldest) == self._num_evicted - len(self._evictions):
                del self._evicted[oldest]

    def insert_all(self, hashes: Sequence[BlockHash], block_ids: Sequence[BlockId]) -> bool:
        """Make blocks findable. False, and nothing done, where one of the hashes has a block."""
        blocks, num_before = self._blocks, len(self._blocks)
        found = list(map(blocks.setdefault, hashes, block_ids))
        if len(blocks) == num_before + len(hashes):
            return True
        for block_hash, block_id, own_id in zip(hashes, found, block_ids, strict=True):
            if block_id == own_id:
                blocks.pop(block_hash, None)
        return False

    def mark_seen(self, hashes: Sequence[BlockHash], seen: array[int]) -> None:
        """Set seen[i] where hash i is findable or its eviction is remembered."""
        blocks, evicted = self._blocks, self._evicted
        if blocks.keys().isdisjoint(hashes) and evicted.keys().isdisjoint(hashes):
            return
        for i, block_hash in enumerate(hashes):
            if block_hash in evicted or block_hash in blocks:
                seen[i] = 1
