"""KVCacheManager: the facade over pools, indexes and policies of all KV cache groups.

It owns the block tables. Slots are asked for before a step (`allocate`), declared computed after it
(`commit`: full blocks are published, blocks that left a window go idle), and given back by `free`.

::

    tokens   |<-- matched -->|<-- computed -->|<-- allocated -->|
    blocks   [ shared, published ][ published ][partial][ empty ]
                                               ▲ copied before writing when a fork shares it

Nothing here knows tensors: the engine and the simulator run the same manager.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from kvtune.cache.block_hashes import HASH_BYTES, joined, own_copy
from kvtune.cache.decoding import DecodingBlocks
from kvtune.cache.eviction import PolicyFactory
from kvtune.cache.group import GroupCache
from kvtune.cache.hashing import chain_hashes, root_hash, token_array
from kvtune.cache.holding import Holding, is_enough, needed_blocks, peak_needs, shared_block, shortfalls
from kvtune.cache.in_flight import InFlight
from kvtune.cache.matching import longest_match, miss_causes
from kvtune.cache.native_pool import NativeInFlight, pool_library
from kvtune.cache.precision import Precision
from kvtune.cache.records import Allocation, CacheStats, GroupUsage, PrefixMatch
from kvtune.cache.table import NULL_BLOCK, Table, null_blocks
from kvtune.errors import InvariantError, UsageError
from kvtune.spec import KVGroup, PoolBudget
from kvtune.types import BlockCopy, BlockHash, BlockId, BlockTable, MissCause, RequestId, TokenArray

__all__ = ["KVCacheManager"]

_NO_COPIES = Allocation()
Tokens = Sequence[int] | TokenArray


class KVCacheManager:
    """Paged KV cache bookkeeping with prefix reuse. Not thread-safe.

    `num_blocks[g]` body blocks for group g; `num_first_blocks[g]` > 0 gives block 0 of every sequence
    ids of its own behind them. Leaf-first eviction holds within the body and within the first blocks.
    Any `block_size` >= 1 works. Misuse (unknown request, stale match) raises InvariantError, input
    that cannot be right raises UsageError.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        num_blocks: Sequence[int],
        *,
        block_size: int,
        enable_prefix_caching: bool = True,
        policy: str | PolicyFactory = "guarded",
        fingerprint: bytes = b"",
        num_first_blocks: Sequence[int] | None = None,
        budgets: Sequence[PoolBudget] | None = None,
        num_resting: Sequence[int] | None = None,
        native: bool | None = None,
    ) -> None:
        """`budgets`: what the bodies may spend; without it their `num_blocks`. `num_resting`: per group, the
        low planes that may rest in the host arena. `native`: keep the pools in native code; None does where
        that was built and can serve these pools. HostError where True cannot be had."""
        firsts = list(num_first_blocks) if num_first_blocks is not None else [0] * len(groups)
        _check_sizes(groups, num_blocks, firsts, block_size)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._fingerprint = fingerprint
        self._library = pool_library(policy, budgets or (), native)
        self._groups = [
            GroupCache(
                group, n, f, block_size=block_size, policy=policy, budget=budget, num_resting=resting,
                library=self._library,
            )
            for group, n, f, budget, resting in zip(
                groups, num_blocks, firsts, budgets or [None] * len(groups), num_resting or [0] * len(groups),
                strict=True,
            )
        ]  # fmt: skip
        self._windowed = [g for g, group in enumerate(groups) if group.window is not None]
        self._holdings: dict[RequestId, Holding] = {}
        self._in_flight = InFlight() if self._library is None else NativeInFlight(self._library)
        self._stats = CacheStats()
        self.precision = Precision(self._groups, self._holdings, self._in_flight)
        """Which low planes are in the pools, and who reads below nominal precision."""
        self._decoding = DecodingBlocks(self._groups, self._holdings, self._library)
        self.commit_offsets = tuple(
            sorted({0, *((g.window - 1) % block_size for g in groups if g.window is not None)})
        )
        """Computed tokens, modulo the block size, at which `commit` publishes or releases a block."""
        self._no_blocks: tuple[Table[int], ...] = (Table("i"),) * len(groups)

    # --- looking

    def match(
        self,
        token_ids: Tokens,
        *,
        cache_salt: str = "",
        block_hashes: Sequence[BlockHash] | None = None,
    ) -> PrefixMatch:
        """The longest cached prefix that leaves at least one token to compute. No side effects.

        `block_hashes` of leading full blocks, known from an earlier match of these tokens (or of fewer of
        them) and this salt, save hashing them again.
        """
        num_tokens = len(token_ids)
        root = root_hash(self._fingerprint, cache_salt)
        if not self.enable_prefix_caching or not num_tokens:
            misses = {MissCause.DISABLED: num_tokens} if num_tokens else {}
            return PrefixMatch(num_tokens=0, blocks=self._no_blocks, misses=misses, root=root)
        hashes = self._continued(root, token_ids, block_hashes or ())
        limit = (num_tokens - 1) // self.block_size
        found = longest_match(self._groups, hashes, limit)
        leader, awaited = self._in_flight.awaited(hashes[found.boundary : limit])
        return PrefixMatch(
            num_tokens=found.boundary * self.block_size,
            blocks=found.blocks,
            misses=miss_causes(self._groups, hashes, found, num_tokens),
            leader=leader,
            awaited=awaited,
            root=root,
            block_hashes=hashes,
        )

    def _hash(self, parent: BlockHash, token_ids: Tokens) -> Sequence[BlockHash]:
        """Native pools take hashes of 32 bytes in one stretch; names of other lengths come from traces."""
        tokens = token_array(token_ids)
        if self._library is not None and len(parent) == HASH_BYTES:
            return self._library.hash_chain(parent, tokens, self.block_size)
        return tuple(chain_hashes(parent, tokens, self.block_size))

    def _continued(
        self, root: BlockHash, token_ids: Tokens, known: Sequence[BlockHash]
    ) -> Sequence[BlockHash]:
        """`known` hashes and those of the full blocks behind them."""
        num_full = len(token_ids) // self.block_size
        if len(known) > num_full:
            raise InvariantError(f"{len(known)} block hashes do not belong to {len(token_ids)} tokens")
        if not known:
            return self._hash(root, token_ids)
        if len(known) == num_full:
            return known
        return joined(known, self._hash(known[-1], token_ids[len(known) * self.block_size :]))

    def leader_of(self, block_hash: BlockHash) -> RequestId | None:
        """The request that is computing this block for the first time, None when nobody is."""
        return self._in_flight.leader(block_hash)

    def fits(self, num_tokens: int, budgets: Sequence[PoolBudget] | None = None) -> bool:
        """Whether a sequence this long could ever be held by an empty cache (of other budgets)."""
        pairs = zip(self._groups, budgets or [None] * len(self._groups), strict=True)
        return all(group.fits(num_tokens, budget) for group, budget in pairs)

    # --- taking and giving back

    def allocate(
        self,
        request_id: RequestId,
        num_tokens: int,
        *,
        match: PrefixMatch | None = None,
        token_ids: Tokens | None = None,
        cache_salt: str = "",
        reserve: float = 0.0,
        gate_tokens: int | None = None,
        lowered: bool = False,
    ) -> Allocation | None:
        """Make sure that positions below `num_tokens` have slots in every group.

        The first call of a request brings its `match` (it knows prompt and salt), or else the
        prompt's `token_ids` and salt: it becomes the leader of its uncached full prompt blocks.
        `reserve` is the share of each pool that must stay available afterwards. `gate_tokens` (first
        call) tests the room for that many tokens, blocks promised to others included, though only
        `num_tokens` are taken now: a chunked prefill is not admitted on its first chunk.
        Matched blocks whose plane rests must have room to get it back, unless `lowered`: then the request
        reads them as they are, and the gate counts on planes that can still be dropped.
        Returns None, and changes nothing, when there is no room.
        """
        holding = self._holdings.get(request_id)
        if holding is not None:
            if match is not None:
                raise InvariantError(f"request {request_id!r} holds blocks already; match comes first")
            return self._extend(holding, num_tokens, reserve)
        if match is None:
            match = self._no_match(token_ids, cache_salt)
        return self._admit(request_id, match, num_tokens, reserve, gate_tokens, lowered=lowered)

    def _no_match(self, token_ids: Tokens | None, cache_salt: str) -> PrefixMatch:
        root = root_hash(self._fingerprint, cache_salt)
        hashes: Sequence[BlockHash] = ()
        if token_ids is not None and self.enable_prefix_caching:
            hashes = self._hash(root, token_ids)
        return PrefixMatch(num_tokens=0, blocks=self._no_blocks, misses={}, root=root, block_hashes=hashes)

    def _admit(
        self,
        request_id: RequestId,
        match: PrefixMatch,
        num_tokens: int,
        reserve: float,
        gate_tokens: int | None,
        *,
        lowered: bool,
    ) -> Allocation | None:
        self._refuse_stale(match)
        holding = Holding(
            [Table("i", b) for b in match.blocks], match.root, own_copy(match.block_hashes), match.num_tokens
        )
        now = needs = needed_blocks(self._groups, holding, num_tokens)
        is_gated = gate_tokens is not None
        if gate_tokens is not None:
            peak, chunk = max(gate_tokens, num_tokens), num_tokens - match.num_tokens
            needs = peak_needs(self._groups, holding, needs, num_tokens=peak, chunk=chunk)
        if lowered:
            has_room = is_enough(shortfalls(self._groups, now, reserve, revived=match.blocks))
            has_room = has_room and (not is_gated or self.precision.would_fit(match, needs, now, reserve))
        else:
            has_room = is_enough(
                shortfalls(
                    self._groups, needs, reserve, revived=match.blocks, keep_promises=is_gated,
                    restored=self.precision.resting_of(match.blocks),
                )
            )  # fmt: skip
        if not has_room:
            return None
        holding.num_published = match.num_tokens // self.block_size
        for group, blocks in zip(self._groups, match.blocks, strict=True):
            group.pool.begin(match.block_hashes, holding.num_published)
            group.pool.incref(blocks)
        self._holdings[request_id] = holding
        holding.num_released = [g.first_visible(match.num_tokens) for g in self._groups]
        holding.promised = [body for body, _ in needs]
        for group, promised in zip(self._groups, holding.promised, strict=True):
            group.promised += promised
        holding.num_led = len(match.block_hashes)
        self._in_flight.lead(request_id, match.block_hashes[holding.num_published :])
        self._count_admission(match)
        self._grow(holding, num_tokens)
        return _NO_COPIES

    def _extend(self, holding: Holding, num_tokens: int, reserve: float) -> Allocation | None:
        if not holding.may_share_last and num_tokens <= len(holding.tables[0]) * self.block_size:
            return _NO_COPIES  # most decode steps: the block at hand has room
        needs = needed_blocks(self._groups, holding, num_tokens)
        if not any(body or first for body, first in needs):
            return _NO_COPIES
        if not is_enough(shortfalls(self._groups, needs, reserve)):
            return None
        copies = self._unshare(holding)
        self._grow(holding, num_tokens)
        return Allocation(copies=copies) if copies else _NO_COPIES

    def grow_each(self, request_ids: Sequence[RequestId], *, reserve: float) -> list[Table[int]] | None:
        """`allocate` of one more block for each of these requests, in this order: per group, the new blocks.

        For requests whose blocks are all in use and that share no partially computed block. `reserve`: of the
        last one; those before it need not leave more. None, and nothing changed, without room for all.
        """
        return self._decoding.take(request_ids, reserve)

    def has_room(
        self,
        request_id: RequestId,
        num_tokens: int,
        *,
        reserve: float = 0.0,
        without: Sequence[RequestId] = (),
    ) -> bool:
        """Whether `allocate` would succeed for a running request once the others in `without` left."""
        needs = needed_blocks(self._groups, self._holding(request_id), num_tokens)
        leaving = [self._holding(r) for r in without]
        return is_enough(shortfalls(self._groups, needs, reserve, leaving=leaving))

    def _unshare(self, holding: Holding) -> tuple[BlockCopy, ...]:
        """Copy-on-write: give the holding its own copy of a shared, partially computed block."""
        copies: list[BlockCopy] = []
        index = holding.num_computed // self.block_size
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
        if copies:
            self._stats = replace(self._stats, copied_blocks=self._stats.copied_blocks + len(copies))
        return tuple(copies)

    def _grow(self, holding: Holding, num_tokens: int) -> None:
        target = -(-num_tokens // self.block_size)
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

    def commit(self, request_id: RequestId, token_ids: Tokens, num_computed: int) -> None:
        """Positions below `num_computed` are computed: publish full blocks, release passed ones.

        `token_ids` are the sequence's tokens from position 0, at least `num_computed` of them.
        """
        holding = self._holding(request_id)
        capacity = len(holding.tables[0]) * self.block_size
        if not holding.num_computed <= num_computed <= min(capacity, len(token_ids)):
            raise InvariantError(
                f"request {request_id!r}: cannot commit {num_computed} tokens after {holding.num_computed}, "
                f"with {capacity} slots and {len(token_ids)} tokens"
            )
        if holding.may_share_last:
            self._refuse_shared_write(request_id, holding, num_computed)
        holding.num_computed = num_computed
        num_full = num_computed // self.block_size
        if num_full > holding.num_published:
            holding.may_share_last = False  # what a fork could share is full
            if self.enable_prefix_caching and not holding.is_private:
                self._publish(request_id, holding, token_ids, num_full)
            holding.num_published = num_full
        for g in self._windowed:
            self._release_passed(g, holding)
        holding.commit_at = self._next_commit(holding)

    @property
    def commits_at_blocks(self) -> bool:
        """Whether full blocks are all that a commit has to see to."""
        return self.enable_prefix_caching and not self._windowed

    def commit_blocks(self, request_ids: Sequence[RequestId], blocks: TokenArray) -> list[int] | None:
        """`commit` for each of these requests, in this order, where each has just filled its last block.

        `blocks` int32 [len(request_ids), block_size]: their tokens. Returns the places of those whose block
        tables changed. None, and nothing done, unless they are all alike: then call `commit`.
        """
        return self._decoding.publish(request_ids, blocks)

    def advance(self, request_id: RequestId, num_computed: int) -> bool:
        """A `commit` that only counts tokens: False, and nothing done, where it would do more."""
        holding = self._holding(request_id)
        if not holding.num_computed <= num_computed < holding.commit_at:
            return False
        holding.num_computed = num_computed
        return True

    def _next_commit(self, holding: Holding) -> int:
        """At fewer computed tokens nothing is published, released or written to a shared block, and all have
        slots."""
        if holding.may_share_last:
            return 0
        size, computed = self.block_size, holding.num_computed
        commit_at = min((computed // size + 1) * size, len(holding.tables[0]) * size + 1)
        for g in self._windowed:
            point = next(iter(self._groups[g].release_points(computed, computed + size)), commit_at)
            commit_at = min(commit_at, point)
        return commit_at

    def num_slots(self, request_id: RequestId) -> int:
        """Tokens for which a running request can be given slots without asking: nobody else writes there."""
        holding = self._holding(request_id)
        return 0 if holding.may_share_last else len(holding.tables[0]) * self.block_size

    def may_share_last(self, request_id: RequestId) -> bool:
        """Whether a fork may hold the request's partially computed block too."""
        return self._holding(request_id).may_share_last

    def growth_points(self, start: int, end: int) -> range:
        """Lengths in (start, end] at which a sequence with `start` tokens computed needs a new block."""
        size = self.block_size
        return range(-(-start // size) * size + 1, end + 1, size)

    def commit_points(self, start: int, end: int) -> list[int]:
        """Numbers of computed tokens in (start, end] at which `commit` publishes or releases a block."""
        size = self.block_size
        points = set(range((start // size + 1) * size, end + 1, size))
        for g in self._windowed:
            points.update(self._groups[g].release_points(start, end))
        return sorted(points)

    def _refuse_shared_write(self, request_id: RequestId, holding: Holding, num_computed: int) -> None:
        if num_computed == holding.num_computed:
            return
        for group, table in zip(self._groups, holding.tables, strict=True):
            if shared_block(group, holding, table) is not None:
                raise InvariantError(f"request {request_id!r} wrote a shared block; allocate after a fork")

    def _publish(self, request_id: RequestId, holding: Holding, token_ids: Tokens, num_full: int) -> None:
        self._extend_hashes(holding, token_ids, num_full)
        start = holding.num_published
        holding.snapshot = None  # a second copy gives way to the first one
        for group, table in zip(self._groups, holding.tables, strict=True):
            group.pool.publish(table, holding.hashes, start, num_full)
        if start < holding.num_led:
            self._in_flight.leave(request_id, holding.hashes[start : min(num_full, holding.num_led)])

    def _extend_hashes(self, holding: Holding, token_ids: Tokens, num_full: int) -> None:
        known = len(holding.hashes)
        holding.parent = None
        if num_full > known:
            parent = holding.hashes[-1] if known else holding.root
            holding.hashes.extend(
                self._hash(parent, token_ids[known * self.block_size : num_full * self.block_size])
            )

    def _release_passed(self, g: int, holding: Holding) -> None:
        visible = min(self._groups[g].first_visible(holding.num_computed), len(holding.tables[g]))
        start = holding.num_released[g]
        if visible > start:
            table = holding.tables[g]
            holding.snapshot = None
            self._groups[g].pool.decref(table[start:visible])
            table[start:visible] = null_blocks(visible - start)
            holding.num_released[g] = visible

    def fork(self, parent_id: RequestId, child_id: RequestId) -> None:
        """The child shares the parent's computed blocks; whoever writes a shared block copies it.

        Slots allocated before the fork do not count for it: both allocate again before they write.
        """
        parent = self._holding(parent_id)
        if child_id in self._holdings:
            raise InvariantError(f"request {child_id!r} exists already")
        num_blocks = -(-parent.num_computed // self.block_size)
        child = Holding(
            [t[:num_blocks] for t in parent.tables], parent.root, own_copy(parent.hashes), parent.num_computed
        )
        child.num_published = parent.num_published
        child.num_released = [min(n, num_blocks) for n in parent.num_released]
        child.is_private = parent.is_private
        child.may_share_last = parent.may_share_last = True
        parent.commit_at, parent.parent = 0, None
        for group, table in zip(self._groups, child.tables, strict=True):
            group.pool.incref(table)
        self._holdings[child_id] = child

    def free(self, request_id: RequestId) -> None:
        """Give everything back, deepest block first, so that children leave before parents."""
        holding = self._holding(request_id)
        del self._holdings[request_id]
        for g, (group, table) in enumerate(zip(self._groups, holding.tables, strict=True)):
            group.pool.decref(table[::-1])
            group.promised -= holding.promised[g]
        if holding.num_published < holding.num_led:
            self._in_flight.leave(request_id, holding.hashes[holding.num_published : holding.num_led])
        self._in_flight.gone(request_id)

    def forget(self, block_hashes: Iterable[BlockHash]) -> None:
        """Free the idle blocks with these contents: for content that its owner will not ask for again.

        Blocks somebody holds stay. Forget no block without its descendants: they could never be hit.
        """
        hashes = block_hashes if isinstance(block_hashes, Sequence) else tuple(block_hashes)
        for group in self._groups:
            group.pool.forget(hashes)

    def reset_prefix_cache(self) -> None:
        """Forget all content. Running requests keep their blocks and publish nothing any more."""
        for group in self._groups:
            group.pool.unpublish_all()
        self._in_flight.clear()
        for holding in self._holdings.values():
            holding.is_private, holding.parent = True, None

    # --- telling

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def request_ids(self) -> tuple[RequestId, ...]:
        """The requests that hold blocks, in order of admission."""
        return tuple(self._holdings)

    def block_tables(self, request_id: RequestId) -> tuple[BlockTable, ...]:
        """One read-only int32 array per group: block index -> block id, -1 where the window has passed. The
        same arrays as long as nothing changes."""
        holding = self._holding(request_id)
        if holding.snapshot is None:
            holding.snapshot = tuple(_frozen(table) for table in holding.tables)
        return holding.snapshot

    def held_blocks(self, request_id: RequestId) -> tuple[int, ...]:
        """Per group, the blocks a request holds, those it shares included."""
        holding = self._holding(request_id)
        pairs = zip(holding.tables, holding.num_released, strict=True)
        return tuple(len(table) - num_released for table, num_released in pairs)

    def held_by_others(self, match: PrefixMatch) -> tuple[int, ...]:
        """Per group, the matched blocks that running requests hold at this moment."""
        return tuple(
            len(blocks) - blocks.count(NULL_BLOCK) - sum(group.pool.num_idle(blocks))
            for group, blocks in zip(self._groups, match.blocks, strict=True)
        )

    def window_blocks(self, group: int) -> int | None:
        """Most blocks a decoding sequence holds in a sliding group; None where all stay."""
        window = self._groups[group].window
        return None if window is None else -(-(window - 1) // self.block_size) + 1

    def usage(self) -> tuple[GroupUsage, ...]:
        return tuple(group.usage() for group in self._groups)

    def stats(self) -> CacheStats:
        pools = [group.pool for group in self._groups]
        return replace(
            self._stats,
            **self.precision.counters(),
            published_blocks=sum(p.num_published for p in pools),
            evicted_blocks=sum(p.num_evicted for p in pools),
            duplicate_blocks=sum(p.num_duplicates for p in pools),
        )

    def check(self) -> None:
        """Assert the global invariant; InvariantError says what broke."""
        for g, group in enumerate(self._groups):
            tables = [holding.tables[g] for holding in self._holdings.values()]
            group.pool.check(Counter(BlockId(b) for table in tables for b in table if b >= 0))
            if group.promised != sum(r.promised[g] for r in self._holdings.values()):
                raise InvariantError(f"group {g}: promised blocks do not add up")
            self._check_sharing(g)
        if not self._in_flight.requests() <= set(self._holdings):
            raise InvariantError("a request that is gone is still the leader of some block")

    def _check_sharing(self, g: int) -> None:
        """A block in two tables sits at one index of both and holds tokens both have computed."""
        seen: dict[int, int] = {}
        pool = self._groups[g].pool
        for request_id, holding in self._holdings.items():
            for index, block_id in enumerate(holding.tables[g]):
                if block_id < 0:
                    continue
                if seen.setdefault(block_id, index) != index:
                    raise InvariantError(f"block {block_id} sits at two indices of sequences")
                is_used = index * self.block_size < holding.num_computed
                if pool.ref_count(BlockId(block_id)) > 1 and not is_used:
                    raise InvariantError(
                        f"block {block_id} is shared, but {request_id!r} has yet to write it"
                    )

    # --- inside

    def _holding(self, request_id: RequestId) -> Holding:
        try:
            return self._holdings[request_id]
        except KeyError:
            raise InvariantError(f"request {request_id!r} holds no blocks") from None

    def _refuse_stale(self, match: PrefixMatch) -> None:
        for group, blocks in zip(self._groups, match.blocks, strict=True):
            if not group.pool.holds(blocks, match.block_hashes):
                raise InvariantError("the cache changed since this match; match again")

    def _count_admission(self, match: PrefixMatch) -> None:
        stats = self._stats
        misses = Counter(stats.misses)
        misses.update(match.misses)
        missed = sum(match.misses.values())
        self._stats = replace(
            stats,
            queried_tokens=stats.queried_tokens + match.num_tokens + missed,
            hit_tokens=stats.hit_tokens + match.num_tokens,
            misses=dict(misses),
        )


def _frozen(table: Table[int]) -> BlockTable:
    copy: BlockTable = np.array(table, dtype=np.int32)
    copy.flags.writeable = False
    return copy


def _check_sizes(
    groups: Sequence[KVGroup], num_blocks: Sequence[int], firsts: Sequence[int], block_size: int
) -> None:
    if not groups or not len(groups) == len(num_blocks) == len(firsts):
        raise UsageError(
            f"{len(groups)} groups need as many pool sizes, found {len(num_blocks)}, {len(firsts)}"
        )
    if block_size < 1:
        raise UsageError(f"block size must be at least 1 token, found {block_size}")
    if min(num_blocks) < 1 or min(firsts) < 0:
        raise UsageError(
            f"every group needs at least one block, found {list(num_blocks)}; give more KV budget"
        )
