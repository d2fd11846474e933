"""The KV memory of one engine: an arena per layer for the blocks the budget buys."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager

import torch

from kvtune.cache import Precision, cache_manager
from kvtune.config import CacheConfig, format_bytes
from kvtune.errors import UsageError
from kvtune.kernels import AssignedRows, LayerCache, Reservation
from kvtune.spec import FIRST_BLOCK_CODEC, ArenaPlan, KVGroup, PackedLayout, plan_arenas

__all__ = [
    "FIRST_BLOCK_CODEC",
    "ArenaPlan",
    "ElasticMemory",
    "allocate_arenas",
    "cache_manager",
    "memory_for",
    "packed_layout",
    "plan_arenas",
]


class ElasticMemory:
    """Reservations of the groups whose low planes trade for blocks: what is free goes back to the machine."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[Reservation]] = {}
        self._rows: dict[int, list[Reservation]] = {}

    def reserve_for(self, group: int, num_rows: int) -> Callable[[int, int], torch.Tensor]:
        """An allocator for a layer of the group: blocks come first, then its low planes of `num_rows`."""
        blocks, rows = self._blocks.setdefault(group, []), self._rows.setdefault(group, [])
        is_first = True

        def reserve(count: int, row_bytes: int) -> torch.Tensor:
            nonlocal is_first
            reservation = Reservation(count, row_bytes)
            (blocks if is_first else rows).append(reservation)
            is_first = False
            return reservation.tensor

        return reserve

    def give_back(self, group: int, block_ids: Sequence[int], rows: Sequence[int]) -> int:
        """Bytes of the pages returned to the machine, of free blocks and free plane rows of a group."""
        returned = sum(r.give_back(block_ids) for r in self._blocks.get(group, ()))
        return returned + sum(r.give_back(rows) for r in self._rows.get(group, ()))


def allocate_arenas(
    plan: ArenaPlan,
    cache: CacheConfig,
    centres: Mapping[int, torch.Tensor] | None = None,
    *,
    precision: Precision | None = None,
    memory: ElasticMemory | None = None,
) -> dict[int, LayerCache]:
    """One LayerCache per layer; memory is touched when blocks are first written. `centres`: of rotated keys.

    `precision` gives out the rows of low planes that may be dropped; their memory and that of their blocks
    comes from `memory`. UsageError where the machine does not give that much memory.
    """
    with memory_for(plan):
        return _allocate(plan, cache, centres or {}, precision, memory or ElasticMemory())


@contextmanager
def memory_for(plan: ArenaPlan) -> Generator[None]:
    """UsageError for blocks, or their bookkeeping, that this machine has no memory for."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:  # torch says RuntimeError
        raise UsageError(
            f"KV budget {format_bytes(plan.total_bytes)} cannot be allocated on this machine; "
            "ask for less (`kvtune doctor` shows its memory)"
        ) from error


def _allocate(
    plan: ArenaPlan,
    cache: CacheConfig,
    centres: Mapping[int, torch.Tensor],
    precision: Precision | None,
    memory: ElasticMemory,
) -> dict[int, LayerCache]:
    caches: dict[int, LayerCache] = {}
    for group, count, first_count in zip(plan.groups, plan.num_ids, plan.num_first_blocks, strict=True):
        row_of = None if precision is None else precision.rows_of(group.index)
        num_rows = plan.num_blocks[group.index]
        for layer in group.layers:
            k_codec, v_codec = cache.codecs_of(layer)
            first = packed_layout(group, FIRST_BLOCK_CODEC, FIRST_BLOCK_CODEC, plan.block_size)
            rows: dict[str, AssignedRows] = {}
            if row_of is not None:
                sides = cache.droppable_sides(layer)
                rows = {side: AssignedRows(torch.from_numpy(row_of), num_rows) for side in sides}
            caches[layer] = LayerCache.allocate(
                packed_layout(group, k_codec, v_codec, plan.block_size),
                count,
                first_layout=first if first_count else None,
                num_first_blocks=first_count,
                k_centre=centres.get(layer),
                rows=rows,
                reserve=None if row_of is None else memory.reserve_for(group.index, num_rows),
            )
    return caches


def packed_layout(group: KVGroup, k_codec: str, v_codec: str, block_size: int) -> PackedLayout:
    """The layout of one layer of a group."""
    return PackedLayout(
        block_size=block_size, num_kv_heads=group.num_kv_heads, k_head_dim=group.k_head_dim,
        v_head_dim=group.v_head_dim, k_codec=k_codec, v_codec=v_codec,
    )  # fmt: skip
