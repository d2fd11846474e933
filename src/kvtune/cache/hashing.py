"""Identity of a block: a SHA-256 chain over the root, and the token ids of each block in turn.

root = SHA-256(fingerprint || salt), block = SHA-256(parent || int32 little-endian token ids). Equal
hash means equal whole prefix under the same recipe and tenant salt. (Chained block hashes: vLLM's
automatic prefix caching; SHA-256 because Python's hash() let one tenant probe another's cache.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import cast

import numpy as np

from kvtune.errors import UsageError
from kvtune.types import BlockHash, TokenArray

__all__ = ["chain_hashes", "root_hash", "token_array"]


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
    sha256 = hashlib.sha256
    data = tokens.tobytes()
    width = 4 * block_size
    hashes: list[bytes] = []
    before: bytes = parent
    for start in range(0, len(data) - width + 1, width):
        before = sha256(before + data[start : start + width]).digest()
        hashes.append(before)
    return cast("list[BlockHash]", hashes)
