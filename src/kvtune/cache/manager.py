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

import numpy as np

from kvtune.cache.allocating import Allocating
from kvtune.cache.block_hashes import own_copy
from kvtune.cache.eviction import PolicyFactory
from kvtune.cache.group import GroupCache
from kvtune.cache.holding import Holding, Holdings
from kvtune.cache.in_flight import InFlight
from kvtune.cache.naming import BlockNames, Tokens
from kvtune.cache.native_matching import matching_of
from kvtune.cache.native_pool import NativeInFlight, pool_library
from kvtune.cache.precision import Precision
from kvtune.cache.publishing import Publishing
from kvtune.cache.records import Allocation, CacheStats, GroupUsage, PrefixMatch
from kvtune.cache.table import NULL_BLOCK, Table
from kvtune.errors import InvariantError, UsageError
from kvtune.spec import KVGroup, PoolBudget
from kvtune.types import BlockHash, BlockId, BlockTable, MissCause, RequestId, TokenArray

__all__ = ["KVCacheManager"]


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
        most_blocks = max(map(sum, zip(num_blocks, firsts, strict=True)))
        library = pool_library(policy, budgets or (), native, most_blocks=most_blocks)
        self._names = BlockNames(library, block_size=block_size, fingerprint=fingerprint)
        self._groups = [
            GroupCache(
                group, n, f, block_size=block_size, policy=policy, budget=budget, num_resting=resting,
                library=library,
            )
            for group, n, f, budget, resting in zip(
                groups, num_blocks, firsts, budgets or [None] * len(groups), num_resting or [0] * len(groups),
                strict=True,
            )
        ]  # fmt: skip
        self._holdings = Holdings()
        self._in_flight = InFlight() if library is None else NativeInFlight(library)
        self._matching = matching_of(self._groups, self._in_flight, block_size=block_size)
        self.precision = Precision(self._groups, self._holdings, self._in_flight)
        """Which low planes are in the pools, and who reads below nominal precision."""
        self._allocating = Allocating(
            self._groups, self._holdings, self._in_flight, self.precision, block_size=block_size
        )
        self._publishing = Publishing(
            self._groups, self._holdings, self._in_flight, self._names, block_size=block_size,
            is_caching=enable_prefix_caching,
        )  # fmt: skip
        self.commit_offsets = self._publishing.offsets
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
        root = self._names.root(cache_salt)
        if not self.enable_prefix_caching or not num_tokens:
            misses = {MissCause.DISABLED: num_tokens} if num_tokens else {}
            return PrefixMatch(num_tokens=0, blocks=self._no_blocks, misses=misses, root=root)
        hashes = self._names.continued(root, token_ids, block_hashes or ())
        return self._matching.match(hashes, num_tokens, root)

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
            return self._allocating.extend(holding, num_tokens, reserve)
        if match is None:
            match = self._no_match(token_ids, cache_salt)
        return self._allocating.admit(
            request_id, match, num_tokens, reserve, gate_tokens=gate_tokens, lowered=lowered
        )

    def _no_match(self, token_ids: Tokens | None, cache_salt: str) -> PrefixMatch:
        root = self._names.root(cache_salt)
        hashes: Sequence[BlockHash] = ()
        if token_ids is not None and self.enable_prefix_caching:
            hashes = self._names.chain(root, token_ids)
        return PrefixMatch(num_tokens=0, blocks=self._no_blocks, misses={}, root=root, block_hashes=hashes)

    def grow_each(self, request_ids: Sequence[RequestId], *, reserve: float) -> list[Table[int]] | None:
        """`allocate` of one more block for each of these requests, in this order: per group, the new blocks.

        For requests whose blocks are all in use and that share no partially computed block. `reserve`: of the
        last one; those before it need not leave more. None, and nothing changed, without room for all.
        """
        return self._allocating.extend_each(request_ids, reserve)

    def has_room(
        self,
        request_id: RequestId,
        num_tokens: int,
        *,
        reserve: float = 0.0,
        without: Sequence[RequestId] = (),
    ) -> bool:
        """Whether `allocate` would succeed for a running request once the others in `without` left."""
        return self._allocating.has_room(request_id, num_tokens, reserve, without)

    def commit(self, request_id: RequestId, token_ids: Tokens, num_computed: int) -> None:
        """Positions below `num_computed` are computed: publish full blocks, release passed ones.

        `token_ids` are the sequence's tokens from position 0, at least `num_computed` of them.
        """
        self._publishing.commit(request_id, token_ids, num_computed)

    @property
    def commits_at_blocks(self) -> bool:
        """Whether full blocks are all that a commit has to see to."""
        return self._publishing.is_at_blocks

    def commit_blocks(self, request_ids: Sequence[RequestId], blocks: TokenArray) -> list[int] | None:
        """`commit` for each of these requests, in this order, where each has just filled its last block.

        `blocks` int32 [len(request_ids), block_size]: their tokens. Returns the places of those whose block
        tables changed. None, and nothing done, unless they are all alike: then call `commit`.
        """
        return self._publishing.commit_blocks(request_ids, blocks)

    def advance(self, request_id: RequestId, num_computed: int) -> bool:
        """A `commit` that only counts tokens: False, and nothing done, where it would do more."""
        holding = self._holdings[request_id]
        if not holding.num_computed <= num_computed < holding.commit_at:
            return False
        holding.num_computed = num_computed
        return True

    def num_slots(self, request_id: RequestId) -> int:
        """Tokens for which a running request can be given slots without asking: nobody else writes there."""
        holding = self._holdings[request_id]
        return 0 if holding.may_share_last else len(holding.tables[0]) * self.block_size

    def may_share_last(self, request_id: RequestId) -> bool:
        """Whether a fork may hold the request's partially computed block too."""
        return self._holdings[request_id].may_share_last

    def growth_points(self, start: int, end: int) -> range:
        """Lengths in (start, end] at which a sequence with `start` tokens computed needs a new block."""
        size = self.block_size
        return range(-(-start // size) * size + 1, end + 1, size)

    def commit_points(self, start: int, end: int) -> list[int]:
        """Numbers of computed tokens in (start, end] at which `commit` publishes or releases a block."""
        return self._publishing.points(start, end)

    def fork(self, parent_id: RequestId, child_id: RequestId) -> None:
        """The child shares the parent's computed blocks; whoever writes a shared block copies it.

        Slots allocated before the fork do not count for it: both allocate again before they write.
        """
        parent = self._holdings[parent_id]
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
        holding = self._holdings[request_id]
        del self._holdings[request_id]
        for g, (group, table) in enumerate(zip(self._groups, holding.tables, strict=True)):
            group.pool.decref(table[::-1])
            group.promised -= holding.promised[g]
        if holding.num_published < holding.num_led:
            self._in_flight.leave(request_id, holding.hashes, holding.num_published, holding.num_led)
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
        holding = self._holdings[request_id]
        if holding.snapshot is None:
            holding.snapshot = tuple(_frozen(table) for table in holding.tables)
        return holding.snapshot

    def held_blocks(self, request_id: RequestId) -> tuple[int, ...]:
        """Per group, the blocks a request holds, those it shares included."""
        holding = self._holdings[request_id]
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
        counts = self._allocating
        return CacheStats(
            queried_tokens=counts.queried_tokens,
            hit_tokens=counts.hit_tokens,
            misses=dict(counts.misses),
            copied_blocks=counts.copied_blocks,
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
