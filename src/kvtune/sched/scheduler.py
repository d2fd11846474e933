"""Continuous batching over one cache: which tokens of which requests run in the next step.

There is no decode phase and no prefill phase: a running sequence has `num_computed_tokens`, and a
step gives it tokens until they reach `num_tokens` (the idea of vLLM's v1 scheduler). Decodes come
first, then started prefills, then admissions, under one token budget (Sarathi-Serve's chunked
prefill).

Nobody starves: among running requests the head (priority, arrival) is never preempted and may
preempt all others at or below its priority, so it always advances; a waiting request that lacks room
is not overtaken except by those that wait for a leader, and is admitted without reserve once nothing
else runs.
"""

from __future__ import annotations

import bisect
import collections.abc
from collections import Counter
from collections.abc import Callable, Iterable

from kvtune.cache import KVCacheManager, PrefixMatch
from kvtune.config import SchedulerConfig
from kvtune.errors import InvariantError, UsageError
from kvtune.sched.admission import (
    admission_reserve,
    growth_reserve,
    recompute_misses,
    refuse_unfinishable,
    refuse_unservable,
)
from kvtune.sched.decode_run import DecodeRun, decode_run, perform
from kvtune.sched.lowering import Lowering, lowering_order
from kvtune.sched.peak_admission import OutputLengths, PeakAdmission
from kvtune.sched.preemption import choose_victims, victim_order
from kvtune.sched.queue import WaitingQueue
from kvtune.sched.records import SchedulerStats, SequenceUpdate
from kvtune.sched.restores import PlaneRestores
from kvtune.sched.sequence import Sequence, SequenceView, Status
from kvtune.sched.step import StepPlan
from kvtune.spec import PoolBudget
from kvtune.types import (
    Admission,
    BlockHash,
    FinishReason,
    MissCause,
    Request,
    RequestId,
    RunnerOutput,
    Sampled,
    SchedulerOutput,
    TokenArray,
)

__all__ = ["Scheduler"]


def _service_order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.key


