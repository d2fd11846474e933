"""What the kernels read and write: one layer's arenas, and the batch of query rows of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtune.errors import UsageError
from kvtune.kernels.planes import LowPlanes
from kvtune.kernels.reservation import zeroed
from kvtune.spec import PackedLayout

__all__ = ["AssignedRows", "AttentionBatch", "LayerCache"]


@dataclass(frozen=True)
class AssignedRows:
    """Rows of low planes that someone else gives out: `row_of` int32 [N], in 0..num_rows-1 or -1."""

    row_of: torch.Tensor
    num_rows: int


@dataclass
class LayerCache:
    """KV storage of one layer.

    `arena`: uint8 [N, layout.arena_bytes]. With `first_arena` (uint8 [F, first_layout.arena_bytes]) block
    ids N..N+F-1 live there: every sequence's block 0, kept in 16 bit. Both arenas must be contiguous.

    `k_centre` float32 [h, Dk]: what rotated key codecs take from every key before rotating; softmax must not
    see the difference, so reads add its share of the score back. Set before the first write, fixed after.

    `k_low` and `v_low` (nested codecs alone): the low planes. `k_planes`, `v_planes`: how many planes reads
    use, 2 or 1, between any two steps; a block without its low plane is always read from the high one.
    """

    arena: torch.Tensor
    layout: PackedLayout
    first_arena: torch.Tensor | None = None
    first_layout: PackedLayout | None = None
    k_centre: torch.Tensor | None = None
    k_low: LowPlanes | None = None
    v_low: LowPlanes | None = None
    k_planes: int = 2
    v_planes: int = 2
    native_record: tuple[object, Any] | None = field(default=None, init=False, repr=False, compare=False)
    """What the native library made of the addresses in here, beside what it made it from."""

    def __post_init__(self) -> None:
        _check_arena("arena", self.arena, self.layout)
        if (self.first_arena is None) != (self.first_layout is None):
            raise UsageError("first_arena and first_layout come together: found one of them")
        if self.first_arena is not None and self.first_layout is not None:
            _check_arena("first_arena", self.first_arena, self.first_layout)
            if _geometry(self.first_layout) != _geometry(self.layout):
                raise UsageError(
                    f"first_layout must share the block geometry {_geometry(self.layout)} of layout, "
                    f"found {_geometry(self.first_layout)}"
                )
            if self.first_layout.k_low_bytes or self.first_layout.v_low_bytes:
                raise UsageError(
                    "the first arena has no low planes: choose a codec for it that is not nested"
                )
        if self.k_centre is not None:
            _check_centre(self.k_centre, self.layout)
        _check_planes("k_low", self.k_low, self.num_blocks, self.layout.k_low_bytes)
        _check_planes("v_low", self.v_low, self.num_blocks, self.layout.v_low_bytes)

    @classmethod
    def allocate(
        cls,
        layout: PackedLayout,
        num_blocks: int,
        *,
        first_layout: PackedLayout | None = None,
        num_first_blocks: int = 0,
        k_centre: torch.Tensor | None = None,
        rows: Mapping[str, AssignedRows] | None = None,
        reserve: Callable[[int, int], torch.Tensor] | None = None,
    ) -> LayerCache:
        """Zero-filled arenas on the CPU, at least 64-byte aligned, low planes for all blocks.

        `rows`: sides ("k", "v") whose low planes have fewer rows, given out by someone else. `reserve(count,
        row_bytes)`: where the memory of blocks and of these rows comes from; `reservation.zeroed` if None.
        """
        rows, reserve = rows or {}, reserve or zeroed
        arena = reserve(num_blocks, layout.arena_bytes)
        first = None
        if first_layout is not None:
            first = torch.zeros(num_first_blocks, first_layout.arena_bytes, dtype=torch.uint8)
        low: dict[str, LowPlanes] = {}
        for side, size in (("k", layout.k_low_bytes), ("v", layout.v_low_bytes)):
            if side in rows:
                low[side] = LowPlanes.assigned(rows[side].row_of, reserve(rows[side].num_rows, size))
            elif size:
                low[side] = LowPlanes(num_blocks, size)
        return cls(arena, layout, first, first_layout, k_centre, low.get("k"), low.get("v"))

    @property
    def num_blocks(self) -> int:
        """Blocks of the body; ids from here on belong to the first arena."""
        return self.arena.shape[0]

    @property
    def num_first_blocks(self) -> int:
        return 0 if self.first_arena is None else self.first_arena.shape[0]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of both arenas and the low planes."""
        first = 0 if self.first_arena is None else self.first_arena.numel()
        return self.arena.numel() + first + sum(low.nbytes for low in self.low_planes.values())

    @property
    def low_planes(self) -> dict[str, LowPlanes]:
        """The low planes there are, by side: "k", "v"."""
        return {side: low for side, low in (("k", self.k_low), ("v", self.v_low)) if low is not None}

    def read_planes(self, side: str) -> LowPlanes | None:
        """The low planes reads of a side use; None where it has none or reads its high plane alone."""
        low, planes = (self.k_low, self.k_planes) if side == "k" else (self.v_low, self.v_planes)
        return low if planes > 1 else None

    def parts(self) -> list[tuple[torch.Tensor, PackedLayout, int]]:
        """(arena, layout, id of its first block) of the body and, if there is one, of the first arena."""
        parts = [(self.arena, self.layout, 0)]
        if self.first_arena is not None and self.first_layout is not None:
            parts.append((self.first_arena, self.first_layout, self.num_blocks))
        return parts


