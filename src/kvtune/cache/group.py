"""One KV cache group: its pool, its index, and the arithmetic of its window."""

from __future__ import annotations

from collections.abc import Sequence

from kvtune.cache.block_pool import BlockPool
from kvtune.cache.eviction import PolicyFactory, policy_factory
from kvtune.cache.native import CacheLibrary
from kvtune.cache.native_pool import NativePool
from kvtune.cache.plane_rows import PlaneRows
from kvtune.cache.prefix_index import HashIndex, PrefixIndex
from kvtune.cache.records import GroupUsage
from kvtune.cache.table import Table, null_blocks
from kvtune.spec import KVGroup, PoolBudget
from kvtune.types import BlockHash

__all__ = ["EVICTED_MEMORY", "GroupCache"]

EVICTED_MEMORY = 4
"""Evictions remembered, in multiples of the pool's blocks: tells EVICTED from NEVER_SEEN."""


class GroupCache:
    """What the manager needs to know about one group."""

    def __init__(
        self,
        group: KVGroup,
        num_blocks: int,
        num_first_blocks: int,
        *,
        block_size: int,
        policy: str | PolicyFactory,
        budget: PoolBudget | None = None,
        num_resting: int = 0,
        library: CacheLibrary | None = None,
    ) -> None:
        """`budget`: of the body, `num_blocks` blocks if None; `num_resting`: planes the host arena takes;
        `library`: the pool is native."""
        self.group = group
        self.block_size = block_size
        self.window = group.window
        self.promised = 0  # body blocks promised to running requests, written by the manager alone
        max_evicted = EVICTED_MEMORY * (num_blocks + num_first_blocks)
        self.pool: BlockPool
        if library is not None and isinstance(policy, str):
            self.pool = NativePool(
                library, num_blocks, num_first_blocks, policy=policy, max_evicted=max_evicted, budget=budget
            )
            return
        planes = None
        if budget is not None and budget.plane:
            planes = PlaneRows(num_blocks, budget.num_whole, group=group.index, num_resting=num_resting)
        self.pool = BlockPool(
            num_blocks, num_first_blocks, policy=policy_factory(policy),
            index=HashIndex(max_evicted=max_evicted), budget=budget, planes=planes,
        )  # fmt: skip

    @property
    def index(self) -> PrefixIndex:
        """The pool's own."""
        return self.pool.index

    def first_visible(self, position: int) -> int:
        """Index of the first block that a query at `position` can see."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // self.block_size

    def release_points(self, start: int, end: int) -> range:
        """Positions in (start, end] whose query is the first not to see some block."""
        if self.window is None:
            return range(0)
        offset, size = self.window - 1, self.block_size
        passed = max(0, start - offset) // size
        return range(offset + (passed + 1) * size, end + 1, size)

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """Most blocks a sequence of `num_tokens` holds at once when computed `chunk` tokens a step."""
        total = -(-num_tokens // self.block_size)
        if self.window is None:
            return total
        return min(total, -(-(self.window - 1 + chunk - 1) // self.block_size) + 1)

    def fits(self, num_tokens: int, budget: PoolBudget | None = None) -> bool:
        """Whether an empty pool, or one of that budget, could hold the sequence, at worst one token a step
        and all planes dropped but that of the block being written."""
        budget = budget or self.pool.budget
        blocks = self.peak_blocks(num_tokens, 1)
        if self.pool.has_first:
            # Once a window has left block 0 behind, all visible blocks come from the body.
            blocks = min(blocks, -(-num_tokens // self.block_size) - 1)
        return blocks * budget.block + min(blocks, 1) * budget.plane <= budget.total

    def boundary(self, hashes: Sequence[BlockHash], limit: int) -> int:
        """Largest k <= limit such that the blocks seen by a query at token k*B are all resident."""
        k = limit
        while k > 0:
            hidden = min(k, self.first_visible(k * self.block_size))
            gap = self.pool.last_gap(hashes, hidden, k)
            if gap < hidden:
                break
            k = gap  # whatever lies between sees the gap too
        return k

    def visible_blocks(self, hashes: Sequence[BlockHash], boundary: int) -> Table[int]:
        """Blocks 0..boundary-1, null where a query at the boundary does not look; the others are resident."""
        hidden = min(boundary, self.first_visible(boundary * self.block_size))
        return null_blocks(hidden) + self.pool.find_run(hashes[hidden:boundary])

    def usage(self) -> GroupUsage:
        return GroupUsage(group=self.group.index, body=self.pool.usage(), first=self.pool.usage(first=True))
