"""What a step sampled: sequences take their tokens, publish what is full, and end."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items

import numpy as np

from kvtune.cache import KVCacheManager
from kvtune.errors import InvariantError
from kvtune.sched.records import StepUpdates
from kvtune.sched.running import RunningSequences
from kvtune.sched.sequence import Sequence, Status
from kvtune.types import FinishReason, RequestId, Sampled, ScheduledChunk

__all__ = ["TokenIntake"]


class TokenIntake:
    """Written by `Scheduler` alone; `finish` ends a live request."""

    def __init__(
        self,
        manager: KVCacheManager,
        running: RunningSequences,
        finish: Callable[[RequestId, FinishReason], None],
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._manager = manager
        self._running = running
        self._finish = finish
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len

    def take_each(
        self,
        chunks: Iterable[ScheduledChunk],
        sampled: Iterable[Sampled],
        pending: Mapping[RequestId, Sequence],
        updates: StepUpdates,
    ) -> None:
        """The sequences of these chunks, one by one; those that are gone are skipped."""
        by_id = {s.request_id: s.token_id for s in sampled}
        manager = self._manager
        sequences: list[Sequence] = []
        token_ids: list[int] = []
        reasons: dict[int, FinishReason] = {}
        for chunk in chunks:
            sequence = pending.get(chunk.request_id)
            if sequence is None or sequence.status is not Status.RUNNING:
                continue
            sequence.computed(chunk.num_tokens, lowered=chunk.num_lowered_blocks > 0)
            sequence.last_step = updates.step
            if not manager.advance(chunk.request_id, sequence.num_computed_tokens):
                manager.commit(chunk.request_id, sequence.token_ids, sequence.num_computed_tokens)
            if chunk.samples:
                token_id = _token_of(chunk.request_id, by_id)
                sequence.append(token_id, updates.now_s)
                reason = self.end_if_done(sequence)
                if reason is not None:
                    reasons[len(sequences)] = reason
                sequences.append(sequence)
                token_ids.append(token_id)
        updates.extend(sequences, token_ids, reasons)

    def take_lane(self, sampled: Items[Sampled], updates: StepUpdates) -> Items[Sampled]:
        """Every member of the lane takes a token; blocks are published and given back in service order.
        Returns what of `sampled` may be others'."""
        lane, num = self._running.lane, len(self._running.lane)
        members = lane.members
        is_in_order = tuple([s.request_id for s in sampled[:num]]) == lane.request_ids
        if is_in_order:
            token_ids = array("i", [s.token_id for s in sampled[:num]])
        else:
            by_id = {s.request_id: s.token_id for s in sampled}
            token_ids = array("i", [_token_of(request_id, by_id) for request_id in lane.request_ids])
        tokens = np.frombuffer(token_ids, dtype=np.int32)
        lane.computed(updates.step)
        due, num_done = lane.to_commit(), 0
        reasons: dict[int, FinishReason] = {}
        for i in lane.may_end(tokens):
            sequence, token_id = members[i], token_ids[i]
            reason = self._reason(sequence, token_id, sequence.num_tokens + 1)
            if reason is None:
                continue
            num_due = bisect.bisect_right(due, i)
            lane.commit(due[num_done:num_due])
            num_done = num_due
            self._running.step_out(sequence)
            sequence.append(token_id, updates.now_s)
            self._finish(sequence.request_id, reason)
            reasons[i] = reason
        lane.commit(due[num_done:])
        if reasons:
            lane.close_ranks()
            tokens = np.delete(tokens, list(reasons))
        lane.append(tokens, updates.now_s)
        updates.extend(members, token_ids, reasons)
        return sampled[num:] if is_in_order else sampled

    def end_if_done(self, sequence: Sequence) -> FinishReason | None:
        """Whether the token appended last ended the sequence, and why."""
        reason = self._reason(sequence, sequence.last_token_id, sequence.num_tokens)
        if reason is not None:
            self._finish(sequence.request_id, reason)
        return reason

    def _reason(self, sequence: Sequence, last: int, num_tokens: int) -> FinishReason | None:
        return sequence.stop_reason(last, num_tokens, self._eos_token_ids, self._max_model_len)


def _token_of(request_id: RequestId, sampled: Mapping[RequestId, int]) -> int:
    try:
        return sampled[request_id]
    except KeyError:
        raise InvariantError(
            f"the runner returned no token for request {request_id!r}, which samples"
        ) from None
