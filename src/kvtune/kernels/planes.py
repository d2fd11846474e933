"""Low planes of a nested codec: rows that blocks may lose and get back, without encoding anything again.

The high plane and the scales of a block stay in the layer's arena and are readable alone. Its low plane is
one row here, as long as it has one: dropping gives the row to another block or, after `resize`, to the
machine; restoring puts the same bytes back, so reads are what they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtune.errors import UsageError
from kvtune.kernels.reservation import zeroed

__all__ = ["LowPlanes"]

BlockIds = Sequence[int] | torch.Tensor


class LowPlanes:
    """Low planes of one side (K or V) of one layer.

    `arena` uint8 [R, plane_bytes]; `row_of` int32 [N]: block id -> its row, -1 where the plane was dropped.
    A token written to a block without a row keeps its high plane alone. Verbs check everything first:
    UsageError leaves all as it was. Not thread-safe.

    Rows are given out here, or, with `assigned`, by whoever owns `row_of` (a block pool, for all layers at
    once): then only the bytes of rows move here, and verbs that would give out rows refuse.
    """

    def __init__(self, num_blocks: int, plane_bytes: int) -> None:
        """A row for every block, in order, zero-filled."""
        self.arena = zeroed(num_blocks, plane_bytes)
        self.row_of = torch.arange(num_blocks, dtype=torch.int32)
        self._free: list[int] = []
        self.is_assigned = False

    @classmethod
    def assigned(cls, row_of: torch.Tensor, arena: torch.Tensor) -> LowPlanes:
        """Planes whose rows someone else gives out: `row_of` int32 [N] is read, never written."""
        low = cls(0, arena.shape[1])
        low.arena, low.row_of, low.is_assigned = arena, row_of, True
        return low

    @property
    def num_blocks(self) -> int:
        return self.row_of.shape[0]

    @property
    def plane_bytes(self) -> int:
        return self.arena.shape[1]

    @property
    def num_rows(self) -> int:
        return self.arena.shape[0]

    @property
    def num_free(self) -> int:
        """Rows no block has."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of the arena."""
        return self.arena.numel()

    def is_resident(self, block_ids: BlockIds) -> torch.Tensor:
        """Bool [m]: which blocks have their low plane."""
        return self.row_of[self._ids(block_ids)] >= 0

    def read_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Copies of rows [m], uint8 [m, plane_bytes]."""
        return self.arena[rows]

    def write_rows(self, rows: torch.Tensor, planes: torch.Tensor) -> None:
        """Fill rows [m] with planes, uint8 [m, plane_bytes]."""
        self.arena[rows] = planes

    def read(self, block_ids: BlockIds) -> torch.Tensor:
        """Copies of the planes, uint8 [m, plane_bytes]. UsageError if one was dropped."""
        return self.arena[self._rows(block_ids)]

    def drop(self, block_ids: BlockIds) -> torch.Tensor:
        """Give up the blocks' rows; returns the planes for `restore`. Reads of them are 4-bit from now on."""
        ids = self._ids(block_ids)
        planes = self.arena[self._rows(ids)]
        self.discard(ids)
        return planes

    def discard(self, block_ids: BlockIds) -> None:
        """Give up rows without keeping their bytes. Blocks that have none are passed over."""
        self._refuse_assigned()
        ids = self._ids(block_ids)
        rows = self.row_of[ids]
        self._free.extend(rows[rows >= 0].tolist())
        self.row_of[ids] = -1

    def attach(self, block_ids: BlockIds) -> None:
        """Give a row to each block that has none, for tokens about to be written from its start.

        The row holds anything. UsageError if there are not enough free rows.
        """
        self._refuse_assigned()
        ids = self._ids(block_ids)
        missing = ids[self.row_of[ids] < 0]
        if len(missing) > len(self._free):
            raise UsageError(
                f"{len(missing)} blocks need a low plane, {len(self._free)} rows are free; drop others first"
            )
        rows = [self._free.pop() for _ in range(len(missing))]
        self.row_of[missing] = torch.tensor(rows, dtype=torch.int32)

    def restore(self, block_ids: BlockIds, planes: torch.Tensor) -> None:
        """Put dropped planes back, uint8 [m, plane_bytes] in the order of `block_ids`.

        For blocks nothing was written to meanwhile. UsageError without enough free rows.
        """
        ids = self._ids(block_ids)
        expected = (len(ids), self.plane_bytes)
        if tuple(planes.shape) != expected or planes.dtype != torch.uint8:
            raise UsageError(
                f"planes must be uint8 {list(expected)}, found {planes.dtype} {list(planes.shape)}"
            )
        self.attach(ids)
        self.arena[self._rows(ids)] = planes

    def resize(self, num_rows: int) -> None:
        """Grow or shrink the arena to `num_rows` rows; rows move, blocks keep their planes.

        Two arenas exist while rows are copied. UsageError if more rows are in use.
        """
        self._refuse_assigned()
        used = self.num_rows - self.num_free
        if num_rows < used:
            raise UsageError(f"{used} low planes are in use, {num_rows} rows cannot hold them; drop some")
        holders = (self.row_of >= 0).nonzero().squeeze(1)
        arena = zeroed(num_rows, self.plane_bytes)
        arena[: len(holders)] = self.arena[self.row_of[holders].long()]
        self.arena = arena
        self.row_of[holders] = torch.arange(len(holders), dtype=torch.int32)
        self._free = list(range(num_rows - 1, len(holders) - 1, -1))

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """dst[i] becomes what src[i] is: with its plane, or without where src lost it or no row is free."""
        self._refuse_assigned()
        has_plane = self.row_of[src] >= 0
        self.discard(dst[~has_plane])
        for source, target in zip(src[has_plane].tolist(), dst[has_plane].tolist(), strict=True):
            if self.row_of[target] < 0 and self._free:
                self.row_of[target] = self._free.pop()
            if self.row_of[target] >= 0:
                self.arena[int(self.row_of[target])] = self.arena[int(self.row_of[source])]

    def _refuse_assigned(self) -> None:
        if self.is_assigned:
            raise UsageError("the block pool gives out these rows; drop and restore planes through it")

    def _ids(self, block_ids: BlockIds) -> torch.Tensor:
        ids = torch.as_tensor(block_ids, dtype=torch.long)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_blocks:
            raise UsageError(
                f"block ids must lie in 0..{self.num_blocks - 1}, found {int(ids.min())}..{int(ids.max())}"
            )
        if len(ids.unique()) != len(ids):
            raise UsageError("a block id is named twice; name each block once")
        return ids

    def _rows(self, block_ids: BlockIds) -> torch.Tensor:
        ids = self._ids(block_ids)
        rows = self.row_of[ids].long()
        if len(rows) and int(rows.min()) < 0:
            raise UsageError(f"block {int(ids[rows < 0][0])} has no low plane: it was dropped")
        return rows
