"""What becomes of computed tokens: full blocks are published, blocks that left a window go idle."""

from __future__ import annotations

from collections.abc import Sequence

from kvtune.cache.group import GroupCache
from kvtune.cache.holding import Holding, Holdings, shared_block
from kvtune.cache.in_flight import InFlight
from kvtune.cache.naming import BlockNames, Tokens
from kvtune.cache.table import null_blocks
from kvtune.errors import InvariantError
from kvtune.types import BlockHash, RequestId, TokenArray

__all__ = ["Publishing"]


class Publishing:
    """The half of `KVCacheManager` that follows a step; its verbs are described there."""

    def __init__(
        self,
        groups: Sequence[GroupCache],
        holdings: Holdings,
        in_flight: InFlight,
        names: BlockNames,
        *,
        block_size: int,
        is_caching: bool,
    ) -> None:
        self._groups = groups
        self._holdings = holdings
        self._in_flight = in_flight
        self._names = names
        self._block_size = block_size
        self._is_caching = is_caching
        self._windowed = [g for g, group in enumerate(groups) if group.window is not None]
        windows = [group.window for group in groups if group.window is not None]
        self.offsets = tuple(sorted({0, *((window - 1) % block_size for window in windows)}))

    @property
    def is_at_blocks(self) -> bool:
        """Whether full blocks are all that a commit has to see to."""
        return self._is_caching and not self._windowed

    def points(self, start: int, end: int) -> list[int]:
        """Numbers of computed tokens in (start, end] at which `commit` publishes or releases a block."""
        size = self._block_size
        points = set(range((start // size + 1) * size, end + 1, size))
        for g in self._windowed:
            points.update(self._groups[g].release_points(start, end))
        return sorted(points)

    def commit(self, request_id: RequestId, token_ids: Tokens, num_computed: int) -> None:
        holding = self._holdings[request_id]
        capacity = len(holding.tables[0]) * self._block_size
        if not holding.num_computed <= num_computed <= min(capacity, len(token_ids)):
            raise InvariantError(
                f"request {request_id!r}: cannot commit {num_computed} tokens after {holding.num_computed}, "
                f"with {capacity} slots and {len(token_ids)} tokens"
            )
        if holding.may_share_last:
            self._refuse_shared_write(request_id, holding, num_computed)
        holding.num_computed = num_computed
        num_full = num_computed // self._block_size
        if num_full > holding.num_published:
            holding.may_share_last = False  # what a fork could share is full
            if self._is_caching and not holding.is_private:
                self._publish(request_id, holding, token_ids, num_full)
            holding.num_published = num_full
        for g in self._windowed:
            self._release_passed(g, holding)
        holding.commit_at = self._next_commit(holding)

    def commit_blocks(self, request_ids: Sequence[RequestId], blocks: TokenArray) -> list[int] | None:
        holdings = [self._holdings[r] for r in request_ids]
        parents = [h.parent or _parent(h) for h in holdings]
        if None in parents:
            return None
        new = self._names.children([p for p in parents if p is not None], blocks)
        ats = [h.num_published for h in holdings]
        changed: set[int] = set()
        for g, group in enumerate(self._groups):
            changed.update(group.pool.publish_each([h.tables[g] for h in holdings], ats, new))
        size = self._block_size
        for holding, at, block_hash in zip(holdings, ats, new, strict=True):
            holding.hashes.append(block_hash)
            holding.parent = block_hash
            holding.num_published = at + 1
            holding.num_computed = at * size + size
            holding.commit_at = at * size + size + 1  # there are no more slots
        for i in changed:
            holdings[i].snapshot = None
        return sorted(changed)

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
            self._in_flight.leave(request_id, holding.hashes, start, min(num_full, holding.num_led))

    def _extend_hashes(self, holding: Holding, token_ids: Tokens, num_full: int) -> None:
        known = len(holding.hashes)
        holding.parent = None
        if num_full > known:
            parent = holding.hashes[-1] if known else holding.root
            holding.hashes.extend(
                self._names.chain(parent, token_ids[known * self._block_size : num_full * self._block_size])
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

    def _next_commit(self, holding: Holding) -> int:
        """At fewer computed tokens nothing is published, released or written to a shared block, and all have
        slots."""
        if holding.may_share_last:
            return 0
        size, computed = self._block_size, holding.num_computed
        commit_at = min((computed // size + 1) * size, len(holding.tables[0]) * size + 1)
        for g in self._windowed:
            point = next(iter(self._groups[g].release_points(computed, computed + size)), commit_at)
            commit_at = min(commit_at, point)
        return commit_at


def _parent(holding: Holding) -> BlockHash | None:
    """Of the next block; None where more than its content is to be seen to."""
    hashes, num_published = holding.hashes, holding.num_published
    if holding.is_private or holding.may_share_last or len(hashes) != num_published:
        return None
    if len(holding.tables[0]) != num_published + 1:
        return None
    return hashes[-1] if num_published else holding.root
