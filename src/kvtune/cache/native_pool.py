"""`BlockPool`, index and blocks in flight in native code: the same verbs, many blocks a call.

For pools whose low planes stay and whose policy the library has; csrc/pool/ are the twins.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from ctypes import byref, c_int32, c_void_p
from dataclasses import replace
from typing import NamedTuple

from kvtune.cache.block_hashes import HASH_BYTES, BlockHashes, packed
from kvtune.cache.block_pool import BlockPool
from kvtune.cache.eviction import PolicyFactory
from kvtune.cache.in_flight import InFlight
from kvtune.cache.native import CacheLibrary, PoolCounts, cache_library, padded
from kvtune.cache.records import PoolUsage
from kvtune.cache.table import NULL_BLOCK, Need, Table
from kvtune.errors import HostError, InvariantError
from kvtune.spec import PoolBudget
from kvtune.types import BlockHash, BlockId, RequestId

__all__ = ["NativeInFlight", "NativeIndex", "NativePool", "pool_library"]


class Matched(NamedTuple):
    """Of the hashes given: `run` leading ones have blocks, `num_seen` behind them were here before; the first
    one without a block is computed by the `leader` (0: nobody), the last one of its run being `awaited`."""

    run: int
    num_seen: int
    leader: int
    awaited: int


_PUBLISHED = 1 << 31
_MOST_BLOCKS = 1 << 24
"""Of one pool: its tables, and the learned policies' memory of eleven times as many, count in 28 bits."""


def _address(block_ids: array[int]) -> int:
    return block_ids.buffer_info()[0]


class _Handle:
    """What the library made, given back with the object."""

    def __init__(self, library: CacheLibrary, kind: str, *arguments: int) -> None:
        self.value = c_void_p()
        self._free = getattr(library, f"{kind}_free")
        library.expect(getattr(library, f"{kind}_new")(*arguments, byref(self.value)))

    def __del__(self) -> None:
        if self.value.value is not None:
            self._free(self.value)


class NativeIndex:
    """The prefix index of a native pool, a `PrefixIndex`. Names of under 32 bytes come back with zeros."""

    def __init__(self, library: CacheLibrary, handle: c_void_p) -> None:
        self._library, self._handle = library, handle

    def find(self, block_hash: BlockHash) -> BlockId | None:
        block_id = self._library.index_find(self._handle, padded(block_hash))
        return None if block_id < 0 else BlockId(block_id)

    def insert(self, block_hash: BlockHash, block_id: BlockId) -> None:
        if not self._library.index_insert(self._handle, padded(block_hash), block_id):
            raise KeyError(block_hash)

    def evict(self, block_hash: BlockHash) -> None:
        if not self._library.index_evict(self._handle, padded(block_hash)):
            raise KeyError(block_hash)

    def forget(self, block_hash: BlockHash) -> None:
        if not self._library.index_forget(self._handle, padded(block_hash)):
            raise KeyError(block_hash)

    def was_evicted(self, block_hash: BlockHash) -> bool:
        return bool(self._library.index_was_evicted(self._handle, padded(block_hash)))

    def clear(self) -> None:
        self._library.index_clear(self._handle)

    def items(self) -> Iterator[tuple[BlockHash, BlockId]]:
        ids = Table("i", bytes(4 * len(self)))
        self._library.index_ids(self._handle, _address(ids))
        return ((self.hash_of(BlockId(i)), BlockId(i)) for i in ids)

    def hash_of(self, block_id: BlockId) -> BlockHash:
        """The name the block was inserted under last."""
        digest = array("B", bytes(HASH_BYTES))
        self._library.pool_digest(self._handle, block_id, _address(digest))
        return BlockHash(digest.tobytes())

    def __len__(self) -> int:
        return int(self._library.index_size(self._handle))


