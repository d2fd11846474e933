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

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvtune.cache.eviction import EvictionPolicy, PolicyFactory
from kvtune.cache.plane_rows import PlaneRows
from kvtune.cache.prefix_index import PrefixIndex
from kvtune.cache.records import PoolUsage
from kvtune.errors import InvariantError
from kvtune.spec import PoolBudget
from kvtune.types import BlockHash, BlockId, PlaneCause

__all__ = ["NULL_BLOCK", "BlockPool"]

NULL_BLOCK = BlockId(-1)


class _Arena:
    """Free list, eviction order and spending of one range of ids."""

    def __init__(
        self, ids: range, budget: PoolBudget, policy: EvictionPolicy, planes: PlaneRows | None = None
    ) -> None:
        self.ids = ids
        self.budget = budget
        self.free = [BlockId(i) for i in reversed(ids)]  # lowest id on top
        self.policy = policy
        self.planes = planes

    @property
    def spent(self) -> int:
        taken = len(self.ids) - len(self.free)
        if self.planes is None:
            return taken
        return taken * self.budget.block + self.planes.num_used * self.budget.plane

    @property
    def room(self) -> int:
        """What could be spent once all idle blocks had left; negative where the budget was lowered."""
        if self.planes is None:
            return self.budget.total - len(self.ids) + len(self.free) + len(self.policy)
        idle = len(self.policy) * self.budget.block + len(self.planes.idle) * self.budget.plane
        return self.budget.total - self.spent + idle

    @property
    def can_take(self) -> bool:
        """Whether the budget has a whole block left without an eviction."""
        return bool(self.free) and self.spent + self.budget.whole <= self.budget.total


