"""Slots for tokens yet to be computed: matched blocks are shared, new ones taken, shared ones copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvtune.cache.block_hashes import own_copy
from kvtune.cache.group import GroupCache
from kvtune.cache.holding import (
    Holding,
    Holdings,
    is_enough,
    needed_blocks,
    peak_needs,
    shared_block,
    shortfalls,
)
from kvtune.cache.in_flight import InFlight
from kvtune.cache.precision import Precision
from kvtune.cache.records import Allocation, PrefixMatch
from kvtune.cache.table import Need, Table
from kvtune.errors import InvariantError
from kvtune.types import BlockCopy, BlockId, MissCause, RequestId

__all__ = ["Allocating"]

_NO_COPIES = Allocation()


class Allocating:
    """The half of `KVCacheManager` that comes before a step; its verbs are described there."""

    def __init__(
        self,
        groups: Sequence[GroupCache],
        holdings: Holdings,
        in_flight: InFlight,
        precision: Precision,
        *,
        block_size: int,
    ) -> None:
        self._groups = groups
        self._holdings = holdings
        self._in_flight = in_flight
        self._precision = precision
        self._block_size = block_size
        self.queried_tokens = self.hit_tokens = self.copied_blocks = 0
        self.misses: Counter[MissCause] = Counter()

    def admit(
        self,
        request_id: RequestId,
        match: PrefixMatch,
        num_tokens: int,
        reserve: float,
        *,
        gate_tokens: int | None,
        lowered: bool,
    ) -> Allocation | None:
        idle = self._idle_worth(match)
        holding = Holding(
            [blocks[:] for blocks in match.blocks], match.root, own_copy(match.block_hashes), match.num_tokens
        )
        now = needs = needed_blocks(self._groups, holding, num_tokens)
        is_gated = gate_tokens is not None
        if gate_tokens is not None:
            peak, chunk = max(gate_tokens, num_tokens), num_tokens - match.num_tokens
            needs = peak_needs(self._groups, holding, needs, num_tokens=peak, chunk=chunk)
        if lowered:
            has_room = is_enough(shortfalls(self._groups, now, reserve, revived=idle))
            has_room = has_room and (not is_gated or self._precision.would_fit(match, needs, now, reserve))
        else:
            has_room = is_enough(
                shortfalls(
                    self._groups, needs, reserve, revived=idle, keep_promises=is_gated,
                    restored=self._precision.resting_of(match.blocks),
                )
            )  # fmt: skip
        if not has_room:
            return None
        holding.num_published = match.num_tokens // self._block_size
        for group, blocks in zip(self._groups, match.blocks, strict=True):
            group.pool.admit(blocks, match.block_hashes)
        self._holdings[request_id] = holding
        holding.num_released = [g.first_visible(match.num_tokens) for g in self._groups]
        holding.promised = [body for body, _ in needs]
        for group, promised in zip(self._groups, holding.promised, strict=True):
            group.promised += promised
        holding.num_led = len(match.block_hashes)
        self._in_flight.lead(request_id, match.block_hashes, holding.num_published)
        self._count(match)
        self._grow(holding, num_tokens)
        return _NO_COPIES

    def extend(self, holding: Holding, num_tokens: int, reserve: float) -> Allocation | None:
        if not holding.may_share_last and num_tokens <= len(holding.tables[0]) * self._block_size:
            return _NO_COPIES  # most decode steps: the block at hand has room
        needs = needed_blocks(self._groups, holding, num_tokens)
        if not any(body or first for body, first in needs):
            return _NO_COPIES
        if not is_enough(shortfalls(self._groups, needs, reserve)):
            return None
        copies = self._unshare(holding)
        self._grow(holding, num_tokens)
        return Allocation(copies=copies) if copies else _NO_COPIES

    def extend_each(self, request_ids: Sequence[RequestId], reserve: float) -> list[Table[int]] | None:
        num = len(request_ids)
        if not is_enough(shortfalls(self._groups, [(num, 0)] * len(self._groups), reserve)):
            return None
        holdings = [self._holdings[r] for r in request_ids]
        taken: list[Table[int]] = []
        for g, group in enumerate(self._groups):
            new = group.pool.take(num)
            for holding, block_id in zip(holdings, new, strict=True):
                holding.tables[g].append(block_id)
                if holding.promised[g]:
                    holding.promised[g] -= 1
                    group.promised -= 1
            taken.append(new)
        for holding in holdings:
            holding.snapshot = None
        return taken

    def has_room(
        self, request_id: RequestId, num_tokens: int, reserve: float, without: Sequence[RequestId]
    ) -> bool:
        needs = needed_blocks(self._groups, self._holdings[request_id], num_tokens)
        leaving = [self._holdings[r] for r in without]
        return is_enough(shortfalls(self._groups, needs, reserve, leaving=leaving))

    def _unshare(self, holding: Holding) -> tuple[BlockCopy, ...]:
        """Copy-on-write: give the holding its own copy of a shared, partially computed block."""
        copies: list[BlockCopy] = []
        index = holding.num_computed // self._block_size
        holding.snapshot = None
        for g, (group, table) in enumerate(zip(self._groups, holding.tables, strict=True)):
            shared = shared_block(group, holding, table)
            if shared is None:
                continue
            copy = BlockId(group.pool.take(1, first=group.pool.is_first(shared))[0])
            src_row, dst_row = group.pool.row(shared), group.pool.row(copy)
            group.pool.decref(Table("i", (shared,)))
            table[index] = copy
            copies.append(BlockCopy(group=g, src=shared, dst=copy, src_row=src_row, dst_row=dst_row))
        self.copied_blocks += len(copies)
        return tuple(copies)

    def _grow(self, holding: Holding, num_tokens: int) -> None:
        target = -(-num_tokens // self._block_size)
        holding.snapshot = None
        for g, (group, table) in enumerate(zip(self._groups, holding.tables, strict=True)):
            if target > 0 and not len(table) and group.pool.has_first:
                table.extend(group.pool.take(1, first=True))
            num_new = max(0, target - len(table))
            drawn = min(holding.promised[g], num_new)
            holding.promised[g] -= drawn
            group.promised -= drawn
            if num_new:
                table.extend(group.pool.take(num_new))

    def _idle_worth(self, match: PrefixMatch) -> list[Need]:
        """Per group, what the idle ones of the matched blocks cost."""
        worth: list[Need] = []
        for group, blocks in zip(self._groups, match.blocks, strict=True):
            idle = group.pool.idle_if_held(blocks, match.block_hashes)
            if idle is None:
                raise InvariantError("the cache changed since this match; match again")
            worth.append(idle)
        return worth

    def _count(self, match: PrefixMatch) -> None:
        for cause, num_tokens in match.misses.items():
            self.misses[cause] += num_tokens
            self.queried_tokens += num_tokens
        self.queried_tokens += match.num_tokens
        self.hit_tokens += match.num_tokens
