"""The `Matching` of a cache: one native call where its only group sees the whole context and is native."""

from __future__ import annotations

from collections.abc import Sequence

from kvtune.cache.block_hashes import BlockHashes
from kvtune.cache.group import GroupCache
from kvtune.cache.in_flight import InFlight
from kvtune.cache.matching import Looked, Matching, WholeMatching
from kvtune.cache.native_pool import NativeInFlight, NativePool
from kvtune.types import BlockHash

__all__ = ["matching_of"]


class _NativeMatching(WholeMatching):
    def __init__(
        self, group: GroupCache, pool: NativePool, in_flight: NativeInFlight, *, block_size: int
    ) -> None:
        super().__init__([group], in_flight, block_size=block_size)
        self._pool, self._leaders = pool, in_flight

    def _look(self, hashes: Sequence[BlockHash], limit: int) -> Looked:
        if not isinstance(hashes, BlockHashes):  # names of a trace
            return super()._look(hashes, limit)
        blocks, found = self._pool.match(self._leaders, hashes, limit)
        return Looked(
            blocks if found.run == len(blocks) else blocks[: found.run],
            found.num_seen,
            self._leaders.request(found.leader),
            hashes[found.awaited] if found.leader else None,
        )


def matching_of(groups: Sequence[GroupCache], in_flight: InFlight, *, block_size: int) -> Matching:
    """The fastest one that serves these groups."""
    group, pool = groups[0], groups[0].pool
    if len(groups) > 1 or group.window is not None or pool.planes is not None:
        return Matching(groups, in_flight, block_size=block_size)
    if isinstance(pool, NativePool) and isinstance(in_flight, NativeInFlight):
        return _NativeMatching(group, pool, in_flight, block_size=block_size)
    return WholeMatching(groups, in_flight, block_size=block_size)
