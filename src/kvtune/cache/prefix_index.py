"""From a block's hash to the block that holds it: one index per KV cache group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
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
    """A dict, and the last `max_evicted` evicted hashes to tell EVICTED from NEVER_SEEN."""

    def __init__(self, *, max_evicted: int) -> None:
        self._blocks: dict[BlockHash, BlockId] = {}
        self._evicted: OrderedDict[BlockHash, None] = OrderedDict()
        self._max_evicted = max_evicted

    def find(self, block_hash: BlockHash) -> BlockId | None:
        return self._blocks.get(block_hash)

    def insert(self, block_hash: BlockHash, block_id: BlockId) -> None:
        if block_hash in self._blocks:
            raise KeyError(block_hash)
        self._blocks[block_hash] = block_id
        self._evicted.pop(block_hash, None)

    def evict(self, block_hash: BlockHash) -> None:
        del self._blocks[block_hash]
        self._evicted[block_hash] = None
        if len(self._evicted) > self._max_evicted:
            self._evicted.popitem(last=False)

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
