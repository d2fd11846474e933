"""From a block's hash to the block that holds it: one index per KV cache group."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvtune.types import BlockHash, BlockId

__all__ = ["HashIndex", "PrefixIndex"]


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
        self._evicted: OrderedDict[BlockHash, int] = OrderedDict()  # number of its eviction
        self._max_evicted = max_evicted
        self._num_evicted = 0

    def find(self, block_hash: BlockHash) -> BlockId | None:
        return self._blocks.get(block_hash)

    def insert(self, block_hash: BlockHash, block_id: BlockId) -> None:
        if block_hash in self._blocks:
            raise KeyError(block_hash)
        self._blocks[block_hash] = block_id
        self._evicted.pop(block_hash, None)

    def evict(self, block_hash: BlockHash) -> None:
        del self._blocks[block_hash]
        self._num_evicted += 1
        evicted = self._evicted
        evicted[block_hash] = self._num_evicted
        oldest = next(iter(evicted))
        if evicted[oldest] <= self._num_evicted - self._max_evicted:
            del evicted[oldest]

    def forget(self, block_hash: BlockHash) -> None:
        del self._blocks[block_hash]

    def was_evicted(self, block_hash: BlockHash) -> bool:
        return block_hash in self._evicted

    def clear(self) -> None:
        self._blocks.clear()
        self._evicted.clear()

    def items(self) -> Iterable[tuple[BlockHash, BlockId]]:
        return self._blocks.items()

    def __len__(self) -> int:
        return len(self._blocks)

    # --- many at once

    def run(self, hashes: Iterable[BlockHash]) -> list[BlockId]:
        """Blocks of the leading run of findable hashes."""
        run: list[BlockId] = []
        for block_id in map(self._blocks.get, hashes):
            if block_id is None:
                break
            run.append(block_id)
        return run

    def evict_all(self, hashes: Sequence[BlockHash]) -> None:
        """`evict` each of them, in this order."""
        blocks, evicted = self._blocks, self._evicted
        for number, block_hash in enumerate(hashes, self._num_evicted + 1):
            del blocks[block_hash]
            evicted[block_hash] = number
        self._num_evicted += len(hashes)
        outdated = self._num_evicted - self._max_evicted
        while evicted and evicted[next(iter(evicted))] <= outdated:
            evicted.popitem(last=False)

    def has_none_of(self, hashes: Iterable[BlockHash]) -> bool:
        return self._blocks.keys().isdisjoint(hashes)

    def insert_all(self, hashes: Sequence[BlockHash], block_ids: Iterable[BlockId]) -> None:
        """Make blocks findable of whose hashes none has a block."""
        self._blocks.update(zip(hashes, block_ids, strict=True))
        evicted = self._evicted
        if not evicted.keys().isdisjoint(hashes):
            for block_hash in hashes:
                evicted.pop(block_hash, None)

    def mark_seen(self, hashes: Sequence[BlockHash], seen: array[int]) -> None:
        """Set seen[i] where hash i is findable or its eviction is remembered."""
        blocks, evicted = self._blocks, self._evicted
        if blocks.keys().isdisjoint(hashes) and evicted.keys().isdisjoint(hashes):
            return
        for i, block_hash in enumerate(hashes):
            if block_hash in evicted or block_hash in blocks:
                seen[i] = 1
