"""Where the low planes of one pool's blocks are: in a row of the device pool, at rest in a host arena, lost.

::

    taken: row ─drop─▶ resting ─restore─▶ row      the block stays at full precision, or comes back to it
            │             │
            └────lose─────┴─▶ lost                 until the block is free; it is in no index meanwhile

A block is taken with a row and keeps it until it is full, so a plane that rests is complete and nothing is
written to a block without one.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from kvtune.errors import InvariantError
from kvtune.types import BlockHash, BlockId, PlaneCause, PlaneMove, PlaneVerb

__all__ = ["PlaneRows"]

_NO_ROW = -1
_LOST_MEMORY = 4
"""Hashes of lost blocks remembered, in multiples of the pool's rows: tells LOWERED from NEVER_SEEN."""


class PlaneRows:
    """Rows and resting places of one pool; written by its `BlockPool` alone.

    `row_of` int32 [num_blocks]: block id -> row, -1 without. `idle`: idle blocks that have a row, the first
    to go idle in front. `lowered`: blocks that lost their row since they were taken, whether the plane rests
    or is lost. `moves`: what is to be done to bytes, in order, until it is taken.
    """

    def __init__(self, num_blocks: int, num_rows: int, *, group: int, num_resting: int) -> None:
        self.row_of: npt.NDArray[np.int32] = np.full(num_blocks, _NO_ROW, dtype=np.int32)
        self.num_rows = num_rows
        self.num_used = 0
        self.idle: dict[BlockId, None] = {}
        self.resting: dict[BlockId, None] = {}
        self.lowered: set[BlockId] = set()
        self.moves: list[PlaneMove] = []
        self.num_dropped = self.num_restored = self.num_lost = 0
        self._group = group
        self._num_resting = num_resting
        self._free = list(range(num_rows - 1, -1, -1))
        self._lost: OrderedDict[BlockHash, None] = OrderedDict()

    @property
    def can_rest(self) -> bool:
        """Whether the host arena has a place for one more plane."""
        return len(self.resting) < self._num_resting

    def has_row(self, block_id: BlockId) -> bool:
        return bool(self.row_of[block_id] >= 0)

    def take(self, block_id: BlockId) -> None:
        """A row for a block that was free."""
        if not self._free:
            raise InvariantError("no row is free for a low plane; the pool must be asked for room first")
        self.row_of[block_id] = self._free.pop()
        self.lowered.discard(block_id)
        self.num_used += 1

    def give_back(self, block_id: BlockId) -> None:
        """The block is free: its row too, and its resting plane is of no use any more."""
        if self.row_of[block_id] >= 0:
            self._release_row(block_id)
        elif block_id in self.resting:
            del self.resting[block_id]
            self._move(PlaneVerb.DISCARD, block_id)
        self.lowered.discard(block_id)

    def drop(self, block_id: BlockId, cause: PlaneCause) -> None:
        """Let the plane rest in the host arena, which has a place."""
        if not self.can_rest:
            raise InvariantError("the host arena has no place for another low plane")
        row = self._release_row(block_id)
        self.resting[block_id] = None
        self.lowered.add(block_id)
        self.num_dropped += 1
        self._move(PlaneVerb.DROP, block_id, row, cause)

    def restore(self, block_id: BlockId, cause: PlaneCause) -> None:
        """Bring a resting plane back into a row."""
        del self.resting[block_id]
        self.take(block_id)
        self.num_restored += 1
        self._move(PlaneVerb.RESTORE, block_id, int(self.row_of[block_id]), cause)

    def lose(self, block_id: BlockId) -> None:
        """The plane is gone, whether it had a row or rested."""
        self.give_back(block_id)
        self.lowered.add(block_id)  # a free block stays here until it is taken again
        self.num_lost += 1

    def remember_lost(self, block_hash: BlockHash) -> None:
        self._lost[block_hash] = None
        if len(self._lost) > _LOST_MEMORY * self.num_rows:
            self._lost.popitem(last=False)

    def was_lost(self, block_hash: BlockHash) -> bool:
        """Whether a block with this content was cached and left the index with its plane."""
        return block_hash in self._lost

    def forget_lost(self, block_hash: BlockHash) -> None:
        self._lost.pop(block_hash, None)

    def take_moves(self) -> tuple[PlaneMove, ...]:
        moves, self.moves = tuple(self.moves), []
        return moves

    def sort_free(self) -> None:
        """Lowest rows first from now on, so that what is not needed lies together."""
        self._free.sort(reverse=True)

    def free_rows(self) -> list[int]:
        return list(self._free)

    def check(self, taken: set[BlockId]) -> None:
        """Assert that rows, resting places and taken blocks agree."""
        rows = self.row_of[self.row_of >= 0]
        holders = {BlockId(int(b)) for b in np.flatnonzero(self.row_of >= 0)}
        ids = sorted([*rows.tolist(), *self._free])
        if ids != list(range(self.num_rows)) or len(holders) != self.num_used:
            raise InvariantError(f"{len(ids)} rows are used or free, there are {self.num_rows}")
        if self.lowered & taken != taken - holders:
            raise InvariantError("blocks without a row are not those that were lowered")
        if not holders | set(self.resting) <= taken or holders & set(self.resting):
            raise InvariantError("a low plane belongs to a free block, or lies in two places")
        if len(self.resting) > self._num_resting or not set(self.idle) <= holders:
            raise InvariantError("the host arena is overfull, or an idle block's row is not counted")

    def _release_row(self, block_id: BlockId) -> int:
        row = int(self.row_of[block_id])
        if row < 0:
            raise InvariantError(f"block {block_id} has no low plane in the pool")
        self.row_of[block_id] = _NO_ROW
        self.idle.pop(block_id, None)
        self._free.append(row)
        self.num_used -= 1
        return row

    def _move(
        self, verb: PlaneVerb, block_id: BlockId, row: int = _NO_ROW, cause: PlaneCause | None = None
    ) -> None:
        self.moves.append(PlaneMove(verb=verb, group=self._group, block=block_id, row=row, cause=cause))
