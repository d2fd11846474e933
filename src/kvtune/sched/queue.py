"""The waiting queue: by priority, then arrival, then submission. Stable, and open to bypass:
the scheduler walks it in order and may leave a sequence where it is."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from kvtune.errors import InvariantError
from kvtune.sched.sequence import Sequence

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """Sorted by `Sequence.key`. add and remove cost O(log n) comparisons."""

    def __init__(self) -> None:
        self._items: list[tuple[tuple[int, float, int], Sequence]] = []

    def add(self, sequence: Sequence) -> None:
        """A preempted sequence keeps its key, so it comes back in front of later arrivals."""
        bisect.insort(self._items, (sequence.key, sequence), key=lambda item: item[0])

    def remove(self, sequence: Sequence) -> None:
        i = bisect.bisect_left(self._items, sequence.key, key=lambda item: item[0])
        if i == len(self._items) or self._items[i][1] is not sequence:
            raise InvariantError(f"request {sequence.request_id!r} is not waiting")
        del self._items[i]

    def __iter__(self) -> Iterator[Sequence]:
        """In service order; removing the one at hand while walking is fine."""
        i = 0
        while i < len(self._items):
            sequence = self._items[i][1]
            yield sequence
            if i < len(self._items) and self._items[i][1] is sequence:
                i += 1

    def __len__(self) -> int:
        return len(self._items)
