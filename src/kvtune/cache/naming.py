"""Names of a manager's blocks: hashed in native code where that was built and the names are hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtune.cache.block_hashes import HASH_BYTES, joined
from kvtune.cache.hashing import ChainMemo, chain_hashes, root_hash, token_array
from kvtune.cache.native import CacheLibrary
from kvtune.errors import InvariantError
from kvtune.types import BlockHash, TokenArray

__all__ = ["BlockNames", "Tokens"]

Tokens = Sequence[int] | TokenArray


class BlockNames:
    """Chains of block hashes; see `hashing`. Native code takes hashes of 32 bytes; other names come from
    traces."""

    def __init__(self, library: CacheLibrary | None, *, block_size: int, fingerprint: bytes) -> None:
        self._library = library
        self._block_size = block_size
        self._fingerprint = fingerprint
        self._memo = ChainMemo(block_size)

    def root(self, cache_salt: str) -> BlockHash:
        return root_hash(self._fingerprint, cache_salt)

    def chain(self, parent: BlockHash, token_ids: Tokens) -> Sequence[BlockHash]:
        """Of the full blocks of these tokens, the first one behind `parent`."""
        tokens = token_array(token_ids)
        if self._library is not None and len(parent) == HASH_BYTES:
            return self._library.hash_chain(parent, tokens, self._block_size)
        return tuple(self._memo.chain(parent, tokens))

    def continued(
        self, root: BlockHash, token_ids: Tokens, known: Sequence[BlockHash]
    ) -> Sequence[BlockHash]:
        """`known` hashes and those of the full blocks behind them."""
        num_full = len(token_ids) // self._block_size
        if len(known) > num_full:
            raise InvariantError(f"{len(known)} block hashes do not belong to {len(token_ids)} tokens")
        if not known:
            return self.chain(root, token_ids)
        if len(known) == num_full:
            return known
        return joined(known, self.chain(known[-1], token_ids[len(known) * self._block_size :]))

    def children(self, parents: Sequence[BlockHash], blocks: TokenArray) -> list[BlockHash]:
        """The name of a block behind each parent: `blocks` int32 [len(parents), block_size]."""
        joined_parents = b"".join(parents)
        if self._library is not None and len(joined_parents) == HASH_BYTES * len(parents):
            return self._library.hash_block_each(joined_parents, blocks)
        blocks = np.ascontiguousarray(blocks, dtype="<i4")
        return [
            chain_hashes(parent, block, len(block))[0] for parent, block in zip(parents, blocks, strict=True)
        ]
