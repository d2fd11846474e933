"""The manager of the blocks an arena plan names."""

from __future__ import annotations

from kvtune.cache.manager import KVCacheManager
from kvtune.config import CacheConfig
from kvtune.spec import ArenaPlan

__all__ = ["cache_manager"]


def cache_manager(plan: ArenaPlan, cache: CacheConfig, *, fingerprint: bytes) -> KVCacheManager:
    """The bookkeeping of these arenas' blocks; `fingerprint` is the root of every block hash."""
    return KVCacheManager(
        plan.groups,
        plan.num_ids,
        block_size=plan.block_size,
        enable_prefix_caching=cache.enable_prefix_caching,
        policy=cache.eviction_policy,
        fingerprint=fingerprint,
        num_first_blocks=plan.num_first_blocks,
        budgets=plan.budgets,
        num_resting=plan.num_resting,
    )
