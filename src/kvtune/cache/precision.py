"""Which blocks lose their low plane under memory pressure, who reads them then, and how it comes back.

The order in which memory is found, here and in the scheduler: free blocks, idle blocks, low planes of running
requests, preemption. Nobody's answer is read below nominal precision while memory that nobody uses could be
given up instead, and nobody is preempted while a plane could be. Who loses planes is the scheduler's choice;
among one request's blocks the oldest go first, block 0 last of all (attention sinks), shared ones after the
requests' own. Planes are lost request by request, not a few of everybody's: whoever has lost one is below
nominal precision anyway.

A request that reads a block without its plane computes keys and values another run would not have computed:
from then on it publishes nothing, to its end. Whoever is admitted later finds full precision or computes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from kvtune.cache.group import GroupCache
from kvtune.cache.holding import Holding, needed_blocks, peak_needs, shortfalls
from kvtune.cache.in_flight import InFlight
from kvtune.cache.plane_rows import PlaneRows
from kvtune.cache.records import PrefixMatch
from kvtune.cache.table import Need, Table
from kvtune.errors import InvariantError
from kvtune.spec import PoolBudget
from kvtune.types import BlockId, PlaneCause, PlaneMove, RequestId

__all__ = ["Precision", "PrecisionCounters"]

_Elastic = tuple[int, GroupCache, PlaneRows]


class PrecisionCounters(TypedDict):
    """The fields of `CacheStats` that are counted here."""

    dropped_planes: int
    restored_planes: int
    lost_planes: int
    moved_planes: Mapping[PlaneCause, int]
    lowered_tokens: int
    lowered_reads: int


class Precision:
    """Low planes of all pools of one manager. Verbs that may lack room say so and change nothing."""

    def __init__(
        self,
        groups: Sequence[GroupCache],
        holdings: Mapping[RequestId, Holding],
        in_flight: InFlight,
    ) -> None:
        self._groups = groups
        self._holdings = holdings
        self._in_flight = in_flight
        self._elastic: list[_Elastic] = [
            (g, group, group.pool.planes) for g, group in enumerate(groups) if group.pool.planes is not None
        ]
        self._causes: Counter[PlaneCause] = Counter()
        self._num_lowered_tokens = self._num_lowered_reads = 0

    @property
    def can_lower(self) -> bool:
        """Whether any plane may be dropped: a setting, off by default."""
        return bool(self._elastic)

    @property
    def is_nominal(self) -> bool:
        """Whether every block, idle ones too, has its plane in the pool."""
        return all(group.pool.num_lowered == 0 for _, group, _ in self._elastic)

    @property
    def has_resting(self) -> bool:
        """Whether some plane could come back."""
        return any(planes.resting for _, _, planes in self._elastic)

    # --- the budget

    def set_budgets(self, budgets: Sequence[PoolBudget]) -> None:
        """Other purses from now on; what is overspent must be given up before anything is taken."""
        for group, budget in zip(self._groups, budgets, strict=True):
            if (budget.block, budget.plane) != (group.pool.budget.block, group.pool.budget.plane):
                raise InvariantError("a budget may change, the prices of blocks and planes may not")
        for group, budget in zip(self._groups, budgets, strict=True):
            group.pool.set_budget(budget.total)

    @property
    def is_overspent(self) -> bool:
        return any(group.pool.overspent for group in self._groups)

    def shed_idle(self) -> None:
        """Bring pools within their budgets as far as idle blocks can: first they lose their planes, which
        come back with the next hit, then they are evicted."""
        for _, group, planes in self._elastic:
            for block_id in list(planes.idle):
                if not group.pool.overspent or not planes.can_rest:
                    break
                self._drop(group, block_id, PlaneCause.BUDGET)
        for group in self._groups:
            while group.pool.overspent and group.pool.evict_idle():
                pass

    def lower_overspent(self, request_ids: Sequence[RequestId]) -> None:
        """Drop planes of these requests, in this order, until the budgets are kept or none is left."""
        for elastic in self._elastic:
            pool, plane = elastic[1].pool, elastic[1].pool.budget.plane
            for block_id in list(islice(self._candidates(elastic, request_ids), -(-pool.overspent // plane))):
                self._drop(elastic[1], block_id, PlaneCause.BUDGET)

    # --- making room

    def lower_for_growth(
        self, request_id: RequestId, num_tokens: int, *, reserve: float, request_ids: Sequence[RequestId]
    ) -> bool:
        """Drop planes of `request_ids`, in this order, until the running request can have slots for
        `num_tokens`; False, and nothing changed, when all of them would not do."""
        needs = needed_blocks(self._groups, self._holdings[request_id], num_tokens)
        return self._lower(shortfalls(self._groups, needs, reserve), request_ids, PlaneCause.GROWTH)

    def lower_for_admission(
        self,
        match: PrefixMatch,
        num_tokens: int,
        *,
        gate_tokens: int,
        reserve: float,
        request_ids: Callable[[], Sequence[RequestId]],
    ) -> bool:
        """The same for a request that would come with `match`; all of `gate_tokens` must fit once every plane
        is dropped that may be. `request_ids` is asked only then. A plane without a resting place takes its
        block out of the index, so match again afterwards."""
        tables = [Table("i", blocks) for blocks in match.blocks]
        holding = Holding(tables, match.root, [], match.num_tokens)
        now = needed_blocks(self._groups, holding, num_tokens)
        chunk = max(1, num_tokens - match.num_tokens)
        peak = peak_needs(self._groups, holding, now, num_tokens=max(gate_tokens, num_tokens), chunk=chunk)
        if not self.would_fit(match, peak, now, reserve):
            return False
        pairs = zip(self._groups, match.blocks, strict=True)
        idle = [group.pool.idle_worth(blocks) for group, blocks in pairs]
        lacking = shortfalls(self._groups, now, reserve, revived=idle)
        return self._lower(lacking, request_ids(), PlaneCause.ADMISSION)

    def would_fit(
        self, match: PrefixMatch, needs: Sequence[Need], now: Sequence[Need], reserve: float
    ) -> bool:
        """Whether `needs` new blocks would fit beside what is referenced and promised if every full block
        lost its plane; `now` of them keep it while they are written."""
        for g, group in enumerate(self._groups):
            pool, budget, (body, first) = group.pool, group.pool.budget, needs[g]
            if first and shortfalls([group], [(0, first)], reserve)[0][1]:
                return False
            revived = pool.num_idle(match.blocks[g])[0]
            kept = int(reserve * pool.size())
            blocks = pool.usage().referenced + revived + group.promised + body + kept
            planes = self._num_unfinished(g) + min(body, now[g][0])
            if blocks * budget.block + planes * budget.plane > budget.total:
                return False
        return True

    def _num_unfinished(self, g: int) -> int:
        """Blocks of running requests that are not full yet."""
        size = self._groups[g].block_size
        return sum(max(0, len(h.tables[g]) - h.num_computed // size) for h in self._holdings.values())

    def _lower(self, lacking: Sequence[Need], request_ids: Sequence[RequestId], cause: PlaneCause) -> bool:
        elastic = {e[0]: e for e in self._elastic}
        chosen: list[tuple[GroupCache, list[BlockId]]] = []
        for g, (body, first) in enumerate(lacking):
            if first or (body and g not in elastic):
                return False
            if body:
                group = self._groups[g]
                count = -(-body // group.pool.budget.plane)
                blocks = list(islice(self._candidates(elastic[g], request_ids), count))
                if len(blocks) < count:
                    return False
                chosen.append((group, blocks))
        for group, blocks in chosen:
            for block_id in blocks:
                self._drop(group, block_id, cause)
        return True

    def _candidates(self, elastic: _Elastic, request_ids: Sequence[RequestId]) -> Iterator[BlockId]:
        """Blocks of these requests that may lose their plane, in order, each once; none that others hold."""
        g, group, planes = elastic
        named = set(request_ids)
        others = (h.tables[g] for r, h in self._holdings.items() if r not in named)
        protected = set(chain.from_iterable(others))
        shared: dict[BlockId, None] = {}
        for request_id in request_ids:
            blocks = self._full_blocks(g, request_id)
            blocks = blocks[(blocks >= 0) & (blocks < len(planes.row_of))]
            ids = [BlockId(b) for b in blocks[planes.row_of[blocks] >= 0].tolist() if b not in protected]
            if len(blocks) and ids and ids[0] == blocks[0]:
                ids = [*ids[1:], ids[0]]  # the block of the attention sinks, or of a window's oldest keys
            for block_id in ids:
                if group.pool.ref_count(block_id) > 1:
                    shared[block_id] = None
                else:
                    yield block_id
        yield from shared

    def _full_blocks(self, g: int, request_id: RequestId) -> npt.NDArray[np.int32]:
        holding = self._holdings[request_id]
        num_full = holding.num_computed // self._groups[g].block_size
        return np.array(holding.tables[g][:num_full], dtype=np.int32)

    # --- reading

    def num_lowered(self, request_id: RequestId) -> int:
        """Blocks the request reads without their plane, over all groups."""
        holding, count = self._holdings[request_id], 0
        for g, group, planes in self._elastic:
            if group.pool.num_lowered:
                count += len(planes.lowered.intersection(holding.tables[g]))
        return count

    def note_reads(self, request_id: RequestId, num_tokens: int) -> int:
        """The request computes `num_tokens` in the coming step; returns the blocks it reads below nominal
        precision. If there are any it publishes nothing from now on, and leads nobody."""
        num_lowered = self.num_lowered(request_id)
        if num_lowered:
            self._taint(request_id)
            self._num_lowered_tokens += num_tokens
            self._num_lowered_reads += num_lowered * self._groups[0].block_size
        return num_lowered

    def is_private(self, request_id: RequestId) -> bool:
        """Whether what the request computes stays its own."""
        return self._holdings[request_id].is_private

    def _taint(self, request_id: RequestId) -> None:
        holding = self._holdings[request_id]
        if holding.is_private:
            return
        holding.is_private, holding.parent = True, None
        self._in_flight.leave(request_id, holding.hashes, holding.num_published, holding.num_led)

    # --- getting planes back

    def resting_of(self, blocks: Sequence[Iterable[int]]) -> list[int]:
        """Per group, how many of these blocks' planes rest in the host arena."""
        counts = [0] * len(self._groups)
        for g, _, planes in self._elastic:
            if planes.resting:
                counts[g] = sum(b in planes.resting for b in blocks[g])
        return counts

    def num_resting(self, request_id: RequestId) -> int:
        """Blocks of a running request whose plane rests."""
        return sum(self.resting_of(self._holdings[request_id].tables))

    def restore(self, request_id: RequestId, limit: int, *, reserve: float, cause: PlaneCause) -> int:
        """Bring back up to `limit` planes of a running request, oldest position first, evicting idle blocks
        but leaving a share of `reserve` available; returns how many came."""
        restored = 0
        for g, group, planes in self._elastic:
            table = self._holdings[request_id].tables[g] if planes.resting else ()
            for block_id in [BlockId(b) for b in table if b in planes.resting]:
                if restored == limit or not _has_room_for_plane(group, reserve):
                    break
                self._restore(group, block_id, cause)
                restored += 1
        return restored

    def restore_idle(self, limit: int, *, reserve: float) -> int:
        """Bring back up to `limit` planes of idle blocks, the last dropped first, evicting nobody."""
        restored = 0
        for _, group, planes in self._elastic:
            budget = group.pool.budget
            for block_id in reversed(list(planes.resting)):
                spare = budget.total - group.pool.spent - int(reserve * budget.total)
                if restored == limit or spare < budget.plane:
                    break
                if group.pool.is_idle(block_id):
                    self._restore(group, block_id, PlaneCause.RELIEF)
                    restored += 1
        return restored

    def _restore(self, group: GroupCache, block_id: BlockId, cause: PlaneCause) -> None:
        pool = group.pool
        while pool.spent + pool.budget.plane > pool.budget.total:
            if not pool.evict_idle():
                raise InvariantError("no room for a low plane; the caller must test for room first")
        pool.restore_plane(block_id, cause)
        self._causes[cause] += 1

    def lose(self, failed: Iterable[PlaneMove]) -> None:
        """The host arena failed at these moves of the coming step: the planes are gone. Whoever holds the
        blocks reads below nominal precision from this step on."""
        for move in failed:
            holders = [r for r, h in self._holdings.items() if move.block in h.tables[move.group]]
            pool = self._groups[move.group].pool
            is_full = any(move.block in self._full_blocks(move.group, r) for r in holders)
            if not is_full and not pool.is_idle(move.block):
                continue  # taken anew since: what it held does not matter any more
            pool.lose_plane(move.block)
            self._causes[PlaneCause.FAULT] += 1
            for request_id in holders:
                self._taint(request_id)

    # --- telling

    def take_moves(self) -> tuple[PlaneMove, ...]:
        """What has been decided about bytes since the last call; in order within each group."""
        moves = [planes.take_moves() for _, _, planes in self._elastic if planes.moves]
        return tuple(chain.from_iterable(moves))

    def rows_of(self, g: int) -> npt.NDArray[np.int32] | None:
        """Live view, int32 [body ids of group g]: block -> row of its low plane; None where planes stay."""
        planes = self._groups[g].pool.planes
        return None if planes is None else planes.row_of

    def free_places(self, g: int) -> tuple[list[BlockId], list[int]]:
        """Body ids and plane rows of group g that hold nothing."""
        pool = self._groups[g].pool
        return pool.free_ids(), [] if pool.planes is None else pool.planes.free_rows()

    def counters(self) -> PrecisionCounters:
        """Since construction."""
        planes = [planes for _, _, planes in self._elastic]
        return PrecisionCounters(
            dropped_planes=sum(p.num_dropped for p in planes),
            restored_planes=sum(p.num_restored for p in planes),
            lost_planes=sum(p.num_lost for p in planes),
            moved_planes=dict(self._causes),
            lowered_tokens=self._num_lowered_tokens,
            lowered_reads=self._num_lowered_reads,
        )

    def _drop(self, group: GroupCache, block_id: BlockId, cause: PlaneCause) -> None:
        group.pool.drop_plane(block_id, cause)
        self._causes[cause] += 1


def _has_room_for_plane(group: GroupCache, reserve: float) -> bool:
    pool = group.pool
    kept = (int(reserve * pool.size()) + group.promised) * pool.price()
    return pool.room() - kept >= pool.budget.plane
