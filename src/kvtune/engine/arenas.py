"""The KV memory of one engine: an arena per layer for the blocks the budget buys."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvtune.cache import cache_manager
from kvtune.config import CacheConfig, format_bytes
from kvtune.errors import UsageError
from kvtune.kernels import LayerCache
from kvtune.spec import FIRST_BLOCK_CODEC, ArenaPlan, KVGroup, PackedLayout, plan_arenas

__all__ = [
    "FIRST_BLOCK_CODEC",
    "ArenaPlan",
    "allocate_arenas",
    "cache_manager",
    "packed_layout",
    "plan_arenas",
]


def allocate_arenas(
    plan: ArenaPlan, cache: CacheConfig, centres: Mapping[int, torch.Tensor] | None = None
) -> dict[int, LayerCache]:
    """One LayerCache per layer; memory is touched when blocks are first written. `centres`: of rotated keys.

    UsageError where the machine does not give that much memory.
    """
    try:
        return _allocate(plan, cache, centres or {})
    except (RuntimeError, MemoryError) as error:  # torch says RuntimeError
        raise UsageError(
            f"KV budget {format_bytes(plan.total_bytes)} cannot be allocated on this machine; "
            "ask for less (`kvtune doctor` shows its memory)"
        ) from error


def _allocate(
    plan: ArenaPlan, cache: CacheConfig, centres: Mapping[int, torch.Tensor]
) -> dict[int, LayerCache]:
    caches: dict[int, LayerCache] = {}
    for group, count, first_count in zip(plan.groups, plan.num_blocks, plan.num_first_blocks, strict=True):
        for layer in group.layers:
            k_codec, v_codec = cache.codecs_of(layer)
            first = packed_layout(group, FIRST_BLOCK_CODEC, FIRST_BLOCK_CODEC, plan.block_size)
            caches[layer] = LayerCache.allocate(
                packed_layout(group, k_codec, v_codec, plan.block_size),
                count,
                first_layout=first if first_count else None,
                num_first_blocks=first_count,
                k_centre=centres.get(layer),
            )
    return caches


def packed_layout(group: KVGroup, k_codec: str, v_codec: str, block_size: int) -> PackedLayout:
    """The layout of one layer of a group."""
    return PackedLayout(
        block_size=block_size, num_kv_heads=group.num_kv_heads, k_head_dim=group.k_head_dim,
        v_head_dim=group.v_head_dim, k_codec=k_codec, v_codec=v_codec,
    )  # fmt: skip
