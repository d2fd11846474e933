"""The requests that run, in service order, and which of them decode in the lane."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import overload

from kvtune.cache import KVCacheManager
from kvtune.sched.decode_lane import DecodeLane
from kvtune.sched.sequence import Sequence, service_order

__all__ = ["RunningSequences"]


class RunningSequences(Items[Sequence]):
    """Sorted by `Sequence.key`. Whoever leaves gives its blocks back.

    Everybody is in `lane` or in `apart`, which is sorted too.
    """

    def __init__(self, manager: KVCacheManager, lane: DecodeLane) -> None:
        self._manager = manager
        self._all: list[Sequence] = []
        self.lane = lane
        self.apart: list[Sequence] = []
        self.is_calm = True
        """Whether the last step that was decided one by one left no decoding request behind."""

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._all, sequence, key=service_order)
        bisect.insort(self.apart, sequence, key=service_order)

    def leave(self, sequence: Sequence) -> None:
        self.take_out(sequence)
        self.apart.remove(sequence)
        self._all.remove(sequence)
        self._manager.free(sequence.request_id)

    # --- the lane

    def gather(self, max_tokens: int) -> None:
        """Who decodes joins the lane, if all who do can: the lane takes a token each in one step, or none."""
        if not self.is_calm or self._manager.precision.can_lower:
            return
        decodes = self.decodes_apart()
        if not decodes or len(self.lane) + len(decodes) > max_tokens:
            return
        if any(self._manager.may_share_last(s.request_id) for s in decodes):
            return
        self.lane.join(decodes)
        self.apart = [s for s in self.apart if not s.is_in_lane]

    def decodes_apart(self) -> list[Sequence]:
        """Who decodes outside the lane."""
        return [s for s in self.apart if s.is_decoding]

    def take_out(self, sequence: Sequence) -> None:
        """Out of the lane, if it is there."""
        if sequence.is_in_lane:
            self.step_out(sequence)
            self.lane.close_ranks()

    def step_out(self, sequence: Sequence) -> None:
        """Out of the lane, where places must hold; `lane.close_ranks` follows."""
        self.lane.leave(sequence)
        bisect.insort(self.apart, sequence, key=service_order)

    def dissolve(self) -> tuple[Sequence, ...]:
        """Everybody out of the lane; returns who was there."""
        members = self.lane.clear()
        if members:
            self.apart = list(self._all)
        return members

    # --- as a sequence

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
