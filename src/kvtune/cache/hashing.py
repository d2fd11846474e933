"""Identity of a block: a SHA-256 chain over the root, and the token ids of each block in turn.

root = SHA-256(fingerprint || salt), block = SHA-256(parent || int32 little-endian token ids). Equal
hash means equal whole prefix under the same recipe and tenant salt. (Chained block hashes: vLLM's
automatic prefix caching; SHA-256 because Python's hash() let one tenant probe another's cache.)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, cast

import numpy as np

from kvtune.errors import UsageError
from kvtune.types import BlockHash, TokenArray

__all__ = ["ChainMemo", "chain_hashes", "root_hash", "token_array"]


def token_array(token_ids: Sequence[int] | TokenArray) -> TokenArray:
    """Token ids as a contiguous little-endian int32 array; UsageError when one does not fit."""
    try:
        return np.ascontiguousarray(token_ids, dtype="<i4")
    except (OverflowError, ValueError, TypeError) as error:
        raise UsageError(f"token ids must be integers below 2^31: {error}") from None


def root_hash(fingerprint: bytes, cache_salt: str) -> BlockHash:
    """Parent of every first block; different salts or recipes never share a block."""
    return BlockHash(hashlib.sha256(fingerprint + cache_salt.encode()).digest())


def chain_hashes(parent: BlockHash, tokens: TokenArray, block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks of `tokens`, the first one a child of `parent`."""
    sha256, before = hashlib.sha256, cast("bytes", parent)
    num_full = len(tokens) // block_size
    blocks = tokens[: num_full * block_size].view(f"V{4 * block_size}").tolist()
    return cast("list[BlockHash]", [before := sha256(before + block).digest() for block in blocks])


class ChainMemo:
    """Chains hashed lately, `SEGMENT` blocks at a time: prompts begin alike, and conversations come back.

    A segment is known by the hash before it and all its token ids: what is told is what hashing would tell.
    It is kept once it was hashed a second time, the last `num_segments` by use.
    """

    SEGMENT: Final = 16

    def __init__(self, block_size: int, num_segments: int = 1024) -> None:
        self._block_size = block_size
        self._most_segments = num_segments
        self._known: OrderedDict[bytes, list[BlockHash]] = OrderedDict()
        self._once: dict[BlockHash, list[BlockHash]] = {}  # segments hashed once, by their last hash
        self._once_before: dict[BlockHash, list[BlockHash]] = {}

    @property
    def num_segments(self) -> int:
        """Kept at this moment."""
        return len(self._known)

    def chain(self, parent: BlockHash, tokens: TokenArray) -> list[BlockHash]:
        """`chain_hashes` of these tokens."""
        span, known = self.SEGMENT * self._block_size, self._known
        hashes: list[BlockHash] = []
        start = 0
        while start + span <= len(tokens):
            key = parent + tokens[start : start + span].tobytes()
            segment = known.get(key)
            if segment is None:
                break
            known.move_to_end(key)
            hashes += segment
            parent = segment[-1]
            start += span
        new = chain_hashes(parent, tokens[start:], self._block_size)
        self._note(parent, tokens[start:], new)
        return hashes + new

    def _note(self, parent: BlockHash, tokens: TokenArray, hashes: list[BlockHash]) -> None:
        """These were hashed: the segments among them that were hashed before, too, are kept."""
        size, span = self.SEGMENT, self.SEGMENT * self._block_size
        for i, end in enumerate(hashes[size - 1 :: size]):
            # The names first made are those in use everywhere else: equal ones would be other objects.
            segment = self._once.get(end) or self._once_before.get(end)
            if segment is None:
                self._once[end] = hashes[i * size : (i + 1) * size]
            else:
                before = hashes[i * size - 1] if i else parent
                self._known[before + tokens[i * span : (i + 1) * span].tobytes()] = segment
        while len(self._known) > self._most_segments:
            self._known.popitem(last=False)
        if len(self._once) > 2 * self._most_segments:
            self._once_before, self._once = self._once, {}
