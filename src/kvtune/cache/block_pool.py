"""Owns the block ids of one KV cache group: who is free, idle or referenced.

The only writer of `ref_count`. A block's state is derived, never stored::

    ref_count > 0                     referenced (by that many block tables)
    ref_count = 0, hash               idle: cached, evictable, ordered by the policy
    ref_count = 0, no hash            free

Body ids are 0..N-1; ids N..N+F-1 are first blocks (block 0 of a sequence in 16 bit, an arena of its
own), so the two never replace each other and each has its own free list and policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvtune.cache.eviction import EvictionPolicy, PolicyFactory
from kvtune.cache.prefix_index import PrefixIndex
from kvtune.cache.records import PoolUsage
from kvtune.errors import InvariantError
from kvtune.types import BlockHash, BlockId

__all__ = ["NULL_BLOCK", "BlockPool"]

NULL_BLOCK = BlockId(-1)


class _Arena:
    """Free list and eviction order of one range of ids."""

    def __init__(self, start: int, size: int, policy: EvictionPolicy) -> None:
        self.size = size
        self.free = [BlockId(i) for i in range(start + size - 1, start - 1, -1)]  # lowest id on top
        self.policy = policy

    @property
    def available(self) -> int:
        return len(self.free) + len(self.policy)


class BlockPool:
    """Blocks of one group. Not thread-safe; verbs raise InvariantError on misuse."""

    def __init__(
        self,
        num_blocks: int,
        num_first_blocks: int,
        *,
        policy: PolicyFactory,
        index: PrefixIndex,
    ) -> None:
        self._ref_count = [0] * (num_blocks + num_first_blocks)
        self._hashes: list[BlockHash | None] = [None] * (num_blocks + num_first_blocks)
        self._body = _Arena(0, num_blocks, policy(num_blocks))
        self._first = _Arena(num_blocks, num_first_blocks, policy(num_first_blocks))
        self._policy = policy
        self._index = index
        self.num_evicted = 0
        self.num_published = 0
        self.num_duplicates = 0

    @property
    def has_first(self) -> bool:
        """Whether block 0 of every sequence comes from ids of its own."""
        return self._first.size > 0

    def is_first(self, block_id: BlockId) -> bool:
        return block_id >= self._body.size

    def _arena(self, block_id: BlockId) -> _Arena:
        return self._first if block_id >= self._body.size else self._body

    def available(self, *, first: bool = False) -> int:
        """Blocks that `allocate` could hand out: free or idle."""
        return self._first.available if first else self._body.available

    def size(self, *, first: bool = False) -> int:
        return self._first.size if first else self._body.size

    def usage(self, *, first: bool = False) -> PoolUsage:
        arena = self._first if first else self._body
        return PoolUsage(total=arena.size, free=len(arena.free), idle=len(arena.policy))

    def ref_count(self, block_id: BlockId) -> int:
        return self._ref_count[block_id]

    def hash_of(self, block_id: BlockId) -> BlockHash | None:
        """The published identity, None while the block is private."""
        return self._hashes[block_id]

    def is_idle(self, block_id: BlockId) -> bool:
        return self._ref_count[block_id] == 0 and self._hashes[block_id] is not None

    def begin(self, hashes: Sequence[BlockHash], num_hit: int) -> None:
        """Tell the policies that a request was admitted; see `EvictionPolicy.begin`."""
        num_first = min(1, len(hashes)) if self.has_first else 0
        if num_first:
            self._first.policy.begin(hashes[:1], min(1, num_hit))
        self._body.policy.begin(hashes[num_first:], max(0, num_hit - num_first))

    def allocate(self, *, first: bool = False) -> BlockId:
        """A private block with ref_count 1, evicting the policy's victim when none is free."""
        arena = self._first if first else self._body
        block_id = arena.free.pop() if arena.free else self._evict(arena)
        self._ref_count[block_id] = 1
        return block_id

    def _evict(self, arena: _Arena) -> BlockId:
        block_id = arena.policy.victim()
        if block_id is None:
            raise InvariantError("no block is free or idle; the caller must test for room first")
        block_hash = self._hashes[block_id]
        if self._ref_count[block_id] or block_hash is None:
            raise InvariantError(f"the eviction policy chose block {block_id}, which is not idle")
        arena.policy.remove(block_id)
        self._index.evict(block_hash)
        self._hashes[block_id] = None
        self.num_evicted += 1
        return block_id

    def incref(self, block_ids: Iterable[BlockId]) -> None:
        """One more table holds each block; null ids are skipped."""
        counts, hashes, body_size = self._ref_count, self._hashes, self._body.size
        for block_id in block_ids:
            if block_id < 0:
                continue
            if counts[block_id] == 0:
                if hashes[block_id] is None:
                    raise InvariantError(f"block {block_id} is free and cannot be shared")
                (self._first if block_id >= body_size else self._body).policy.pin(block_id)
            counts[block_id] += 1

    def decref(self, block_ids: Iterable[BlockId]) -> None:
        """One table fewer holds each block, in this order; the last one leaves it idle or free."""
        counts, hashes, body_size = self._ref_count, self._hashes, self._body.size
        for block_id in block_ids:
            if block_id < 0:
                continue
            count = counts[block_id] - 1
            if count < 0:
                raise InvariantError(f"block {block_id} was given back more often than taken")
            counts[block_id] = count
            if count == 0:
                arena = self._first if block_id >= body_size else self._body
                if hashes[block_id] is None:
                    arena.free.append(block_id)
                else:
                    arena.policy.unpin(block_id)

    def publish(
        self, block_id: BlockId, block_hash: BlockHash, *, depth: int, parent: BlockId = NULL_BLOCK
    ) -> BlockId:
        """Make a full, computed block findable and immutable; returns the canonical block.

        `parent` is the block before it, null where there is none or its window has passed. When another
        block already holds this content, that one stays canonical: it is returned with one reference
        more, and the reference on `block_id` is given back.
        """
        if self._hashes[block_id] is not None:
            if self._hashes[block_id] != block_hash:
                raise InvariantError(f"block {block_id} is published under another hash")
            return block_id
        canonical = self._index.find(block_hash)
        if canonical is not None:
            self.incref((canonical,))
            self.decref((block_id,))
            self.num_duplicates += 1
            return canonical
        self._index.insert(block_hash, block_id)
        self._hashes[block_id] = block_hash
        is_apart = parent < 0 or self.is_first(parent) != self.is_first(block_id)
        self._arena(block_id).policy.insert(
            block_id, depth=depth, content=block_hash, parent=None if is_apart else parent
        )
        self.num_published += 1
        return block_id

    def forget(self, block_hash: BlockHash) -> None:
        """Free the idle block with this content, if there is one; no eviction is counted or remembered."""
        block_id = self._index.find(block_hash)
        if block_id is None or self._ref_count[block_id]:
            return
        arena = self._arena(block_id)
        arena.policy.remove(block_id)
        self._index.forget(block_hash)
        self._hashes[block_id] = None
        arena.free.append(block_id)

    def unpublish_all(self) -> None:
        """Forget every content: idle blocks become free, referenced ones private again."""
        for block_id, block_hash in enumerate(self._hashes):
            if block_hash is not None:
                self._hashes[block_id] = None
                if self._ref_count[block_id] == 0:
                    self._arena(BlockId(block_id)).free.append(BlockId(block_id))
        for arena in (self._body, self._first):
            arena.policy = self._policy(arena.size)
        self._index.clear()

    def check(self, references: Counter[BlockId]) -> None:
        """Assert the pool's invariant, given how many tables hold each block."""
        published = {h: i for i, h in enumerate(self._hashes) if h is not None}
        _expect(dict(self._index.items()) == published, "index and pool disagree about published blocks")
        for arena, ids in (
            (self._body, range(self._body.size)),
            (self._first, range(self._body.size, len(self._ref_count))),
        ):
            self._check_arena(arena, ids, references)

    def _check_arena(self, arena: _Arena, ids: range, references: Counter[BlockId]) -> None:
        free = {i for i in ids if self._ref_count[i] == 0 and self._hashes[i] is None}
        idle = sum(1 for i in ids if self._ref_count[i] == 0 and self._hashes[i] is not None)
        _expect(len(arena.free) == len(set(arena.free)) and set(arena.free) == free, "free list is wrong")
        _expect(len(arena.policy) == idle, f"policy orders {len(arena.policy)} blocks, {idle} are idle")
        victim = arena.policy.victim()
        _expect(victim is None or (victim in ids and self.is_idle(victim)), f"victim {victim} is not idle")
        for i in ids:
            count, held = self._ref_count[i], references[BlockId(i)]
            _expect(count == held, f"block {i}: ref_count {count}, in {held} tables")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantError(message)