class Scheduler:
    """Decides every step; performs nothing. Call `schedule`, run its output, call `update`.

    Not thread-safe. `clock` returns seconds on the time line of `Request.arrival_s`.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        config: SchedulerConfig,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        clock: Callable[[], float],
        lengths: OutputLengths | None = None,
    ) -> None:
        """`lengths`: where `admission = "peak"` takes its forecasts from; None learns them online."""
        self._manager = manager
        self._config = config
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._sequences: dict[RequestId, Sequence] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # in service order
        self._finished: dict[RequestId, Sequence] = {}  # readable until the next schedule()
        self._pending: dict[RequestId, Sequence] = {}  # scheduled, update() not called yet
        self._num_submitted = 0
        self._num_steps = 0
        self._counts: Counter[str] = Counter()
        self._lowering = Lowering(manager)
        self._restores = PlaneRestores(manager)
        self._peak = PeakAdmission(manager, max_model_len=max_model_len, lengths=lengths)

    # --- requests come and go

    def add(
        self, request: Request, *, block_hashes: collections.abc.Sequence[BlockHash] = ()
    ) -> SequenceView:
        """Queue a request. UsageError when it can never be served or its id is in use.

        `block_hashes` of the prompt's leading full blocks, where the caller knows them (a trace may name
        blocks without saying their tokens); the rest is hashed from the token ids.
        """
        self._refuse_known(request.request_id)
        prompt = request.prompt_token_ids
        refuse_unservable(request, len(prompt), self._manager, self._max_model_len)
        sequence = self._register(Sequence(request, prompt, order=self._num_submitted))
        sequence.block_hashes = block_hashes
        self._waiting.add(sequence)
        return sequence

    def fork(self, parent_id: RequestId, child: Request) -> SequenceView:
        """Continue the parent's tokens under the child's id and sampling; blocks are shared.

        `child.prompt_token_ids` is ignored: prompt and output so far are the parent's, and inherited
        output counts towards the child's `max_tokens`. A parent that runs, not in the middle of a
        step, and a free seat let the child run at once; otherwise it waits and finds the shared
        prefix in the cache.
        """
        parent = self._live(parent_id)
        self._refuse_known(child.request_id)
        if parent.num_output_tokens >= child.sampling.max_tokens:
            raise UsageError(
                f"fork {child.request_id!r} inherits {parent.num_output_tokens} output tokens, "
                f"max_tokens is {child.sampling.max_tokens}; raise it"
            )
        refuse_unservable(child, parent.num_prompt_tokens, self._manager, self._max_model_len)
        sequence = Sequence(child, parent.prompt_token_ids, order=self._num_submitted)
        sequence.inherit(parent)
        self._register(sequence)
        has_seat = len(self._running) < self._config.max_num_seqs
        if has_seat and parent.status is Status.RUNNING and parent_id not in self._pending:
            self._manager.fork(parent_id, child.request_id)
            parent.num_slots = 0
            sequence.start(self._clock(), num_computed_tokens=parent.num_computed_tokens)
            self._run(sequence)
        else:
            self._waiting.add(sequence)
        return sequence

    def abort(self, request_id: RequestId) -> bool:
        """End a request wherever it is; False when it is not live. Safe between any two calls."""
        if request_id not in self._sequences:
            return False
        self.finish(request_id, FinishReason.ABORT)
        return True

    def finish(self, request_id: RequestId, reason: FinishReason) -> None:
        """End a live request for a reason the caller found (a stop string, an abort)."""
        sequence = self._live(request_id)
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.finish(reason, self._clock())
        self._peak.ended(sequence, reason)
        del self._sequences[request_id]
        self._finished[request_id] = sequence
        self._counts["aborted" if reason is FinishReason.ABORT else "finished"] += 1

    def configure(self, config: SchedulerConfig) -> None:
        """New settings from the next step on; running requests above a lowered limit run on."""
        self._config = config

    def set_budgets(self, budgets: Iterable[PoolBudget]) -> SchedulerOutput:
        """Other KV budgets from now on, between two steps. What they no longer pay for is given up at once:
        planes of idle blocks, idle blocks, planes of running requests, running requests; the output says what
        that does to bytes. UsageError, and nothing changed, when a live request could not end any more.
        """
        if self._pending:
            raise InvariantError("budgets change between two steps; call update() first")
        budgets = tuple(budgets)
        for sequence in self._sequences.values():
            refuse_unfinishable(sequence, self._manager, budgets, self._max_model_len)
        precision, step = self._manager.precision, StepPlan(budget=0)
        precision.set_budgets(budgets)
        precision.shed_idle()
        precision.lower_overspent(lowering_order(self._running, precision))
        leaving = victim_order(
            self._running, head=None, priority=None, max_preemptions=self._config.max_preemptions,
            leaders=self._leaders(),
        )  # fmt: skip
        for victim in leaving:
            if not precision.is_overspent:
                break
            self._preempt(step, victim)
            precision.shed_idle()
        return step.output(self._num_steps, self._manager)

    # --- one step

    def schedule(self) -> SchedulerOutput:
        """Decide the next step; empty `chunks` when nothing can run."""
        if any(self._sequences.get(r) is s for r, s in self._pending.items()):
            raise InvariantError("schedule() was called again before update() of the step before")
        self._finished.clear()
        step = StepPlan(budget=self._config.max_num_batched_tokens)
        if self._manager.precision.can_lower:
            is_relieved = all(s.awaited is not None for s in self._waiting)
            self._restores.begin(self._running, self._config, is_relieved=is_relieved)
        decodes = [s for s in self._running if s.is_decoding]
        others = [s for s in self._running if not s.is_decoding] if len(decodes) < len(self._running) else []
        for sequence in decodes + others:
            is_runnable = sequence.status is Status.RUNNING and not sequence.awaits_planes
            if not is_runnable or step.budget <= 0:
                continue
            if sequence.num_tokens <= sequence.num_slots and sequence.is_decoding:
                step.add(sequence, 1, ())  # most decode steps: the block at hand has room
            else:
                self._schedule_running(step, sequence)
        if not step.preempted:
            self._admit_waiting(step)
        self._pending = {r: sequence for r, (sequence, _) in step.chunks.items()}
        if step.chunks:
            self._num_steps += 1
            self._counts["scheduled_tokens"] += sum(n for _, n in step.chunks.values())
        return step.output(self._num_steps, self._manager)

    def _schedule_running(self, step: StepPlan, sequence: Sequence) -> None:
        num_tokens = min(sequence.num_uncomputed_tokens, step.budget)
        reserve = growth_reserve(self._config, sequence.request.priority)
        if self._grow(step, sequence, num_tokens, reserve):
            return
        if sequence is self._running[0]:
            self._grow_head(step, sequence, num_tokens)
        # Anyone else who lacks room keeps its blocks and waits: the head advances meanwhile, and
        # whoever can use those blocks at once takes them by preemption.

    def _grow(self, step: StepPlan, sequence: Sequence, num_tokens: int, reserve: float) -> bool:
        """Allocate, preempting others if that suffices; False when the sequence must not run."""
        if self._take(step, sequence, num_tokens, reserve):
            return True
        head = self._running[0]
        if sequence is not head and not sequence.is_decoding:
            return False
        ordered = victim_order(
            self._running,
            head=head,
            priority=sequence.request.priority,
            max_preemptions=self._config.max_preemptions,
            leaders=self._leaders(),
        )
        victims = choose_victims(
            sequence,
            ordered,
            lambda ids: self._manager.has_room(
                sequence.request_id, sequence.num_computed_tokens + num_tokens, reserve=reserve, without=ids
            ),
        )
        for victim in victims:
            self._preempt(step, victim)
        return bool(victims) and self._take(step, sequence, num_tokens, reserve)

    def _grow_head(self, step: StepPlan, head: Sequence, num_tokens: int) -> None:
        """The head always advances: without headroom, then with fewer tokens, then alone."""
        while num_tokens > 0:
            if self._grow(step, head, num_tokens, 0.0):
                return
            num_tokens //= 2
        for other in self._running[1:]:
            self._preempt(step, other)
        if not self._take(step, head, 1, 0.0):
            raise InvariantError(f"request {head.request_id!r} does not fit an empty cache")

    def _take(self, step: StepPlan, sequence: Sequence, num_tokens: int, reserve: float) -> bool:
        allocation = self._manager.allocate(
            sequence.request_id, sequence.num_computed_tokens + num_tokens, reserve=reserve
        )
        if allocation is None and self._lowering.grow(sequence, num_tokens, self._running, reserve):
            allocation = self._manager.allocate(
                sequence.request_id, sequence.num_computed_tokens + num_tokens, reserve=reserve
            )
        if allocation is None:
            return False
        sequence.num_slots = self._manager.num_slots(sequence.request_id)
        step.add(sequence, num_tokens, allocation.copies)
        return True

    def _preempt(self, step: StepPlan, sequence: Sequence) -> None:
        step.drop(sequence)
        self._leave(sequence)
        sequence.preempt()
        self._waiting.add(sequence)
        step.preempted.append(sequence.request_id)
        self._counts["preemptions"] += 1

    def _admit_waiting(self, step: StepPlan) -> None:
        for sequence in self._waiting:
            if step.budget <= 0 or len(self._running) >= self._config.max_num_seqs:
                return
            if sequence.awaited is not None and self._manager.leader_of(sequence.awaited):
                continue
            match = self._match(sequence)
            if match.leader is not None:
                self._counts["waited_for_leader"] += sequence.awaited is None
                sequence.awaited = match.awaited
            elif not self._admit(step, sequence, match):
                return  # whoever lacks room is not overtaken

    def _leaders(self) -> set[RequestId | None]:
        """Running requests that compute a prefix others wait for."""
        return {self._manager.leader_of(s.awaited) for s in self._waiting if s.awaited is not None}

    def _match(self, sequence: Sequence) -> PrefixMatch:
        match = self._manager.match(
            sequence.token_ids,
            cache_salt=sequence.request.cache_salt,
            block_hashes=sequence.block_hashes,
        )
        sequence.block_hashes = match.block_hashes
        return match

    def _admit(self, step: StepPlan, sequence: Sequence, match: PrefixMatch) -> bool:
        num_tokens = min(sequence.num_tokens - match.num_tokens, step.budget)
        if not self._peak_allows(sequence, match):
            return False
        reserve = admission_reserve(self._config, sequence.request.priority)
        gate: int | None = sequence.num_tokens
        allocation, lowered = None, None
        while allocation is None:
            allocation = self._manager.allocate(
                sequence.request_id,
                match.num_tokens + num_tokens,
                match=match,
                reserve=reserve,
                gate_tokens=gate,
            )
            if allocation is not None:
                break
            lowered = self._lowering.admit(
                sequence, num_tokens, self._running, reserve, found=match, match=self._match
            )
            if lowered is not None:
                match, allocation = lowered
                break
            if self._running:
                return False
            if not num_tokens:
                raise InvariantError(f"request {sequence.request_id!r} does not fit an empty cache")
            # Nothing else runs: no reserve, then smaller chunks until one fits.
            num_tokens = num_tokens if gate is not None else num_tokens // 2
            reserve, gate = 0.0, None
        self._waiting.remove(sequence)
        self._record_admission(step, sequence, match)
        sequence.start(self._clock(), num_computed_tokens=match.num_tokens)
        self._run(sequence)
        if lowered is None and self._restores.await_planes(sequence):
            return True  # its blocks are pinned; it starts when their planes are back
        num_tokens = min(num_tokens, sequence.num_uncomputed_tokens)
        if num_tokens:
            step.add(sequence, num_tokens, allocation.copies)
        return True

    def _peak_allows(self, sequence: Sequence, match: PrefixMatch) -> bool:
        if self._config.admission != "peak":
            return True
        return self._peak.admits(sequence, match, self._running, self._config)

    def _record_admission(self, step: StepPlan, sequence: Sequence, match: PrefixMatch) -> None:
        is_resumed = sequence.num_preemptions > 0
        misses = recompute_misses(sequence, match.misses, match.num_tokens)
        step.admitted.append(
            Admission(
                request_id=sequence.request_id,
                num_cached_tokens=match.num_tokens,
                misses=misses,
                is_resumed=is_resumed,
            )
        )
        if not is_resumed:
            sequence.num_cached_tokens = match.num_tokens
            sequence.misses = misses
        self._counts["admitted"] += 1
        self._counts["resumed"] += is_resumed
        self._counts["recomputed_tokens"] += misses.get(MissCause.PREEMPTED, 0)

    def update(self, output: SchedulerOutput, result: RunnerOutput) -> tuple[SequenceUpdate, ...]:
        """Take a step's result: advance, publish, append sampled tokens, end what is done.

        Requests aborted since `schedule` are skipped. One update per sampled request that is live.
        """
        sampled = {s.request_id: s for s in result.sampled}
        pending, self._pending = self._pending, {}
        updates: list[SequenceUpdate] = []
        manager, now_s = self._manager, self._clock()
        for chunk in output.chunks:
            sequence = pending.get(chunk.request_id)
            if sequence is None or sequence.status is not Status.RUNNING:
                continue
            sequence.computed(chunk.num_tokens, lowered=chunk.num_lowered_blocks > 0)
            sequence.last_step = output.step
            if not manager.advance(chunk.request_id, sequence.num_computed_tokens):
                manager.commit(chunk.request_id, sequence.token_ids, sequence.num_computed_tokens)
            if chunk.samples:
                updates.append(self._take_token(sequence, sampled, now_s))
        return tuple(updates)

    # --- several steps at once

    def decode_run(self) -> DecodeRun | None:
        """The coming steps in which all running requests decode and nothing else can happen before an
        arrival; None where there are none, or where it cannot be told beforehand.

        For callers that know what is sampled, and that nobody forks, aborts or reconfigures meanwhile.
        """
        running, config = self._running, self._config
        if not self._manager.precision.is_nominal:
            return None  # planes may come back
        if not running or len(running) > config.max_num_batched_tokens:
            return None
        if len(self._waiting) and len(running) < config.max_num_seqs:
            return None  # somebody may be admitted
        if any(s.may_stop_early(self._eos_token_ids) or not s.is_decoding for s in running):
            return None
        reserve = growth_reserve(config, 0)
        return decode_run(running, self._manager, reserve=reserve, max_model_len=self._max_model_len)

    def perform(
        self, run: DecodeRun, tokens: list[TokenArray], end_s: list[float]
    ) -> tuple[SequenceUpdate, ...]:
        """Make the first `len(end_s)` steps of the run, as `schedule` and `update` would have.

        tokens[i] int32 [len(end_s)]: what sequence i of the run samples; `end_s` [s]: when each step ends.
        One update for each request that ended, in the order of the run.
        """
        if not 1 <= len(end_s) <= run.num_steps or self._running != list(run.sequences):
            raise InvariantError("this run of steps is not the one that lies ahead")
        self._finished.clear()
        reserves = [growth_reserve(self._config, s.request.priority) for s in run.sequences]
        perform(run, self._manager, tokens=tokens, end_s=end_s, reserves=reserves)
        self._num_steps += len(end_s)
        self._counts["scheduled_tokens"] += len(end_s) * len(run.sequences)
        updates = (
            self._end_if_done(s, tuple(own.tolist())) for s, own in zip(run.sequences, tokens, strict=True)
        )
        return tuple(update for update in updates if update.finish_reason is not None)

    def _take_token(
        self, sequence: Sequence, sampled: dict[RequestId, Sampled], now_s: float
    ) -> SequenceUpdate:
        request_id = sequence.request_id
        if request_id not in sampled:
            raise InvariantError(f"the runner returned no token for request {request_id!r}, which samples")
        token_id = sampled[request_id].token_id
        sequence.append(token_id, now_s)
        return self._end_if_done(sequence, (token_id,))

    def _end_if_done(self, sequence: Sequence, new_token_ids: tuple[int, ...]) -> SequenceUpdate:
        reason = sequence.stop_reason(self._eos_token_ids, self._max_model_len)
        if reason is not None:
            self.finish(sequence.request_id, reason)
        return SequenceUpdate(
            request_id=sequence.request_id, new_token_ids=new_token_ids, finish_reason=reason,
            sequence=sequence,
        )  # fmt: skip

    # --- looking

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def sequence(self, request_id: RequestId) -> SequenceView:
        """A live request, or one that ended since the last `schedule`. UsageError otherwise."""
        sequence = self._sequences.get(request_id) or self._finished.get(request_id)
        if sequence is None:
            raise UsageError(f"request {request_id!r} is not known; it never came or ended before this step")
        return sequence

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            steps=self._num_steps,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            **self._counts,
        )

    # --- inside

    def _register(self, sequence: Sequence) -> Sequence:
        self._sequences[sequence.request_id] = sequence
        self._num_submitted += 1
        return sequence

    def _live(self, request_id: RequestId) -> Sequence:
        try:
            return self._sequences[request_id]
        except KeyError:
            raise UsageError(f"request {request_id!r} is not live; it never came or has ended") from None

    def _refuse_known(self, request_id: RequestId) -> None:
        if request_id in self._sequences:
            raise UsageError(f"request id {request_id!r} is in use; give every request its own")

    def _run(self, sequence: Sequence) -> None:
        bisect.insort(self._running, sequence, key=_service_order)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._peak.left()
        self._manager.free(sequence.request_id)
