"""Owns the block ids of one KV cache group: who is free, idle or referenced.

The only writer of `ref_count`. A block's state is derived, never stored::

    ref_count > 0                     referenced (by that many block tables)
    ref_count = 0, hash               idle: cached, evictable, ordered by the policy
    ref_count = 0, no hash            free

Body ids are 0..N-1; ids N..N+F-1 are first blocks (block 0 of a sequence in 16 bit, an arena of its
own), so the two never replace each other and each has its own free list and policy.

How many body blocks there may be at once is a matter of a budget: blocks that are not free cost `block`
each, and `plane` more while they have their low plane (`PlaneRows`). Where planes cannot be dropped a
block costs 1, and the budget is the number of blocks. A block in the index has its plane or can have it
back: one whose plane is lost leaves the index at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt

from kvtune.cache.arena import Arena
from kvtune.cache.eviction import PolicyFactory
from kvtune.cache.eviction_lru import MANY, BlockIds
from kvtune.cache.eviction_many import insert_run, pin_each, take_victims, unpin_each
from kvtune.cache.plane_rows import PlaneRows
from kvtune.cache.pool_view import PoolView
from kvtune.cache.prefix_index import HashIndex
from kvtune.cache.table import NULL_BLOCK, Table, ids_of
from kvtune.errors import InvariantError
from kvtune.spec import PoolBudget
from kvtune.types import BlockHash, BlockId, PlaneCause

__all__ = ["BlockPool"]


class BlockPool(PoolView):
    """Blocks of one group. Not thread-safe; verbs raise InvariantError on misuse."""

    def __init__(
        self,
        num_blocks: int,
        num_first_blocks: int,
        *,
        policy: PolicyFactory,
        index: HashIndex,
        budget: PoolBudget | None = None,
        planes: PlaneRows | None = None,
    ) -> None:
        """`budget`: what the body may spend, all its blocks if None; `planes`: where blocks may lose them."""
        budget = budget or PoolBudget(total=num_blocks)
        num_ids = num_blocks + num_first_blocks
        self._ref_count = array("i", bytes(4 * num_ids))
        self._hashes: list[BlockHash | None] = [None] * num_ids
        self._is_published = bytearray(num_ids)  # whether it has a hash
        # For many blocks at once, where all are of one arena that keeps its planes.
        self._counts: BlockIds = np.frombuffer(self._ref_count, dtype=np.int32)
        self._published: npt.NDArray[np.uint8] = np.frombuffer(self._is_published, dtype=np.uint8)
        self._is_plain = planes is None and not num_first_blocks
        self._body = Arena(range(num_blocks), budget, policy(budget.num_whole), planes)
        self._first = Arena(
            range(num_blocks, num_blocks + num_first_blocks), PoolBudget(total=num_first_blocks),
            policy(num_first_blocks),
        )  # fmt: skip
        self._num_body = num_blocks
        self._planes = planes
        self._policy = policy
        self.index = index
        self.num_evicted = 0
        self.num_published = 0
        self.num_duplicates = 0

    # --- taking and giving back

    def admit(self, block_ids: Table[int], hashes: Sequence[BlockHash]) -> None:
        """A request comes: it will hold these blocks, the leading ones of its prompt's `hashes`."""
        num_hit = len(block_ids)
        num_first = min(1, len(hashes)) if self.has_first else 0
        if num_first:
            self._first.policy.begin(hashes[:1], min(1, num_hit))
        self._body.policy.begin(hashes[num_first:], max(0, num_hit - num_first))
        self.incref(block_ids)

    def take(self, num_blocks: int, *, first: bool = False) -> Table[int]:
        """Private blocks with ref_count 1, evicting the policy's victims where too few are free."""
        arena = self._first if first else self._body
        if arena.planes is not None:
            return Table("i", [self._take_one(arena) for _ in range(num_blocks)])
        free, counts = arena.free, self._ref_count
        num_left = len(free) - max(0, min(num_blocks, len(free), arena.budget.total - arena.spent))
        block_ids = free[num_left:]
        del free[num_left:]
        block_ids.reverse()
        while arena.spent > arena.budget.total and len(block_ids) < num_blocks:
            block_ids.append(self._take_one(arena))
        for block_id in block_ids:
            counts[block_id] = 1
        taken = Table("i", block_ids)
        if len(block_ids) < num_blocks:
            victims = self._evict_many(arena, num_blocks - len(block_ids))
            self._counts[victims] = 1
            taken.frombytes(victims.tobytes())
        return taken

    def _take_one(self, arena: Arena) -> BlockId:
        while not arena.can_take:
            self._evict(arena)
        block_id = arena.free.pop()
        self._ref_count[block_id] = 1
        if arena.planes is not None:
            arena.planes.take(block_id)
        return block_id

    def _evict(self, arena: Arena) -> None:
        self._set_free(arena, self._leave(arena, arena.policy.victim()))

    def _evict_many(self, arena: Arena, num_blocks: int) -> BlockIds:
        """`num_blocks` victims without their contents."""
        known = self._hashes
        victims = take_victims(arena.policy, num_blocks)
        if len(victims) < num_blocks:
            raise InvariantError("no block is free or idle; the caller must test for room first")
        if self._counts[victims].any() or not self._published[victims].all():
            raise InvariantError(f"the eviction policy chose blocks {victims}, which are not all idle")
        hashes: list[BlockHash | None] = []
        for victim in victims.tolist():
            hashes.append(known[victim])
            known[victim] = None
        self._published[victims] = 0
        self.index.evict_all(cast("list[BlockHash]", hashes))
        self.num_evicted += num_blocks
        return victims

    def _leave(self, arena: Arena, victim: BlockId | None) -> BlockId:
        """The victim loses its content; whoever evicts it decides what becomes of the block."""
        if victim is None:
            raise InvariantError("no block is free or idle; the caller must test for room first")
        block_hash = self._hashes[victim]
        if self._ref_count[victim] or block_hash is None:
            raise InvariantError(f"the eviction policy chose block {victim}, which is not idle")
        arena.policy.remove(victim)
        self.index.evict(block_hash)
        self._name(victim, None)
        self.num_evicted += 1
        return victim

    def _name(self, block_id: BlockId, block_hash: BlockHash | None) -> None:
        self._hashes[block_id] = block_hash
        self._is_published[block_id] = block_hash is not None

    def _set_free(self, arena: Arena, block_id: BlockId) -> None:
        arena.free.append(block_id)
        if arena.planes is not None:
            arena.planes.give_back(block_id)

    def incref(self, block_ids: Table[int]) -> None:
        """One more table holds each block; null ids are skipped."""
        if self._is_plain and len(block_ids) >= MANY:
            self._incref_many(np.array(block_ids))
            return
        counts, hashes, num_body = self._ref_count, self._hashes, self._num_body
        for block_id in ids_of(block_ids):
            if block_id < 0:
                continue
            if counts[block_id] == 0:
                if hashes[block_id] is None:
                    raise InvariantError(f"block {block_id} is free and cannot be shared")
                arena = self._first if block_id >= num_body else self._body
                arena.policy.pin(block_id)
                if arena.planes is not None:
                    arena.planes.idle.pop(block_id, None)
            counts[block_id] += 1

    def _incref_many(self, block_ids: BlockIds) -> None:
        block_ids = block_ids[block_ids >= 0]
        idle = block_ids[self._counts[block_ids] == 0]
        free = idle[self._published[idle] == 0]
        if len(free):
            raise InvariantError(f"block {free[0]} is free and cannot be shared")
        pin_each(self._body.policy, idle)
        self._counts[block_ids] += 1

    def decref(self, block_ids: Table[int]) -> None:
        """One table fewer holds each block, in this order; the last one leaves it idle or free."""
        if self._is_plain and len(block_ids) >= MANY:
            self._decref_many(np.array(block_ids))
            return
        counts, hashes = self._ref_count, self._hashes
        free: list[BlockId] = []
        idle: list[BlockId] = []
        for block_id in ids_of(block_ids):
            if block_id < 0:
                continue
            count = counts[block_id]
            if count > 1:
                counts[block_id] = count - 1
            elif count == 1:
                counts[block_id] = 0
                (free if hashes[block_id] is None else idle).append(block_id)
            else:
                raise InvariantError(f"block {block_id} was given back more often than taken")
        if self._is_plain:
            self._body.free += free
            unpin_each(self._body.policy, idle)
            return
        for block_id in free:
            self._set_free(self._arena(block_id), block_id)
        for block_id in idle:
            arena = self._arena(block_id)
            arena.policy.unpin(block_id)
            if arena.planes is not None and arena.planes.has_row(block_id):
                arena.planes.idle[block_id] = None

    def _decref_many(self, block_ids: BlockIds) -> None:
        block_ids = block_ids[block_ids >= 0]
        left = self._counts[block_ids] - 1
        if len(left) and left.min() < 0:
            block_id = block_ids[left < 0][0]
            raise InvariantError(f"block {block_id} was given back more often than taken")
        self._counts[block_ids] = left
        gone = block_ids[left == 0]
        is_idle = self._published[gone] != 0
        self._body.free += cast("list[BlockId]", gone[~is_idle].tolist())
        unpin_each(self._body.policy, gone[is_idle])

    def publish(self, table: Table[int], hashes: Sequence[BlockHash], start: int, end: int) -> None:
        """Make the full, computed blocks start..end-1 of a table findable and immutable; `hashes[i]` is that
        of block i.

        Where another block already holds a content, that one stays canonical: the table gets it with one
        reference more, and the reference on its own block is given back.
        """
        block_ids, new = ids_of(table[start:end]), hashes[start:end]
        is_plain = self._is_plain and not any(map(self._is_published.__getitem__, block_ids))
        if not is_plain or not self.index.insert_all(new, block_ids):
            for i in range(start, end):
                parent = BlockId(table[i - 1]) if i else NULL_BLOCK
                table[i] = self._publish_one(BlockId(table[i]), hashes[i], depth=i, parent=parent)
            return
        known, published = self._hashes, self._is_published
        for block_id, block_hash in zip(block_ids, new, strict=True):
            known[block_id] = block_hash
            published[block_id] = True
        parent = BlockId(table[start - 1]) if start and table[start - 1] >= 0 else None
        own = np.array(table[start:end]) if end - start >= MANY else block_ids
        insert_run(self._body.policy, own, new, depth=start, parent=parent)
        self.num_published += end - start

    def publish_each(
        self, tables: Sequence[Table[int]], ats: Sequence[int], hashes: Sequence[BlockHash]
    ) -> list[int]:
        """Publish one block of each table, in this order: block `ats[i]` of table i, under `hashes[i]`.
        Returns the tables that got another block instead."""
        changed: list[int] = []
        for i, (table, at, block_hash) in enumerate(zip(tables, ats, hashes, strict=True)):
            block_id, parent = BlockId(table[at]), BlockId(table[at - 1]) if at else NULL_BLOCK
            canonical = self._publish_one(block_id, block_hash, depth=at, parent=parent)
            if canonical != block_id:
                table[at] = canonical
                changed.append(i)
        return changed

    def _publish_one(
        self, block_id: BlockId, block_hash: BlockHash, *, depth: int, parent: BlockId
    ) -> BlockId:
        """Returns the canonical block. `parent` is the block before it, null where there is none or its
        window has passed."""
        if self._hashes[block_id] is not None:
            if self._hashes[block_id] != block_hash:
                raise InvariantError(f"block {block_id} is published under another hash")
            return block_id
        canonical = self.index.find(block_hash)
        if canonical is not None:
            self.incref(Table("i", (canonical,)))
            self.decref(Table("i", (block_id,)))
            self.num_duplicates += 1
            return canonical
        self.index.insert(block_hash, block_id)
        self._name(block_id, block_hash)
        if self._planes is not None:
            self._planes.forget_lost(block_hash)
        is_apart = parent < 0 or self.is_first(parent) != self.is_first(block_id)
        self._arena(block_id).policy.insert(
            block_id, depth=depth, content=block_hash, parent=None if is_apart else parent
        )
        self.num_published += 1
        return block_id

    def forget(self, hashes: Iterable[BlockHash]) -> None:
        """Free the idle blocks with these contents; no eviction is counted or remembered."""
        for block_hash in hashes:
            block_id = self.index.find(block_hash)
            if block_id is None or self._ref_count[block_id]:
                continue
            arena = self._arena(block_id)
            arena.policy.remove(block_id)
            self.index.forget(block_hash)
            self._name(block_id, None)
            self._set_free(arena, block_id)

    def unpublish_all(self) -> None:
        """Forget every content: idle blocks become free, referenced ones private again."""
        for block_id, block_hash in enumerate(self._hashes):
            if block_hash is not None:
                self._name(BlockId(block_id), None)
                if self._ref_count[block_id] == 0:
                    self._set_free(self._arena(BlockId(block_id)), BlockId(block_id))
        for arena in (self._body, self._first):
            arena.policy = self._policy(arena.budget.num_whole)
        self.index.clear()

    # --- memory pressure

    def set_budget(self, total: int) -> None:
        """Another purse for the body; `overspent` says what must leave. The lowest free ids go first now."""
        self._body.budget = replace(self._body.budget, total=total)
        self._body.free.sort(reverse=True)
        if self._planes is not None:
            self._planes.sort_free()

    def evict_idle(self) -> bool:
        """Evict the policy's next victim of the body; False when nothing is idle."""
        if not len(self._body.policy):
            return False
        self._evict(self._body)
        return True

    def drop_plane(self, block_id: BlockId, cause: PlaneCause) -> None:
        """Take the low plane of a full block off the device: it rests, or, without a place, is lost."""
        planes = self._elastic()
        if planes.can_rest:
            planes.drop(block_id, cause)
        else:
            self.lose_plane(block_id)

    def restore_plane(self, block_id: BlockId, cause: PlaneCause) -> None:
        """Bring a resting plane back; the caller has made room."""
        planes = self._elastic()
        planes.restore(block_id, cause)
        if self._ref_count[block_id] == 0:
            planes.idle[block_id] = None

    def lose_plane(self, block_id: BlockId) -> None:
        """The block is below full precision for good: nobody finds it any more; idle, it is free."""
        planes = self._elastic()
        planes.lose(block_id)
        block_hash = self._hashes[block_id]
        if block_hash is None:
            return
        if self._ref_count[block_id]:
            self._body.policy.unpin(block_id)
        self._body.policy.remove(block_id)
        self.index.forget(block_hash)
        self._name(block_id, None)
        planes.remember_lost(block_hash)
        if self._ref_count[block_id] == 0:
            self._body.free.append(block_id)

    def _elastic(self) -> PlaneRows:
        if self._planes is None:
            raise InvariantError("this pool's low planes cannot be dropped")
        return self._planes
