"""Room for requests that run already: taken where there is some, else found at the expense of others."""

from __future__ import annotations

from kvtune.errors import InvariantError
from kvtune.sched.admission import growth_reserve
from kvtune.sched.preemption import choose_victims, victim_order
from kvtune.sched.sequence import Sequence
from kvtune.sched.step import StepPlan
from kvtune.sched.traffic import Traffic
from kvtune.types import RequestId

__all__ = ["Growth"]


class Growth:
    """Gives running requests the slots of their next tokens. Written by `Scheduler` alone."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._manager = traffic.manager
        self._running = traffic.running

    def schedule(self, step: StepPlan, sequence: Sequence) -> None:
        """The next tokens of a running request, if there is or can be made room for them."""
        num_tokens = step.chunk(sequence.num_uncomputed_tokens, self._traffic.config)
        if not num_tokens:
            step.budget = 0  # nobody behind it goes first
            return
        reserve = growth_reserve(self._traffic.config, sequence.request.priority)
        if self._grow(step, sequence, num_tokens, reserve):
            return
        if sequence is self._running[0]:
            self._grow_head(step, sequence, num_tokens)
        # Anyone else who lacks room keeps its blocks and waits: the head advances meanwhile, and
        # whoever can use those blocks at once takes them by preemption.

    def victims(self, *, head: Sequence | None = None, priority: int | None = None) -> list[Sequence]:
        """Who may leave, first to leave first; see `victim_order`."""
        return victim_order(
            self._running,
            head=head,
            priority=priority,
            max_preemptions=self._traffic.config.max_preemptions,
            leaders=self._leaders(),
        )

    def preempt(self, step: StepPlan, sequence: Sequence) -> None:
        """Take a request off its blocks and back to the queue."""
        if sequence.is_in_lane:
            step.spell_out(self._running.dissolve())
        step.drop(sequence)
        self._running.leave(sequence)
        self._traffic.peak.left()
        sequence.preempt()
        self._traffic.waiting.add(sequence)
        step.preempted.append(sequence.request_id)
        self._traffic.counts["preemptions"] += 1

    def _grow(self, step: StepPlan, sequence: Sequence, num_tokens: int, reserve: float) -> bool:
        """Allocate, preempting others if that suffices; False when the sequence must not run."""
        if self._take(step, sequence, num_tokens, reserve):
            return True
        head = self._running[0]
        if sequence is not head and not sequence.is_decoding:
            return False
        victims = choose_victims(
            sequence,
            self.victims(head=head, priority=sequence.request.priority),
            lambda ids: self._manager.has_room(
                sequence.request_id, sequence.num_computed_tokens + num_tokens, reserve=reserve, without=ids
            ),
        )
        for victim in victims:
            self.preempt(step, victim)
        return bool(victims) and self._take(step, sequence, num_tokens, reserve)

    def _grow_head(self, step: StepPlan, head: Sequence, num_tokens: int) -> None:
        """The head always advances: without headroom, then with fewer tokens, then alone."""
        while num_tokens > 0:
            if self._grow(step, head, num_tokens, 0.0):
                return
            num_tokens //= 2
        for other in self._running[1:]:
            self.preempt(step, other)
        if not self._take(step, head, 1, 0.0):
            raise InvariantError(f"request {head.request_id!r} does not fit an empty cache")

    def _take(self, step: StepPlan, sequence: Sequence, num_tokens: int, reserve: float) -> bool:
        manager, request_id = self._manager, sequence.request_id
        end = sequence.num_computed_tokens + num_tokens
        allocation = manager.allocate(request_id, end, reserve=reserve)
        if allocation is None and self._traffic.lowering.grow(sequence, num_tokens, self._running, reserve):
            allocation = manager.allocate(request_id, end, reserve=reserve)
        if allocation is None:
            return False
        sequence.num_slots = manager.num_slots(request_id)
        step.add(sequence, num_tokens, allocation.copies)
        return True

    def _leaders(self) -> set[RequestId | None]:
        """Running requests that compute a prefix others wait for."""
        return {self._manager.leader_of(s.awaited) for s in self._traffic.waiting if s.awaited is not None}
