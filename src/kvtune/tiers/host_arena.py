"""A bounded arena in the host's memory."""

from __future__ import annotations

import numpy as np

from kvtune.errors import UsageError
from kvtune.tiers.tier import Payload

__all__ = ["HostArena"]


_CHUNK_BYTES = 1 << 20


class HostArena:
    """Payloads in slots, which are used again by payloads of the same size.

    Memory is taken in chunks as it is needed: an arena nobody uses takes none, and nothing is ever moved.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """UsageError below zero."""
        if capacity_bytes < 0:
            raise UsageError(f"a host arena needs a capacity of at least 0 bytes, found {capacity_bytes}")
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._slabs: dict[int, _Slab] = {}
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> payload size, slot

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def put(self, key: bytes, payload: Payload) -> bool:
        self.discard(key)
        size = payload.size
        if self._used_bytes + size > self._capacity_bytes:
            return False
        slab = self._slabs.setdefault(size, _Slab(size))
        self._places[key] = (size, slab.put(payload))
        self._used_bytes += size
        return True

    def get(self, key: bytes) -> Payload | None:
        place = self._places.get(key)
        return None if place is None else self._slabs[place[0]].get(place[1])

    def discard(self, key: bytes) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            self._slabs[place[0]].free.append(place[1])
            self._used_bytes -= place[0]

    def clear(self) -> None:
        self._slabs.clear()
        self._places.clear()
        self._used_bytes = 0

    def __len__(self) -> int:
        return len(self._places)


class _Slab:
    """Slots of one size, in chunks that never move."""

    def __init__(self, size: int) -> None:
        self.free: list[int] = []
        self._size = size
        self._per_chunk = max(1, _CHUNK_BYTES // max(1, size))
        self._chunks: list[Payload] = []

    def put(self, payload: Payload) -> int:
        if not self.free:
            first = len(self._chunks) * self._per_chunk
            self._chunks.append(np.empty((self._per_chunk, self._size), dtype=np.uint8))
            self.free = list(range(first + self._per_chunk - 1, first - 1, -1))
        slot = self.free.pop()
        chunk, index = divmod(slot, self._per_chunk)
        self._chunks[chunk][index] = payload
        return slot

    def get(self, slot: int) -> Payload:
        chunk, index = divmod(slot, self._per_chunk)
        return self._chunks[chunk][index].copy()