@dataclass
class AttentionBatch:
    """The query rows of one step, packed.

    `query_start` int32 [S+1]: sequence s owns rows query_start[s]..query_start[s+1]-1; rows beyond
    query_start[S] are padding. `context_len` int32 [S]: keys of the sequence, this step's included; its
    last query row sits at position context_len-1. `block_table` int32 [S, M], -1 where there is no block.
    `slots` int64 [N] = block_id * block_size + offset; -1 marks a padding row, nothing is written.
    """

    query_start: torch.Tensor
    context_len: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor

    @property
    def num_seqs(self) -> int:
        return self.context_len.shape[0]


def _geometry(layout: PackedLayout) -> tuple[int, int, int, int]:
    return layout.block_size, layout.num_kv_heads, layout.k_head_dim, layout.v_head_dim


def _check_arena(name: str, arena: torch.Tensor, layout: PackedLayout) -> None:
    expected = (arena.shape[0] if arena.dim() else 0, layout.arena_bytes)
    if arena.dtype != torch.uint8 or tuple(arena.shape) != expected or not arena.is_contiguous():
        raise UsageError(
            f"{name} must be contiguous uint8 [N, {layout.arena_bytes}], "
            f"found {arena.dtype} {list(arena.shape)}"
        )


def _check_centre(centre: torch.Tensor, layout: PackedLayout) -> None:
    expected = (layout.num_kv_heads, layout.k_head_dim)
    is_plain = centre.dtype == torch.float32 and tuple(centre.shape) == expected and centre.is_contiguous()
    if not is_plain or not bool(centre.isfinite().all()):
        raise UsageError(
            f"k_centre must be contiguous finite float32 {list(expected)}, "
            f"found {centre.dtype} {list(centre.shape)}"
        )


def _check_planes(name: str, low: LowPlanes | None, num_blocks: int, plane_bytes: int) -> None:
    found = (0, 0) if low is None else (low.num_blocks, low.plane_bytes)
    expected = (num_blocks, plane_bytes) if plane_bytes else (0, 0)
    if found != expected:
        raise UsageError(
            f"{name} must hold planes of {expected[1]} bytes for {expected[0]} blocks, "
            f"found {found[1]} bytes for {found[0]}"
        )
