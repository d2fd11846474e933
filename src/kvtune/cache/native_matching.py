"""`Matching` in one native call, for a cache of one group that sees the whole context."""

from __future__ import annotations

from collections.abc import Sequence

from kvtune.cache.block_hashes import BlockHashes
from kvtune.cache.group import GroupCache
from kvtune.cache.in_flight import InFlight
from kvtune.cache.matching import Matching
from kvtune.cache.native_pool import NativeInFlight, NativePool
from kvtune.cache.records import PrefixMatch
from kvtune.types import BlockHash, MissCause

__all__ = ["matching_of"]


class _NativeMatching(Matching):
    def __init__(
        self, group: GroupCache, pool: NativePool, in_flight: NativeInFlight, *, block_size: int
    ) -> None:
        super().__init__([group], in_flight, block_size=block_size)
        self._pool, self._leaders = pool, in_flight

    def match(self, hashes: Sequence[BlockHash], num_tokens: int, root: BlockHash) -> PrefixMatch:
        if not isinstance(hashes, BlockHashes):  # names of a trace
            return super().match(hashes, num_tokens, root)
        size, num = self._block_size, len(hashes)
        limit = (num_tokens - 1) // size
        blocks, found = self._pool.match(self._leaders, hashes, limit)
        boundary = found.run if found.run < limit else limit
        misses: dict[MissCause, int] = {}
        if found.num_seen:
            misses[MissCause.EVICTED] = found.num_seen * size
        if found.run + found.num_seen < num:
            misses[MissCause.NEVER_SEEN] = (num - found.run - found.num_seen) * size
        if boundary < found.run:  # the last token is always computed, and with it the rest of its block
            misses[MissCause.LAST_TOKEN] = size
        if num * size < num_tokens:
            misses[MissCause.PARTIAL_BLOCK] = num_tokens - num * size
        return PrefixMatch(
            num_tokens=boundary * size,
            blocks=(blocks if boundary == num else blocks[:boundary],),
            misses=misses,
            root=root,
            leader=self._leaders.request(found.leader),
            awaited=hashes[found.awaited] if found.leader else None,
            block_hashes=hashes,
        )


def matching_of(groups: Sequence[GroupCache], in_flight: InFlight, *, block_size: int) -> Matching:
    """The fastest one that serves these groups."""
    group, pool = groups[0], groups[0].pool
    is_whole = len(groups) == 1 and group.window is None
    if is_whole and isinstance(pool, NativePool) and isinstance(in_flight, NativeInFlight):
        return _NativeMatching(group, pool, in_flight, block_size=block_size)
    return Matching(groups, in_flight, block_size=block_size)