class NativePool(BlockPool):
    """Blocks of one group in native memory: 51 bytes a block, 99 with the learned policies, and what is
    remembered of evicted ones on top."""

    index: NativeIndex  # type: ignore[assignment]  # over its own memory

    def __init__(
        self,
        library: CacheLibrary,
        num_blocks: int,
        num_first_blocks: int,
        *,
        policy: str,
        max_evicted: int,
        budget: PoolBudget | None = None,
    ) -> None:
        """`policy`: one of `library.policies`; `budget`: what the body may spend, all its blocks if None."""
        self._library = library
        self._num_body, self._num_first = num_blocks, num_first_blocks
        self._planes = None
        self._budget = budget or PoolBudget(total=num_blocks)
        self._owner = _Handle(
            library, "pool", num_blocks, num_first_blocks, self._budget.total, max_evicted,
            library.policies.index(policy),
        )  # fmt: skip
        self._handle = self._owner.value
        self._matched = array("q", bytes(32))
        self.index = NativeIndex(library, self._handle)

    def counts(self, *, first: bool = False) -> PoolCounts:
        """Of the body, or of the first blocks."""
        counts = PoolCounts()
        self._library.pool_counts(self._handle, first, byref(counts))
        return counts

    def match(self, in_flight: NativeInFlight, hashes: BlockHashes, limit: int) -> tuple[Table[int], Matched]:
        """Blocks of the leading run of findable hashes, and what else a match wants to know; see there."""
        run, out = Table("i", (0,)) * len(hashes), self._matched
        self._library.pool_match(
            self._handle, in_flight.handle, hashes.address, hashes.start, len(run), limit, _address(run),
            _address(out),
        )  # fmt: skip
        return run, Matched(*out)

    @property
    def num_evicted(self) -> int:  # type: ignore[override]  # counted there
        return self.counts().evicted

    @property
    def num_published(self) -> int:  # type: ignore[override]
        return self.counts().published

    @property
    def num_duplicates(self) -> int:  # type: ignore[override]
        return self.counts().duplicates

    @property
    def has_first(self) -> bool:
        return self._num_first > 0

    @property
    def budget(self) -> PoolBudget:
        return self._budget

    def price(self, *, first: bool = False) -> int:
        return 1

    def worth(self, block_id: BlockId) -> int:
        return 1

    def _total(self, first: bool) -> int:
        return self._num_first if first else self._budget.total

    def _taken(self, counts: PoolCounts, first: bool) -> int:
        return (self._num_first if first else self._num_body) - counts.free

    def room(self, *, first: bool = False) -> int:
        counts = self.counts(first=first)
        return self._total(first) - self._taken(counts, first) + counts.idle

    def size(self, *, first: bool = False) -> int:
        return self._total(first)

    def usage(self, *, first: bool = False) -> PoolUsage:
        counts = self.counts(first=first)
        taken = self._taken(counts, first)
        free = max(0, self._total(first) - taken)
        available = max(0, self._total(first) - taken + counts.idle)
        return PoolUsage(total=taken + free, free=free, idle=counts.idle, available=available)

    def _state(self, block_id: int) -> int:
        return int(self._library.pool_state(self._handle, block_id))

    def ref_count(self, block_id: BlockId) -> int:
        return self._state(block_id) & ~_PUBLISHED

    def hash_of(self, block_id: BlockId) -> BlockHash | None:
        return self.index.hash_of(block_id) if self._state(block_id) & _PUBLISHED else None

    def is_idle(self, block_id: BlockId) -> bool:
        return self._state(block_id) == _PUBLISHED

    # --- looking

    def find_run(self, hashes: Sequence[BlockHash]) -> Table[int]:
        run = Table("i", (0,)) * len(hashes)
        found = packed(hashes)
        num = self._library.pool_find_run(self._handle, found.address, found.start, len(run), _address(run))
        return run if num == len(run) else run[:num]

    def last_gap(self, hashes: Sequence[BlockHash], start: int, end: int) -> int:
        found = packed(hashes)
        first = found.start
        return self._library.pool_last_gap(self._handle, found.address, first + start, first + end) - first

    def mark_seen(self, hashes: Sequence[BlockHash], seen: array[int]) -> None:
        found = packed(hashes)
        self._library.pool_mark_seen(self._handle, found.address, found.start, len(seen), _address(seen))

    def idle_if_held(self, block_ids: Table[int], hashes: Sequence[BlockHash]) -> Need | None:
        found, idle = packed(hashes), array("q", (0, 0))
        holds = self._library.pool_holds(
            self._handle, _address(block_ids), found.address, found.start, len(block_ids), _address(idle)
        )
        return (idle[0], idle[1]) if holds else None

    def num_idle(self, block_ids: Table[int]) -> Need:
        out = array("q", (0, 0))
        self._library.pool_num_idle(self._handle, _address(block_ids), len(block_ids), _address(out))
        return out[0], out[1]

    def released_worth(self, tables: Iterable[Table[int]]) -> Need:
        out, held = array("q", (0, 0)), Table("i")
        for table in tables:
            held.extend(table)
        self._library.pool_num_released(self._handle, _address(held), len(held), _address(out))
        return out[0], out[1]

    # --- taking and giving back

    def admit(self, block_ids: Table[int], hashes: Sequence[BlockHash]) -> None:
        found = packed(hashes)
        status = self._library.pool_admit(
            self._handle, _address(block_ids), len(block_ids), found.address, found.start, len(found)
        )
        self._library.expect(status)

    def take(self, num_blocks: int, *, first: bool = False) -> Table[int]:
        taken = Table("i", (0,)) * num_blocks
        self._library.expect(self._library.pool_take(self._handle, first, num_blocks, _address(taken)))
        return taken

    def incref(self, block_ids: Table[int]) -> None:
        status = self._library.pool_incref(self._handle, _address(block_ids), len(block_ids))
        self._library.expect(status)

    def decref(self, block_ids: Table[int]) -> None:
        status = self._library.pool_decref(self._handle, _address(block_ids), len(block_ids))
        self._library.expect(status)

    def publish(self, table: Table[int], hashes: Sequence[BlockHash], start: int, end: int) -> None:
        found = packed(hashes)
        status = self._library.pool_publish(
            self._handle, _address(table), found.address, found.start, start, end
        )
        self._library.expect(status)

    def publish_each(
        self, tables: Sequence[Table[int]], ats: Sequence[int], hashes: Sequence[BlockHash]
    ) -> list[int]:
        ids = Table("i", [table[at] for table, at in zip(tables, ats, strict=True)])
        own = ids.tobytes()
        parents = Table(
            "i", [table[at - 1] if at else NULL_BLOCK for table, at in zip(tables, ats, strict=True)]
        )
        found = packed(hashes)
        self._library.expect(
            self._library.pool_publish_each(
                self._handle, _address(ids), _address(parents), found.address, found.start, len(ids)
            )
        )
        if ids.tobytes() == own:
            return []
        changed = [i for i, (old, new) in enumerate(zip(Table("i", own), ids, strict=True)) if old != new]
        for i in changed:
            tables[i][ats[i]] = ids[i]
        return changed

    def forget(self, hashes: Iterable[BlockHash]) -> None:
        found = packed(hashes)
        self._library.expect(self._library.pool_forget(self._handle, found.address, found.start, len(found)))

    def unpublish_all(self) -> None:
        self._library.expect(self._library.pool_unpublish_all(self._handle))

    # --- memory pressure

    def set_budget(self, total: int) -> None:
        self._budget = replace(self._budget, total=total)
        self._library.expect(self._library.pool_set_budget(self._handle, total))

    @property
    def spent(self) -> int:
        return self._taken(self.counts(), False)

    @property
    def overspent(self) -> int:
        return max(0, self.spent - self._budget.total)

    def evict_idle(self) -> bool:
        has_evicted = c_int32()
        self._library.expect(self._library.pool_evict_idle(self._handle, byref(has_evicted)))
        return bool(has_evicted.value)

    def free_ids(self) -> list[BlockId]:
        ids = Table("i", bytes(4 * self.counts().free))
        self._library.pool_free_ids(self._handle, _address(ids))
        return [BlockId(i) for i in ids]

    def check(self, references: Counter[BlockId]) -> None:
        states = [self._state(i) for i in range(self._num_body + self._num_first)]
        published = {self.index.hash_of(BlockId(i)): i for i, s in enumerate(states) if s & _PUBLISHED}
        if dict(self.index.items()) != published:
            raise InvariantError("index and pool disagree about published blocks")
        for first in (False, True):
            begin, end = (self._num_body, len(states)) if first else (0, self._num_body)
            idle = sum(state == _PUBLISHED for state in states[begin:end])
            counts, free = self.counts(first=first), states[begin:end].count(0)
            if (counts.free, counts.idle) != (free, idle):
                raise InvariantError(
                    f"{counts.free} blocks are listed free and {counts.idle} idle, {free} and {idle} are"
                )
            victim = self._library.pool_victim(self._handle, first)
            if (victim < 0) != (idle == 0) or (idle and states[victim] != _PUBLISHED):
                raise InvariantError(f"victim {victim} is not idle")
        if self.overspent:
            raise InvariantError(f"{self.spent} spent of a budget of {self._budget.total}")
        free_ids = self.free_ids()
        if len(set(free_ids)) != len(free_ids) or any(states[i] for i in free_ids):
            raise InvariantError("free list is wrong")
        for i, state in enumerate(states):
            if state & ~_PUBLISHED != references[BlockId(i)]:
                raise InvariantError(
                    f"block {i}: ref_count {state & ~_PUBLISHED}, in {references[BlockId(i)]} tables"
                )


