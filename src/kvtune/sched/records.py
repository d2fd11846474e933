"""What a scheduler step tells its caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from kvtune.sched.sequence import SequenceView
from kvtune.types import FinishReason, RequestId

__all__ = ["SchedulerStats", "SequenceUpdate", "StepUpdates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUpdate:
    """One sampled request after a step. `sequence` stays readable after the request finished."""

    request_id: RequestId
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    sequence: SequenceView


class StepUpdates(Sequence[SequenceUpdate]):
    """What became of the sampled requests of a step that ended at `now_s`, in its order: one token each, side
    by side. A record is made when it is asked for."""

    __slots__ = ("_reasons", "_sequences", "_token_ids", "now_s", "step")

    def __init__(self, step: int, now_s: float) -> None:
        self.step = step
        self.now_s = now_s
        self._sequences: Sequence[SequenceView] = ()
        self._token_ids: Sequence[int] = ()
        self._reasons: dict[int, FinishReason] = {}

    def extend(
        self,
        sequences: Sequence[SequenceView],
        token_ids: Sequence[int],
        reasons: Mapping[int, FinishReason],
    ) -> None:
        """`reasons`, by place among these: of those that ended."""
        start = len(self._sequences)
        if start:
            self._sequences = [*self._sequences, *sequences]
            self._token_ids = [*self._token_ids, *token_ids]
        else:
            self._sequences, self._token_ids = sequences, token_ids
        self._reasons.update({start + i: reason for i, reason in reasons.items()})

    @property
    def ended(self) -> list[SequenceUpdate]:
        """Of the requests that ended in this step."""
        return [self._update(i) for i in self._reasons]

    def _update(self, i: int) -> SequenceUpdate:
        sequence = self._sequences[i]
        return SequenceUpdate(
            request_id=sequence.request_id,
            new_token_ids=(self._token_ids[i],),
            finish_reason=self._reasons.get(i),
            sequence=sequence,
        )

    @overload
    def __getitem__(self, index: int) -> SequenceUpdate: ...
    @overload
    def __getitem__(self, index: slice) -> list[SequenceUpdate]: ...
    def __getitem__(self, index: int | slice) -> SequenceUpdate | list[SequenceUpdate]:
        if isinstance(index, slice):
            return [self._update(i) for i in range(*index.indices(len(self)))]
        return self._update(range(len(self))[index])

    def __len__(self) -> int:
        return len(self._sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Counters since construction, and the two gauges of the moment."""

    steps: int = 0
    """Steps that had something to compute."""
    scheduled_tokens: int = 0
    admitted: int = 0
    """Admissions, resumed requests included."""
    resumed: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    """Tokens computed once, lost to preemption, not found in the cache at resumption."""
    finished: int = 0
    aborted: int = 0
    waited_for_leader: int = 0
    """Times a request started to wait for another one that computes its prefix."""
    num_running: int = 0
    num_waiting: int = 0
