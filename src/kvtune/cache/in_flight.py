"""Which request is computing a block for the first time: its leader, for whom others with the prefix wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtune.types import BlockHash, RequestId

__all__ = ["InFlight"]


class InFlight:
    """At most one leader a block."""

    def __init__(self) -> None:
        self._leaders: dict[BlockHash, RequestId] = {}

    def lead(self, request_id: RequestId, hashes: Sequence[BlockHash]) -> None:
        """The request computes these blocks, but for those that have a leader."""
        led = dict.fromkeys(hashes, request_id)
        if not self._leaders.keys().isdisjoint(hashes):
            led = {h: r for h, r in led.items() if h not in self._leaders}
        self._leaders |= led

    def leave(self, request_id: RequestId, hashes: Iterable[BlockHash]) -> None:
        """The request does not lead these blocks any more, if it did."""
        leaders = self._leaders
        for block_hash in hashes:
            if leaders.get(block_hash) == request_id:
                del leaders[block_hash]

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
