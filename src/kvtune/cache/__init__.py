"""Paged KV cache without tensors: block pools, prefix reuse, eviction, copy-on-write forks.

`KVCacheManager` is the facade; the records are what it answers.
"""

from kvtune.cache.arena_manager import cache_manager
from kvtune.cache.manager import KVCacheManager
from kvtune.cache.precision import Precision
from kvtune.cache.records import Allocation, CacheStats, GroupUsage, PoolUsage, PrefixMatch

__all__ = [
    "Allocation",
    "CacheStats",
    "GroupUsage",
    "KVCacheManager",
    "PoolUsage",
    "Precision",
    "PrefixMatch",
    "cache_manager",
]
