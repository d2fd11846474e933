"""Many requests at once that decode: a block taken for each of them, a full block published for each of them.

What `KVCacheManager.allocate` and `commit` do one by one, in the same order and with the same outcome, for
requests to which nothing else happens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvtune.cache.block_hashes import BlockHashes
from kvtune.cache.group import GroupCache
from kvtune.cache.hashing import chain_hashes
from kvtune.cache.holding import Holding, is_enough, shortfalls
from kvtune.cache.native import CacheLibrary
from kvtune.cache.table import Table
from kvtune.types import BlockHash, RequestId, TokenArray

__all__ = ["DecodingBlocks"]


class DecodingBlocks:
    """Verbs over the holdings of one manager."""

    def __init__(
        self,
        groups: Sequence[GroupCache],
        holdings: Mapping[RequestId, Holding],
        library: CacheLibrary | None,
    ) -> None:
        self._groups = groups
        self._holdings = holdings
        self._library = library

    def take(self, request_ids: Sequence[RequestId], reserve: float) -> list[Table[int]] | None:
        """One more block in every group for each of these requests; per group, the new blocks. None, and
        nothing changed, without room for all of them."""
        num = len(request_ids)
        if not is_enough(shortfalls(self._groups, [(num, 0)] * len(self._groups), reserve)):
            return None
        holdings = [self._holdings[r] for r in request_ids]
        taken: list[Table[int]] = []
        for g, group in enumerate(self._groups):
            new = group.pool.take(num)
            for holding, block_id in zip(holdings, new, strict=True):
                holding.tables[g].append(block_id)
                if holding.promised[g]:
                    holding.promised[g] -= 1
                    group.promised -= 1
            taken.append(new)
        for holding in holdings:
            holding.snapshot = None
        return taken

    def publish(self, request_ids: Sequence[RequestId], blocks: TokenArray) -> list[int] | None:
        """Each of these requests has computed its next full block, the last one in its tables: `blocks[i]`
        int32 [block_size] are the tokens of request i's. Returns those whose tables changed, since another
        block has that content already; None, and nothing done, where some request is not of this kind.
        """
        holdings = [self._holdings[r] for r in request_ids]
        parents = [h.parent or _parent(h) for h in holdings]
        if None in parents:
            return None
        new = self._hash(holdings, [p for p in parents if p is not None], blocks)
        ats = [h.num_published for h in holdings]
        changed: set[int] = set()
        for g, group in enumerate(self._groups):
            changed.update(group.pool.publish_each([h.tables[g] for h in holdings], ats, new))
        size = blocks.shape[1]
        for holding, at, block_hash in zip(holdings, ats, new, strict=True):
            holding.hashes.append(block_hash)
            holding.parent = block_hash
            holding.num_published = at + 1
            holding.num_computed = at * size + size
            holding.commit_at = at * size + size + 1  # there are no more slots
        for i in changed:
            holdings[i].snapshot = None
        return sorted(changed)

    def _hash(
        self, holdings: Sequence[Holding], parents: Sequence[BlockHash], blocks: TokenArray
    ) -> list[BlockHash]:
        """The name of a block behind each of these chains."""
        if self._library is not None and all(isinstance(h.hashes, BlockHashes) for h in holdings):
            return self._library.hash_block_each(b"".join(parents), blocks)
        blocks = np.ascontiguousarray(blocks, dtype="<i4")
        return [
            chain_hashes(parent, block, len(block))[0] for parent, block in zip(parents, blocks, strict=True)
        ]


def _parent(holding: Holding) -> BlockHash | None:
    """Of the next block; None where more than its content is to be seen to."""
    hashes, num_published = holding.hashes, holding.num_published
    if holding.is_private or holding.may_share_last or len(hashes) != num_published:
        return None
    if len(holding.tables[0]) != num_published + 1:
        return None
    return hashes[-1] if num_published else holding.root
