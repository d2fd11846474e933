"""A step while it is being decided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.sched.budget import chunk_of, prefill_budget
from kvtune.sched.decode_lane import DecodeLane
from kvtune.sched.sequence import Sequence
from kvtune.types import Admission, BlockCopy, RequestId, ScheduledChunk, SchedulerOutput

__all__ = ["StepPlan"]

_Chunks = dict[RequestId, tuple[Sequence, int]]
_Copies = dict[RequestId, tuple[BlockCopy, ...]]


@dataclass(slots=True)
class StepPlan:
    """Sequences with the tokens each runs, and the records the step leaves. `lane`: a token of each member of
    it runs before all others."""

    budget: int
    num_decodes: int = 0
    lane: DecodeLane | None = None
    chunks: _Chunks = field(default_factory=_Chunks)
    copies: _Copies = field(default_factory=_Copies)
    admitted: list[Admission] = field(default_factory=list[Admission])
    preempted: list[RequestId] = field(default_factory=list[RequestId])

    def add(self, sequence: Sequence, num_tokens: int, copies: tuple[BlockCopy, ...]) -> None:
        self.chunks[sequence.request_id] = (sequence, num_tokens)
        self.budget -= num_tokens
        if num_tokens < sequence.num_uncomputed_tokens:
            self.budget = 0  # the last of the step
        if copies:
            self.copies[sequence.request_id] = copies

    def add_lane(self, lane: DecodeLane) -> None:
        self.lane = lane
        self.budget -= len(lane)

    def begin_prefills(self, config: SchedulerConfig) -> None:
        """All decodes of the step are in."""
        self.num_decodes = len(self.chunks) + (0 if self.lane is None else len(self.lane))
        self.budget = prefill_budget(config, self.budget, num_decodes=self.num_decodes)

    def chunk(self, num_uncomputed: int, config: SchedulerConfig) -> int:
        """Tokens the next sequence may compute in this step; 0: neither it nor anyone behind it."""
        return chunk_of(config, num_uncomputed, self.budget, num_decodes=self.num_decodes)

    def spell_out(self, members: Iterable[Sequence]) -> None:
        """The lane is dissolved: its members stay in the step, one by one, if they were in it."""
        if self.lane is not None:
            self.lane = None
            self.chunks = {s.request_id: (s, 1) for s in members} | self.chunks

    @property
    def num_tokens(self) -> int:
        return (0 if self.lane is None else len(self.lane)) + sum(n for _, n in self.chunks.values())

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out again: it was preempted after it had been scheduled."""
        _, num_tokens = self.chunks.pop(sequence.request_id, (sequence, 0))
        self.copies.pop(sequence.request_id, None)
        self.budget += num_tokens

    def output(self, step: int, manager: KVCacheManager) -> SchedulerOutput:
        """The decision as the record the runner gets. Whoever reads below nominal precision in this step
        publishes nothing from now on."""
        may_be_lowered = manager.precision.can_lower
        return SchedulerOutput(
            step=step,
            decodes=None if self.lane is None else self.lane.columns(),
            others=tuple(
                [_chunk(s, num_tokens, manager, may_be_lowered) for s, num_tokens in self.chunks.values()]
            ),
            copies=tuple(copy for copies in self.copies.values() for copy in copies),
            admitted=tuple(self.admitted),
            preempted=tuple(self.preempted),
            plane_moves=manager.precision.take_moves(),
        )


def _chunk(
    sequence: Sequence, num_tokens: int, manager: KVCacheManager, may_be_lowered: bool
) -> ScheduledChunk:
    request_id, start = sequence.request_id, sequence.num_computed_tokens
    return ScheduledChunk(
        request_id=request_id,
        token_ids=sequence.chunk(num_tokens),
        start=start,
        block_tables=manager.block_tables(request_id),
        samples=start + num_tokens == sequence.num_tokens,
        num_lowered_blocks=manager.precision.note_reads(request_id, num_tokens) if may_be_lowered else 0,
    )