class NativeInFlight(InFlight):
    """The leaders in native memory, by number."""

    def __init__(self, library: CacheLibrary) -> None:
        self._library = library
        self._owner = _Handle(library, "in_flight")
        self._handle = self.handle = self._owner.value
        self._numbers: dict[RequestId, int] = {}  # of requests that led once and are not gone
        self._requests: dict[int, RequestId] = {}
        self._num_leaders = 0

    def lead(self, request_id: RequestId, hashes: Sequence[BlockHash], start: int) -> None:
        found = packed(hashes)
        num = len(found) - start
        if num <= 0:
            return
        number = self._numbers.get(request_id)
        if number is None:
            self._num_leaders += 1
            number = self._numbers[request_id] = self._num_leaders
            self._requests[number] = request_id
        self._library.expect(
            self._library.in_flight_lead(self._handle, number, found.address, found.start + start, num)
        )

    def leave(self, request_id: RequestId, hashes: Sequence[BlockHash], start: int, end: int) -> None:
        number = self._numbers.get(request_id)
        if number is not None:
            found = packed(hashes)
            self._library.in_flight_leave(
                self._handle, number, found.address, found.start + start, end - start
            )

    def gone(self, request_id: RequestId) -> None:
        number = self._numbers.pop(request_id, None)
        if number is not None:
            del self._requests[number]

    def request(self, number: int) -> RequestId | None:
        """The leader of this number, None for 0."""
        return self._requests.get(number)

    def leader(self, block_hash: BlockHash) -> RequestId | None:
        found = packed((block_hash,))
        return self._requests.get(self._library.in_flight_leader(self._handle, found.address, found.start))

    def awaited(self, missing: Sequence[BlockHash]) -> tuple[RequestId | None, BlockHash | None]:
        if not missing:
            return None, None
        found = packed(missing)
        number = self._library.in_flight_leader(self._handle, found.address, found.start)
        if not number:
            return None, None
        num = self._library.in_flight_run(self._handle, found.address, found.start, len(found))
        return self._requests[number], missing[num - 1]

    def clear(self) -> None:
        self._library.in_flight_clear(self._handle)

    def requests(self) -> set[RequestId]:
        num = self._library.in_flight_leaders(self._handle, None)
        numbers = array("q", bytes(8 * num))
        self._library.in_flight_leaders(self._handle, _address(numbers))
        return {self._requests.get(n, RequestId("")) for n in numbers}


def pool_library(
    policy: str | PolicyFactory,
    budgets: Iterable[PoolBudget | None],
    native: bool | None,
    *,
    most_blocks: int = 0,
) -> CacheLibrary | None:
    """The library if pools of this policy, these budgets and at most so many blocks are to be native.
    HostError where `native` is True and they cannot be."""
    if native is False:
        return None
    try:
        library = cache_library()
    except HostError:
        if native:
            raise
        return None
    reason = f"do not serve policy {policy!r}"
    if library is None:
        reason = "were not built"
    elif any(budget is not None and budget.plane for budget in budgets):
        reason = "do not serve dropped planes"
    elif most_blocks > _MOST_BLOCKS:
        reason = f"take up to {_MOST_BLOCKS} blocks, not {most_blocks}"
    elif isinstance(policy, str) and policy in library.policies:
        return library
    if native:
        raise HostError(f"native block pools {reason}; leave out native=True")
    return None
