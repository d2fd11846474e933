"""Least recently used: a queue of uses, in which a block's last use counts.

Leaf-first without a tree: a request unpins its blocks deepest first, and whoever uses a block also uses its
ancestors, so a parent's last use is never older than its child's (vLLM's free queue orders blocks the same
way).
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.types import BlockId

__all__ = ["LRU", "MANY", "BlockIds"]

BlockIds = npt.NDArray[np.int32]

_ABSENT: Final = 0
_PINNED: Final = 1
_CANDIDATE: Final = 2
MANY: Final = 64
"""From so many blocks on arrays are faster than a loop."""
_SLACK: Final = 1024  # outdated uses that are not worth throwing out


class LRU:
    """O(1), amortised. Memory: 9 bytes for each id up to the largest, 4 to 16 a candidate."""

    def __init__(self, capacity: int = 0) -> None:
        # Of fixed lengths, replaced when they are too short: arrays for single blocks, numpy views for many.
        self._state = bytearray()  # by id
        self._last_use = array("q")  # by id: the number of its last use
        self._queue = array("i")  # ids in the order of their uses
        self._first = 0  # number of the use at the queue's start
        self._head = self._tail = (
            0  # of the queue: entries before the head are outdated, from the tail on unused
        )
        self._num_candidates = 0
        self._renew_views()

    def _renew_views(self) -> None:
        self._states: npt.NDArray[np.uint8] = np.frombuffer(self._state, dtype=np.uint8)
        self._last_uses: npt.NDArray[np.int64] = np.frombuffer(self._last_use, dtype=np.int64)
        self._uses: BlockIds = np.frombuffer(self._queue, dtype=np.int32)

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        pass

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        self._make_ids(block_id + 1)
        self._turn(block_id, _ABSENT, _PINNED)

    def pin(self, block_id: BlockId) -> None:
        self._turn(block_id, _CANDIDATE, _PINNED)
        self._num_candidates -= 1

    def unpin(self, block_id: BlockId) -> None:
        self._turn(block_id, _PINNED, _CANDIDATE)
        self._make_uses(1)
        self._queue[self._tail] = block_id
        self._last_use[block_id] = self._first + self._tail
        self._tail += 1
        self._num_candidates += 1

    def victim(self) -> BlockId | None:
        if not self._num_candidates:
            return None
        while True:
            block_id = self._queue[self._head]
            if self._state[block_id] == _CANDIDATE and self._last_use[block_id] == self._first + self._head:
                return BlockId(block_id)
            self._head += 1

    def remove(self, block_id: BlockId) -> None:
        self._turn(block_id, _CANDIDATE, _ABSENT)
        self._num_candidates -= 1

    def __len__(self) -> int:
        return self._num_candidates

    @property
    def num_uses(self) -> int:
        """Uses it keeps, outdated ones too."""
        return len(self._queue)

    def _turn(self, block_id: BlockId, before: int, after: int) -> None:
        if not 0 <= block_id < len(self._state) or self._state[block_id] != before:
            raise KeyError(block_id)
        self._state[block_id] = after

    # --- many at once

    def insert_all(self, block_ids: BlockIds | Sequence[int]) -> None:
        if len(block_ids):
            self._make_ids(int(max(block_ids) if len(block_ids) < MANY else np.max(block_ids)) + 1)
        self._turn_all(block_ids, _ABSENT, _PINNED)

    def pin_all(self, block_ids: BlockIds | Sequence[int]) -> None:
        self._turn_all(block_ids, _CANDIDATE, _PINNED)
        self._num_candidates -= len(block_ids)

    def unpin_all(self, block_ids: BlockIds | Sequence[int]) -> None:
        """In this order."""
        num = len(block_ids)
        self._turn_all(block_ids, _PINNED, _CANDIDATE)
        self._make_uses(num)
        tail, first = self._tail, self._first
        if num < MANY:
            queue, last_use = self._queue, self._last_use
            for at, block_id in enumerate(block_ids, tail):
                queue[at] = block_id
                last_use[block_id] = first + at
        else:
            self._uses[tail : tail + num] = block_ids
            self._last_uses[block_ids] = np.arange(first + tail, first + tail + num)
        self._tail += num
        self._num_candidates += num

    def take_oldest(self, num: int) -> BlockIds:
        """The first `num` candidates, or all there are; they are not resident any more."""
        left = num = min(num, self._num_candidates)
        taken: list[BlockIds] = []
        while left:
            end = min(self._tail, self._head + max(left, 64))
            found = np.flatnonzero(self._is_last_use(self._head, end))[:left]
            taken.append(self._uses[self._head : end][found])
            left -= len(found)
            self._head = end if left else self._head + int(found[-1]) + 1
        block_ids = np.concatenate(taken) if taken else np.empty(0, dtype=np.int32)
        self._states[block_ids] = _ABSENT
        self._num_candidates -= num
        return block_ids

    def _turn_all(self, block_ids: BlockIds | Sequence[int], before: int, after: int) -> None:
        if len(block_ids) < MANY:
            state = self._state
            for block_id in block_ids:
                if state[block_id] != before:
                    raise KeyError(block_id)
                state[block_id] = after
            return
        if (self._states[block_ids] != before).any():
            raise KeyError(list(block_ids))
        self._states[block_ids] = after

    def _is_last_use(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """Of the queue's entries start..end-1, those that say when a candidate was used last."""
        block_ids = self._uses[start:end]
        numbers = np.arange(self._first + start, self._first + end)
        return (self._states[block_ids] == _CANDIDATE) & (self._last_uses[block_ids] == numbers)

    # --- memory

    def _make_ids(self, num_ids: int) -> None:
        more = max(num_ids, 2 * len(self._state)) - len(self._state)
        if num_ids > len(self._state):
            self._state = self._state + bytes(more)
            self._last_use = self._last_use + array("q", bytes(8 * more))
            self._renew_views()

    def _make_uses(self, num: int) -> None:
        """Room for more uses: outdated ones are thrown out. There are hardly more of them than others."""
        if self._tail + num <= len(self._queue):
            return
        kept = self._uses[self._head : self._tail][self._is_last_use(self._head, self._tail)]
        self._first += self._tail
        self._queue = array("i", kept.tobytes())
        self._queue.frombytes(bytes(4 * (len(kept) + num + _SLACK)))
        self._head, self._tail = 0, len(kept)
        self._renew_views()
        self._last_uses[kept] = np.arange(self._first, self._first + len(kept))
