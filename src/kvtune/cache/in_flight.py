"""Which request is computing a block for the first time: its leader, for whom others with the prefix wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import repeat

from kvtune.types import BlockHash, RequestId

__all__ = ["InFlight"]


class InFlight:
    """At most one leader a block."""

    def __init__(self) -> None:
        self._leaders: dict[BlockHash, RequestId] = {}

    def lead(self, request_id: RequestId, hashes: Sequence[BlockHash], start: int) -> None:
        """The request computes these blocks from `start` on, but for those that have a leader."""
        deque(map(self._leaders.setdefault, hashes[start:], repeat(request_id)), maxlen=0)

    def leave(self, request_id: RequestId, hashes: Sequence[BlockHash], start: int, end: int) -> None:
        """The request does not lead blocks start..end-1 of these any more, if it did."""
        leaders, led = self._leaders, hashes[start:end]
        removed = list(map(leaders.pop, led, repeat(None)))
        if removed.count(request_id) < len(led):
            leaders.update((h, r) for h, r in zip(led, removed, strict=True) if r not in (None, request_id))

    def gone(self, request_id: RequestId) -> None:
        """The request has left all its blocks and will lead none."""

    def leader(self, block_hash: BlockHash) -> RequestId | None:
        return self._leaders.get(block_hash)

    def awaited(self, missing: Sequence[BlockHash]) -> tuple[RequestId | None, BlockHash | None]:
        """Who leads the first of these blocks of one prefix, and the last of the leading run it leads."""
        leader = self._leaders.get(missing[0]) if missing else None
        if leader is None:
            return None, None
        deepest = missing[0]
        for block_hash in missing:
            if self._leaders.get(block_hash) != leader:
                break
            deepest = block_hash
        return leader, deepest

    def clear(self) -> None:
        self._leaders.clear()

    def requests(self) -> set[RequestId]:
        """All leaders."""
        return set(self._leaders.values())
