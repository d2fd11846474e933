"""What a scheduler step tells its caller."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.sched.sequence import SequenceView
from kvtune.types import FinishReason, RequestId

__all__ = ["SchedulerStats", "SequenceUpdate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUpdate:
    """One sampled request after a step. `sequence` stays readable after the request finished."""

    request_id: RequestId
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    sequence: SequenceView


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
