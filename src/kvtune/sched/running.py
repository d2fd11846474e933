"""The requests that run, in service order."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import overload

from kvtune.cache import KVCacheManager
from kvtune.sched.sequence import Sequence

__all__ = ["RunningSequences"]


def _service_order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.key


class RunningSequences(Items[Sequence]):
    """Sorted by `Sequence.key`. Whoever leaves gives its blocks back."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._all: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._all, sequence, key=_service_order)

    def leave(self, sequence: Sequence) -> None:
        self._all.remove(sequence)
        self._manager.free(sequence.request_id)

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        return self._all[index]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._all)
