"""How many tokens native attention does not read again because sequences of a step begin alike.

The rule of `kernels/csrc/plan.h`, told without tensors for whoever predicts a step's time; a test holds the
two together. A prefix is read once for several sequences where that saves enough; of a tree of prefixes those
are chosen that save most.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from kvtune.types import BlockTable

__all__ = ["least_saving", "saved_tokens"]

_TILE = 64
_LEAST_SHARED = 4 * _TILE
_LEAST_SAVED = 2048


def least_saving(num_heads: int) -> int:
    """Tokens below which nothing is shared; `num_heads`: query heads per KV head."""
    return _LEAST_SAVED * num_heads


def saved_tokens(
    tables: Sequence[BlockTable], num_common: Sequence[int], *, block_size: int, num_heads: int
) -> int:
    """Tokens not read again, of sequences with these block tables.

    `num_common`: how many blocks of each are full of keys that all of its rows see; `num_heads`: query heads
    per KV head.
    """
    at = -(-_LEAST_SHARED // block_size) - 1
    alike: dict[int, list[bytes]] = defaultdict(list)
    for table, count in zip(tables, num_common, strict=True):
        if count > at:  # equal blocks stand behind equal beginnings
            alike[int(table[at])].append(table[:count].astype(">i4").tobytes())
    least = least_saving(num_heads)
    total = 0
    for members in alike.values():
        if len(members) > 1:
            members.sort()  # big-endian and never negative: bytes sort as block ids do
            same = [0, *(_num_same(a, b) for a, b in itertools.pairwise(members))]
            total += _most_saved(same, 0, len(same), block_size, least)
    return total


def _num_same(one: bytes, other: bytes) -> int:
    """Blocks that two tables begin with alike."""
    size = min(len(one), len(other))
    x, y = (np.frombuffer(table[:size], dtype=">i4") for table in (one, other))
    differs = np.flatnonzero(x != y)
    return int(differs[0]) if len(differs) else size // 4


def _most_saved(same: list[int], begin: int, end: int, block_size: int, least: int) -> int:
    """What sequences [begin, end) of the order save: all of them one prefix, or parts of them longer ones."""
    if end - begin < 2:
        return 0
    shortest = min(same[begin + 1 : end])
    tokens = shortest * block_size // _TILE * _TILE
    saved = (end - begin - 1) * tokens
    here = saved if tokens >= _LEAST_SHARED and saved >= least else 0
    parts = 0
    first = begin
    while first < end:
        stop = first + 1
        while stop < end and same[stop] > shortest:
            stop += 1
        parts += _most_saved(same, first, stop, block_size, least)
        first = stop
    return max(here, parts)
