"""How many tokens native attention does not read again because sequences of a step begin alike.

The rule of `kernels/csrc/plan.h`, told without tensors for whoever predicts a step's time; a test holds the
two together. A prefix is read once for several sequences where that pays; of a tree of prefixes those are
chosen that save most. Told as on CPUs that multiply bytes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.spec import codec_storage
from kvtune.types import BlockTable

__all__ = ["LEAST_SHARED", "SharedReads"]

_TILE = 64
LEAST_SHARED = 4 * _TILE
"""Tokens of the shortest prefix that is read once."""
_FULL_ROWS = 4
_CACHED_BYTES = 48 << 20


@dataclass(frozen=True, slots=True)
class SharedReads:
    """The rule for layers with these codecs. `block_bytes`: of one layer; `num_heads`: query heads per KV
    head."""

    k_codec: str
    v_codec: str
    block_size: int
    block_bytes: float
    num_heads: int

    def pays(self, num_seqs: int, num_tokens: int) -> bool:
        """Whether so many sequences that decode gain by reading so many common tokens together."""
        if num_tokens < LEAST_SHARED:
            return False
        if not (_is_integer(self.k_codec) and _is_integer(self.v_codec)):
            return True
        if (num_seqs - 1) * num_tokens < 2 * LEAST_SHARED:
            return False
        is_cached = num_tokens // self.block_size * self.block_bytes < _CACHED_BYTES
        return self.num_heads < _FULL_ROWS or not is_cached

    def saved_tokens(self, tables: Sequence[BlockTable], num_common: Sequence[int]) -> int:
        """Tokens not read again, of sequences with these block tables. `num_common`: how many blocks of each
        are full of keys that all of its rows see."""
        at = -(-LEAST_SHARED // self.block_size) - 1
        alike: dict[int, list[BlockTable]] = defaultdict(list)
        for table, count in zip(tables, num_common, strict=True):
            if count > at:  # equal blocks stand behind equal beginnings
                alike[int(table[at])].append(table[:count])
        return sum(self._saved_by(members) for members in alike.values() if len(members) > 1)

    def _saved_by(self, members: Sequence[BlockTable]) -> int:
        # big-endian and never negative: bytes sort as block ids do
        ordered = sorted(table.astype(">i4").tobytes() for table in members)
        same = [0, *(_num_same(one, other) for one, other in itertools.pairwise(ordered))]
        return self._most_saved(same, 0, len(same))

    def _most_saved(self, same: list[int], begin: int, end: int) -> int:
        """What sequences [begin, end) of the order save: all of them one prefix, or parts longer ones."""
        if end - begin < 2:
            return 0
        shortest = min(same[begin + 1 : end])
        tokens = shortest * self.block_size // _TILE * _TILE
        here = (end - begin - 1) * tokens if self.pays(end - begin, tokens) else 0
        parts = 0
        first = begin
        while first < end:
            stop = first + 1
            while stop < end and same[stop] > shortest:
                stop += 1
            parts += self._most_saved(same, first, stop)
            first = stop
        return max(here, parts)


def _is_integer(codec: str) -> bool:
    return codec_storage(codec).code_bits <= 8 and codec != "fp8"


def _num_same(one: bytes, other: bytes) -> int:
    """Blocks that two tables begin with alike."""
    size = min(len(one), len(other))
    x, y = (_block_ids(table[:size]) for table in (one, other))
    differs = np.flatnonzero(x != y)
    return int(differs[0]) if len(differs) else size // 4


def _block_ids(table: bytes) -> npt.NDArray[np.int32]:
    return np.frombuffer(table, dtype=">i4")
