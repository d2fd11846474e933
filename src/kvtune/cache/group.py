"""One KV cache group: its pool, its index, and the arithmetic of its window."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvtune.cache.block_pool import NULL_BLOCK, BlockPool
from kvtune.cache.eviction import PolicyFactory
from kvtune.cache.plane_rows import PlaneRows
from kvtune.cache.prefix_index import HashIndex
from kvtune.cache.records import GroupUsage
from kvtune.spec import KVGroup, PoolBudget
from kvtune.types import BlockHash, BlockId

__all__ = ["EVICTED_MEMORY", "GroupCache", "Table"]

EVICTED_MEMORY = 4
"""Evicted hashes remembered, in multiples of the pool's blocks: tells EVICTED from NEVER_SEEN."""

Table = array  # type code "i": int32 block ids, NULL_BLOCK where the window has passed


class GroupCache:
    """What the manager needs to know about one group."""

    def __init__(
        self,
        group: KVGroup,
        num_blocks: int,
        num_first_blocks: int,
        *,
        block_size: int,
        policy: PolicyFactory,
        budget: PoolBudget | None = None,
        num_resting: int = 0,
    ) -> None:
        """`budget`: of the body, `num_blocks` blocks if None; `num_resting`: planes the host arena takes."""
        self.group = group
        self.block_size = block_size
        self.window = group.window
        self.promised = 0  # body blocks promised to running requests, written by the manager alone
        planes = None
        if budget is not None and budget.plane:
            planes = PlaneRows(num_blocks, budget.num_whole, group=group.index, num_resting=num_resting)
        self.index = HashIndex(max_evicted=EVICTED_MEMORY * (num_blocks + num_first_blocks))
        self.pool = BlockPool(
            num_blocks, num_first_blocks, policy=policy, index=self.index, budget=budget, planes=planes
        )

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

    def longest_run(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """Blocks of the leading run of resident hashes."""
        find = self.index.find
        run: list[BlockId] = []
        for block_hash in hashes:
            block_id = find(block_hash)
            if block_id is None:
                break
            run.append(block_id)
        return run

    def residents(self, hashes: Sequence[BlockHash]) -> list[BlockId | None]:
        return [self.index.find(block_hash) for block_hash in hashes]

    def boundary(self, resident: Sequence[BlockId | None], limit: int) -> int:
        """Largest k <= limit such that the blocks seen by a query at token k*B are all resident."""
        runs: list[int] = []  # length of the resident run that ends at each block
        for block_id in resident[:limit]:
            runs.append(0 if block_id is None else (runs[-1] if runs else 0) + 1)
        for k in range(min(limit, len(runs)), 0, -1):
            if runs[k - 1] >= k - self.first_visible(k * self.block_size):
                return k
        return 0

    def visible_blocks(self, resident: Sequence[BlockId | None], boundary: int) -> tuple[BlockId, ...]:
        """Blocks 0..boundary-1, null where a query at the boundary does not look."""
        hidden = min(boundary, self.first_visible(boundary * self.block_size))
        seen = [NULL_BLOCK if b is None else b for b in resident[hidden:boundary]]
        return (NULL_BLOCK,) * hidden + tuple(seen)

    def usage(self) -> GroupUsage:
        return GroupUsage(group=self.group.index, body=self.pool.usage(), first=self.pool.usage(first=True))
