"""Room at the expense of precision: what the scheduler tries before it preempts, or lets a request wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvtune.cache import Allocation, KVCacheManager, Precision, PrefixMatch
from kvtune.sched.sequence import Sequence
from kvtune.types import RequestId

__all__ = ["Lowering", "lowering_order"]


def lowering_order(running: Iterable[Sequence], precision: Precision) -> list[RequestId]:
    """Who loses low planes first: lower priority; then whoever reads below nominal precision already, so that
    few requests do; then least recently scheduled; then latest."""
    ordered = sorted(
        running,
        key=lambda s: (
            s.request.priority,
            not precision.is_private(s.request_id),
            s.last_step,
            -s.order,
        ),
    )
    return [s.request_id for s in ordered]


class Lowering:
    """Drops planes of requests at or below the priority of the one that lacks room. Nothing changes where
    that would not be enough, or where no plane may be dropped."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._precision = manager.precision

    def grow(self, sequence: Sequence, num_tokens: int, running: Iterable[Sequence], reserve: float) -> bool:
        """Make room for the next `num_tokens` of a running request."""
        if not self._precision.can_lower:
            return False
        return self._precision.lower_for_growth(
            sequence.request_id,
            sequence.num_computed_tokens + num_tokens,
            reserve=reserve,
            request_ids=self._below(sequence, running),
        )

    def admit(
        self,
        sequence: Sequence,
        num_tokens: int,
        running: Iterable[Sequence],
        reserve: float,
        *,
        found: PrefixMatch,
        match: Callable[[Sequence], PrefixMatch],
    ) -> tuple[PrefixMatch, Allocation] | None:
        """Allocate for a waiting request, which reads matched blocks as they are: what it hits and gets.
        `found`: what it would hit now."""
        if not self._precision.can_lower:
            return None
        is_possible = self._precision.lower_for_admission(
            found,
            found.num_tokens + num_tokens,
            gate_tokens=sequence.num_tokens,
            reserve=reserve,
            request_ids=lambda: self._below(sequence, running),
        )
        if not is_possible:
            return None
        found = match(sequence)  # a plane without a resting place took its block out of the index
        allocation = self._manager.allocate(
            sequence.request_id,
            found.num_tokens + num_tokens,
            match=found,
            reserve=reserve,
            gate_tokens=sequence.num_tokens,
            lowered=True,
        )
        return None if allocation is None else (found, allocation)

    def _below(self, sequence: Sequence, running: Iterable[Sequence]) -> list[RequestId]:
        allowed = (s for s in running if s.request.priority <= sequence.request.priority)
        return lowering_order(allowed, self._precision)
