"""What the cache tells others: frozen records, no behaviour beyond sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvtune.cache.table import Table
from kvtune.types import BlockCopy, BlockHash, MissCause, PlaneCause, RequestId

__all__ = ["Allocation", "CacheStats", "GroupUsage", "PoolUsage", "PrefixMatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMatch:
    """The longest cached prefix of some tokens; valid until the cache changes.

    `num_tokens` is a multiple of the block size, at most `len(tokens) - 1`, valid in every group.
    `blocks[g][i]` (int32 arrays) is group g's block i, -1 where it lies before the group's window.
    `misses` counts tokens by cause: `num_tokens + sum(misses.values()) == len(tokens)`.
    `leader` is the request now computing the first missing block that would help, `awaited` the
    deepest block of this prefix the leader is computing: once it is no longer in flight, match again.
    `root` is the parent of block 0 (recipe and tenant salt); `block_hashes` are those of all full
    blocks, to hand back so that nothing is hashed twice.
    """

    num_tokens: int
    blocks: tuple[Table[int], ...]
    misses: Mapping[MissCause, int]
    root: BlockHash
    leader: RequestId | None = None
    awaited: BlockHash | None = None
    block_hashes: Sequence[BlockHash] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Slots are there. `copies` must run, in order, before anything is written to the new slots."""

    copies: tuple[BlockCopy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUsage:
    """Blocks of one pool by state: free (no content), idle (cached, unused), referenced.

    `lowered` of the referenced and `lowered_idle` of the idle ones lack their low plane. A pool that trades
    planes for blocks has more of them while planes are dropped: `free` and `available` count whole blocks
    (with their plane) that the budget pays for at this moment.
    """

    total: int
    free: int
    idle: int
    available: int
    """Blocks a new request could get: free, or idle and evictable."""
    lowered: int = 0
    lowered_idle: int = 0

    @property
    def referenced(self) -> int:
        return self.total - self.free - self.idle


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUsage:
    """Blocks of one KV cache group; `first` counts the 16-bit first blocks, zero without them."""

    group: int
    body: PoolUsage
    first: PoolUsage

    @property
    def total(self) -> int:
        return self.body.total + self.first.total

    @property
    def free(self) -> int:
        return self.body.free + self.first.free

    @property
    def idle(self) -> int:
        return self.body.idle + self.first.idle

    @property
    def referenced(self) -> int:
        return self.body.referenced + self.first.referenced


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Counters since construction. Tokens are counted once per admission, blocks once per group."""

    queried_tokens: int = 0
    hit_tokens: int = 0
    misses: Mapping[MissCause, int] = field(default_factory=dict[MissCause, int])
    published_blocks: int = 0
    evicted_blocks: int = 0
    duplicate_blocks: int = 0
    """Blocks computed twice at once; the first copy stayed, the second was given back."""
    copied_blocks: int = 0
    dropped_planes: int = 0
    """Low planes moved to the host arena."""
    restored_planes: int = 0
    lost_planes: int = 0
    """Low planes given up because the host arena had no place (or lost them)."""
    moved_planes: Mapping[PlaneCause, int] = field(default_factory=dict[PlaneCause, int])
    """Planes dropped, restored and lost, by why."""
    lowered_tokens: int = 0
    """Tokens computed while some block they attend to was read below nominal precision."""
    lowered_reads: int = 0
    """Key tokens read below nominal precision, once per chunk that read them."""