class BlockPool:
    """Blocks of one group. Not thread-safe; verbs raise InvariantError on misuse."""

    def __init__(
        self,
        num_blocks: int,
        num_first_blocks: int,
        *,
        policy: PolicyFactory,
        index: PrefixIndex,
        budget: PoolBudget | None = None,
        planes: PlaneRows | None = None,
    ) -> None:
        """`budget`: what the body may spend, all its blocks if None; `planes`: where blocks may lose them."""
        budget = budget or PoolBudget(total=num_blocks)
        self._ref_count = [0] * (num_blocks + num_first_blocks)
        self._hashes: list[BlockHash | None] = [None] * (num_blocks + num_first_blocks)
        self._body = _Arena(range(num_blocks), budget, policy(budget.num_whole), planes)
        self._first = _Arena(
            range(num_blocks, num_blocks + num_first_blocks), PoolBudget(total=num_first_blocks),
            policy(num_first_blocks),
        )  # fmt: skip
        self._num_body = num_blocks
        self._planes = planes
        self._policy = policy
        self._index = index
        self.num_evicted = 0
        self.num_published = 0
        self.num_duplicates = 0

    @property
    def has_first(self) -> bool:
        """Whether block 0 of every sequence comes from ids of its own."""
        return len(self._first.ids) > 0

    @property
    def planes(self) -> PlaneRows | None:
        """Where the body's low planes are; None where they cannot be dropped. Read only."""
        return self._planes

    @property
    def budget(self) -> PoolBudget:
        """What the body may spend."""
        return self._body.budget

    def is_first(self, block_id: BlockId) -> bool:
        return block_id >= self._num_body

    def _arena(self, block_id: BlockId) -> _Arena:
        return self._first if block_id >= self._num_body else self._body

    def price(self, *, first: bool = False) -> int:
        """What a new block costs, its low plane included."""
        return 1 if first else self._body.budget.whole

    def worth(self, block_id: BlockId) -> int:
        """What a block that is not free costs at this moment."""
        if self._planes is None or block_id >= self._num_body:
            return 1
        budget = self._body.budget
        return budget.block + (budget.plane if self._planes.has_row(block_id) else 0)

    def room(self, *, first: bool = False) -> int:
        """What can be spent on new blocks, in the budget's unit, all idle ones given up."""
        return self._first.room if first else self._body.room

    def size(self, *, first: bool = False) -> int:
        """Whole blocks the budget pays for."""
        return (self._first if first else self._body).budget.num_whole

    def usage(self, *, first: bool = False) -> PoolUsage:
        arena = self._first if first else self._body
        whole, taken = arena.budget.whole, len(arena.ids) - len(arena.free)
        free = max(0, arena.budget.total - arena.spent) // whole
        lowered = taken - arena.planes.num_used if arena.planes is not None else 0
        lowered_idle = len(arena.policy) - len(arena.planes.idle) if arena.planes is not None else 0
        return PoolUsage(
            total=taken + free, free=free, idle=len(arena.policy), available=max(0, arena.room) // whole,
            lowered=lowered - lowered_idle, lowered_idle=lowered_idle,
        )  # fmt: skip

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
        while not arena.can_take:
            self._evict(arena)
        block_id = arena.free.pop()
        self._ref_count[block_id] = 1
        if arena.planes is not None:
            arena.planes.take(block_id)
        return block_id

    def _evict(self, arena: _Arena) -> None:
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
        self._set_free(arena, block_id)

    def _set_free(self, arena: _Arena, block_id: BlockId) -> None:
        arena.free.append(block_id)
        if arena.planes is not None:
            arena.planes.give_back(block_id)

    def incref(self, block_ids: Iterable[BlockId]) -> None:
        """One more table holds each block; null ids are skipped."""
        counts, hashes, num_body = self._ref_count, self._hashes, self._num_body
        for block_id in block_ids:
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

    def decref(self, block_ids: Iterable[BlockId]) -> None:
        """One table fewer holds each block, in this order; the last one leaves it idle or free."""
        counts, hashes, num_body = self._ref_count, self._hashes, self._num_body
        for block_id in block_ids:
            if block_id < 0:
                continue
            count = counts[block_id] - 1
            if count < 0:
                raise InvariantError(f"block {block_id} was given back more often than taken")
            counts[block_id] = count
            if count == 0:
                arena = self._first if block_id >= num_body else self._body
                if hashes[block_id] is None:
                    self._set_free(arena, block_id)
                else:
                    arena.policy.unpin(block_id)
                    if arena.planes is not None and arena.planes.has_row(block_id):
                        arena.planes.idle[block_id] = None

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
        if self._planes is not None:
            self._planes.forget_lost(block_hash)
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
        self._set_free(arena, block_id)

    def unpublish_all(self) -> None:
        """Forget every content: idle blocks become free, referenced ones private again."""
        for block_id, block_hash in enumerate(self._hashes):
            if block_hash is not None:
                self._hashes[block_id] = None
                if self._ref_count[block_id] == 0:
                    self._set_free(self._arena(BlockId(block_id)), BlockId(block_id))
        for arena in (self._body, self._first):
            arena.policy = self._policy(arena.budget.num_whole)
        self._index.clear()

    # --- memory pressure

    def set_budget(self, total: int) -> None:
        """Another purse for the body; `overspent` says what must leave. The lowest free ids go first now."""
        self._body.budget = replace(self._body.budget, total=total)
        self._body.free.sort(reverse=True)
        if self._planes is not None:
            self._planes.sort_free()

    @property
    def overspent(self) -> int:
        """What the body costs beyond its budget."""
        return max(0, self._body.spent - self._body.budget.total)

    @property
    def spent(self) -> int:
        """What the body's blocks and their planes cost at this moment."""
        return self._body.spent

    @property
    def num_lowered(self) -> int:
        """Blocks, idle ones too, that lack their low plane."""
        if self._planes is None:
            return 0
        return self._num_body - len(self._body.free) - self._planes.num_used

    def evict_idle(self) -> bool:
        """Evict the policy's next victim of the body; False when nothing is idle."""
        if not len(self._body.policy):
            return False
        self._evict(self._body)
        return True

    def row(self, block_id: BlockId) -> int:
        """The row of a block's low plane, -1 where the pool assigns none."""
        if self._planes is None or block_id >= self._num_body:
            return -1
        return int(self._planes.row_of[block_id])

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
        self._index.forget(block_hash)
        self._hashes[block_id] = None
        planes.remember_lost(block_hash)
        if self._ref_count[block_id] == 0:
            self._body.free.append(block_id)

    def was_lost(self, block_hash: BlockHash) -> bool:
        """Whether this content left the index because its low plane was lost."""
        return self._planes is not None and self._planes.was_lost(block_hash)

    def free_ids(self) -> list[BlockId]:
        """Body ids without content."""
        return list(self._body.free)

    def _elastic(self) -> PlaneRows:
        if self._planes is None:
            raise InvariantError("this pool's low planes cannot be dropped")
        return self._planes

    def check(self, references: Counter[BlockId]) -> None:
        """Assert the pool's invariant, given how many tables hold each block."""
        published = {h: i for i, h in enumerate(self._hashes) if h is not None}
        _expect(dict(self._index.items()) == published, "index and pool disagree about published blocks")
        for arena in (self._body, self._first):
            self._check_arena(arena, references)
        if self._planes is not None:
            self._planes.check({BlockId(i) for i in self._body.ids} - set(self._body.free))
            held = self._planes.resting.keys() | {
                i for i in self._body.ids if self._planes.has_row(BlockId(i))
            }
            lost = {i for i in published.values() if not self.is_first(BlockId(i))} - held
            _expect(not lost, f"blocks {lost} are in the index without their low plane")

    def _check_arena(self, arena: _Arena, references: Counter[BlockId]) -> None:
        ids = arena.ids
        free = {i for i in ids if self._ref_count[i] == 0 and self._hashes[i] is None}
        idle = {BlockId(i) for i in ids if self._ref_count[i] == 0 and self._hashes[i] is not None}
        _expect(len(arena.free) == len(set(arena.free)) and set(arena.free) == free, "free list is wrong")
        _expect(
            len(arena.policy) == len(idle), f"policy orders {len(arena.policy)} blocks, {len(idle)} are idle"
        )
        victim = arena.policy.victim()
        _expect(victim is None or (victim in ids and self.is_idle(victim)), f"victim {victim} is not idle")
        _expect(arena.spent <= arena.budget.total, f"{arena.spent} spent of a budget of {arena.budget.total}")
        if arena.planes is not None:
            with_row = {i for i in idle if arena.planes.has_row(i)}
            _expect(with_row == set(arena.planes.idle), "rows of idle blocks are counted wrong")
        for i in ids:
            count, held = self._ref_count[i], references[BlockId(i)]
            _expect(count == held, f"block {i}: ref_count {count}, in {held} tables")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantError(message)
