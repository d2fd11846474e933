"""What the kernels read and write: one layer's arenas, and the batch of query rows of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtune.errors import UsageError
from kvtune.spec import PackedLayout

__all__ = ["AttentionBatch", "LayerCache"]


@dataclass
class LayerCache:
    """KV storage of one layer.

    `arena`: uint8 [N, layout.block_bytes]. With `first_arena` (uint8 [F, first_layout.block_bytes]) block
    ids N..N+F-1 live there: every sequence's block 0, kept in 16 bit. Both arenas must be contiguous.
    """

    arena: torch.Tensor
    layout: PackedLayout
    first_arena: torch.Tensor | None = None
    first_layout: PackedLayout | None = None

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

    @classmethod
    def allocate(
        cls,
        layout: PackedLayout,
        num_blocks: int,
        *,
        first_layout: PackedLayout | None = None,
        num_first_blocks: int = 0,
    ) -> LayerCache:
        """Zero-filled arenas on the CPU (64-byte aligned by torch's allocator)."""
        arena = torch.zeros(num_blocks, layout.block_bytes, dtype=torch.uint8)
        if first_layout is None:
            return cls(arena, layout)
        first = torch.zeros(num_first_blocks, first_layout.block_bytes, dtype=torch.uint8)
        return cls(arena, layout, first, first_layout)

    @property
    def num_blocks(self) -> int:
        """Blocks of the body; ids from here on belong to the first arena."""
        return self.arena.shape[0]

    @property
    def num_first_blocks(self) -> int:
        return 0 if self.first_arena is None else self.first_arena.shape[0]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of both arenas."""
        first = 0 if self.first_arena is None else self.first_arena.numel()
        return self.arena.numel() + first

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
    expected = (arena.shape[0] if arena.dim() else 0, layout.block_bytes)
    if arena.dtype != torch.uint8 or tuple(arena.shape) != expected or not arena.is_contiguous():
        raise UsageError(
            f"{name} must be contiguous uint8 [N, {layout.block_bytes}], "
            f"found {arena.dtype} {list(arena.shape)}"
        )
