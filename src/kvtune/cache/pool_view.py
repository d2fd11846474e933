"""What can be asked of a block pool. Nothing here changes it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from kvtune.cache.arena import Arena
from kvtune.cache.plane_rows import PlaneRows
from kvtune.cache.prefix_index import HashIndex
from kvtune.cache.records import PoolUsage
from kvtune.cache.table import Need, Table, ids_of
from kvtune.errors import InvariantError
from kvtune.spec import PoolBudget
from kvtune.types import BlockHash, BlockId

__all__ = ["PoolView"]


class PoolView:
    """The reading half of `BlockPool`, which owns and writes what is read here."""

    index: HashIndex
    _ref_count: array[int]
    _hashes: list[BlockHash | None]
    _body: Arena
    _first: Arena
    _num_body: int
    _planes: PlaneRows | None

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

    def _arena(self, block_id: BlockId) -> Arena:
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

    # --- looking

    def find_run(self, hashes: Sequence[BlockHash]) -> Table[int]:
        """Blocks of the leading run of findable hashes."""
        return Table("i", self.index.run(hashes))

    def last_gap(self, hashes: Sequence[BlockHash], start: int, end: int) -> int:
        """Largest i in start..end-1 whose hash has no block; start - 1 where all have one."""
        find = self.index.find
        for i in range(end - 1, start - 1, -1):
            if find(hashes[i]) is None:
                return i
        return start - 1

    def mark_seen(self, hashes: Sequence[BlockHash], seen: array[int]) -> None:
        """Set seen[i] where hash i has a block, or its eviction is remembered."""
        self.index.mark_seen(hashes, seen)

    def idle_if_held(self, block_ids: Table[int], hashes: Sequence[BlockHash]) -> Need | None:
        """What the idle ones of these blocks cost; None unless each one holds the content at its place. Null
        ids hold anything."""
        held = list(map(self._hashes.__getitem__, block_ids))
        if held != list(hashes[: len(held)]):
            known = self._hashes
            pairs = zip(block_ids, hashes, strict=False)
            if not all(b < 0 or known[b] == h for b, h in pairs):
                return None
        return self.idle_worth(block_ids)

    def num_idle(self, block_ids: Table[int]) -> Need:
        """How many of these blocks are idle, (body, first)."""
        idle = self._idle_ones(block_ids)
        num_first = sum(map(self.is_first, idle)) if self.has_first else 0
        return len(idle) - num_first, num_first

    def idle_worth(self, block_ids: Table[int]) -> Need:
        """What the idle ones of these blocks cost, (body, first) in the budget's unit."""
        if self._planes is None:
            return self.num_idle(block_ids)
        worth = [0, 0]
        for block_id in self._idle_ones(block_ids):
            worth[self.is_first(block_id)] += self.worth(block_id)
        return worth[0], worth[1]

    def _idle_ones(self, block_ids: Table[int]) -> list[BlockId]:
        counts, hashes = self._ref_count, self._hashes
        if 0 not in map(counts.__getitem__, block_ids):
            return []
        return [b for b in ids_of(block_ids) if b >= 0 and not counts[b] and hashes[b] is not None]

    def released_worth(self, tables: Iterable[Table[int]]) -> Need:
        """What the blocks cost that nobody would hold once these tables were gone."""
        held = Counter(BlockId(b) for table in tables for b in table if b >= 0)
        worth = [0, 0]
        for block_id, count in held.items():
            if count == self._ref_count[block_id]:
                worth[self.is_first(block_id)] += self.worth(block_id)
        return worth[0], worth[1]

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

    def row(self, block_id: BlockId) -> int:
        """The row of a block's low plane, -1 where the pool assigns none."""
        if self._planes is None or block_id >= self._num_body:
            return -1
        return int(self._planes.row_of[block_id])

    def was_lost(self, block_hash: BlockHash) -> bool:
        """Whether this content left the index because its low plane was lost."""
        return self._planes is not None and self._planes.was_lost(block_hash)

    def free_ids(self) -> list[BlockId]:
        """Body ids without content."""
        return list(self._body.free)

    def check(self, references: Counter[BlockId]) -> None:
        """Assert the pool's invariant, given how many tables hold each block."""
        published = {h: i for i, h in enumerate(self._hashes) if h is not None}
        _expect(dict(self.index.items()) == published, "index and pool disagree about published blocks")
        for arena in (self._body, self._first):
            self._check_arena(arena, references)
        if self._planes is not None:
            self._planes.check({BlockId(i) for i in self._body.ids} - set(self._body.free))
            held = self._planes.resting.keys() | {
                i for i in self._body.ids if self._planes.has_row(BlockId(i))
            }
            lost = {i for i in published.values() if not self.is_first(BlockId(i))} - held
            _expect(not lost, f"blocks {lost} are in the index without their low plane")

    def _check_arena(self, arena: Arena, references: Counter[BlockId]) -> None:
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
