"""The KV memory of one engine: how many blocks the budget buys, an arena per layer, and their manager."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.cache import KVCacheManager
from kvtune.config import CacheConfig, format_bytes
from kvtune.errors import UsageError
from kvtune.kernels import LayerCache
from kvtune.spec import (
    KVGroup,
    ModelSpec,
    PackedLayout,
    codec_storage,
    first_block_bytes,
    group_block_bytes,
    split_budget,
)

__all__ = ["FIRST_BLOCK_CODEC", "ArenaPlan", "allocate_arenas", "cache_manager", "plan_arenas"]

FIRST_BLOCK_CODEC = "bf16"
"""How block 0 of each sequence is stored with `first_block_16bit`."""

_FIRST_SHARE = 4
"""The 16-bit first blocks take at most 1 / this of the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaPlan:
    """Blocks per group, in the body and (0 without `first_block_16bit`) in the 16-bit first arena.

    `block_bytes[g]` and `first_block_bytes[g]`: bytes of one block of group g over all its layers.
    """

    groups: tuple[KVGroup, ...]
    num_blocks: tuple[int, ...]
    num_first_blocks: tuple[int, ...]
    block_bytes: tuple[int, ...]
    first_block_bytes: tuple[int, ...]
    block_size: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all arenas, as spec predicts them."""
        rows = zip(self.num_blocks, self.block_bytes, self.num_first_blocks, self.first_block_bytes,
                   strict=True)  # fmt: skip
        return sum(n * size + first * first_size for n, size, first, first_size in rows)

    @property
    def capacity_tokens(self) -> int:
        """Tokens the smallest group with full attention can hold (of all groups if none has)."""
        blocks = [n + first for n, first in zip(self.num_blocks, self.num_first_blocks, strict=True)]
        full = [n for group, n in zip(self.groups, blocks, strict=True) if group.window is None]
        return min(full or blocks) * self.block_size


def plan_arenas(
    spec: ModelSpec, cache: CacheConfig, *, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int
) -> ArenaPlan:
    """Spend the KV budget on blocks. UsageError for an unknown codec or layer and for a budget that
    cannot hold one block of each group."""
    _check_codecs(spec, cache)
    groups = spec.kv_groups()
    block = tuple(group_block_bytes(g, cache.codecs_of, cache.block_size) for g in groups)
    first = tuple(first_block_bytes(g, cache.block_size, FIRST_BLOCK_CODEC) for g in groups)
    budget = cache.kv_budget_bytes
    num_first = (0,) * len(groups)
    if cache.first_block_16bit:
        # twice the running sequences, so that idle first blocks of cached prefixes survive them
        count = max(1, min(2 * max_num_seqs, budget // _FIRST_SHARE // sum(first)))
        num_first = (count,) * len(groups)
        budget -= count * sum(first)
        if budget < sum(block):
            raise UsageError(f"KV budget {cache.kv_budget} cannot hold a 16-bit first block and one more")
    num_blocks = split_budget(
        groups, block, budget, max_model_len=max_model_len, chunk=max_num_batched_tokens,
        block_size=cache.block_size,
    )  # fmt: skip
    return ArenaPlan(
        groups=groups,
        num_blocks=num_blocks,
        num_first_blocks=num_first,
        block_bytes=block,
        first_block_bytes=first,
        block_size=cache.block_size,
    )


def allocate_arenas(plan: ArenaPlan, cache: CacheConfig) -> dict[int, LayerCache]:
    """One LayerCache per layer; memory is touched when blocks are first written.

    UsageError where the machine does not give that much memory.
    """
    try:
        return _allocate(plan, cache)
    except (RuntimeError, MemoryError) as error:  # torch says RuntimeError
        raise UsageError(
            f"KV budget {format_bytes(plan.total_bytes)} cannot be allocated on this machine; "
            "ask for less (`kvtune doctor` shows its memory)"
        ) from error


def _allocate(plan: ArenaPlan, cache: CacheConfig) -> dict[int, LayerCache]:
    caches: dict[int, LayerCache] = {}
    for group, count, first_count in zip(plan.groups, plan.num_blocks, plan.num_first_blocks, strict=True):
        for layer in group.layers:
            k_codec, v_codec = cache.codecs_of(layer)
            first = _layout(group, FIRST_BLOCK_CODEC, FIRST_BLOCK_CODEC, plan.block_size)
            caches[layer] = LayerCache.allocate(
                _layout(group, k_codec, v_codec, plan.block_size),
                count,
                first_layout=first if first_count else None,
                num_first_blocks=first_count,
            )
    return caches


def cache_manager(plan: ArenaPlan, cache: CacheConfig, *, fingerprint: bytes) -> KVCacheManager:
    """The bookkeeping of these arenas' blocks; `fingerprint` is the root of every block hash."""
    return KVCacheManager(
        plan.groups,
        plan.num_blocks,
        block_size=plan.block_size,
        enable_prefix_caching=cache.enable_prefix_caching,
        policy=cache.eviction_policy,
        fingerprint=fingerprint,
        num_first_blocks=plan.num_first_blocks,
    )


def _layout(group: KVGroup, k_codec: str, v_codec: str, block_size: int) -> PackedLayout:
    return PackedLayout(
        block_size=block_size, num_kv_heads=group.num_kv_heads, k_head_dim=group.k_head_dim,
        v_head_dim=group.v_head_dim, k_codec=k_codec, v_codec=v_codec,
    )  # fmt: skip


def _check_codecs(spec: ModelSpec, cache: CacheConfig) -> None:
    for name in (cache.k_codec, cache.v_codec):
        codec_storage(name)
    for layer, pair in cache.layer_codecs.items():
        for name in pair:
            codec_storage(name)
        if not 0 <= layer < len(spec.layers):
            raise UsageError(
                f"layer_codecs names layer {layer}; the model has layers 0..{len(spec.layers) - 1}"
            )
