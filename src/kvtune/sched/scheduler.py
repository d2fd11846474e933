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

import collections.abc
from collections.abc import Callable, Iterable

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.errors import InvariantError, UsageError
from kvtune.sched.admission import growth_reserve, refuse_unfinishable, refuse_unservable
from kvtune.sched.admitting import Admitting
from kvtune.sched.decode_lane import DecodeLane
from kvtune.sched.decode_run import DecodeRun, decode_run, perform
from kvtune.sched.growth import Growth
from kvtune.sched.lowering import Lowering, lowering_order
from kvtune.sched.peak_admission import OutputLengths, PeakAdmission
from kvtune.sched.records import SchedulerStats, SequenceUpdate, StepUpdates
from kvtune.sched.restores import PlaneRestores
from kvtune.sched.running import RunningSequences
from kvtune.sched.sequence import Sequence, SequenceView, Status
from kvtune.sched.step import StepPlan
from kvtune.sched.token_intake import TokenIntake
from kvtune.sched.traffic import Traffic
from kvtune.spec import PoolBudget
from kvtune.types import (
    BlockHash,
    FinishReason,
    Request,
    RequestId,
    RunnerOutput,
    SchedulerOutput,
    TokenArray,
)

__all__ = ["Scheduler"]


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
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._sequences: dict[RequestId, Sequence] = {}
        self._finished: dict[RequestId, Sequence] = {}  # readable until the next schedule()
        self._pending: dict[RequestId, Sequence] = {}  # scheduled, update() not called yet
        self._num_submitted = 0
        self._num_steps = 0
        self._restores = PlaneRestores(manager)
        self._peak = PeakAdmission(manager, max_model_len=max_model_len, lengths=lengths)
        lane = DecodeLane(manager, eos_token_ids=eos_token_ids, max_model_len=max_model_len)
        self._running = RunningSequences(manager, lane)
        self._is_lane_pending = False  # its members are scheduled too
        self._traffic = Traffic(manager, config, self._running, Lowering(manager), self._peak)
        self._waiting, self._counts = self._traffic.waiting, self._traffic.counts
        self._growth = Growth(self._traffic)
        self._intake = TokenIntake(
            manager, self._running, self.finish, eos_token_ids=eos_token_ids, max_model_len=max_model_len
        )
        self._admitting = Admitting(self._traffic, self._restores, clock)

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
        has_seat = len(self._running) < self._traffic.config.max_num_seqs
        if has_seat and parent.status is Status.RUNNING and not self._is_pending(parent):
            self._running.take_out(parent)
            self._manager.fork(parent_id, child.request_id)
            parent.num_slots = 0
            sequence.start(self._clock(), num_computed_tokens=parent.num_computed_tokens)
            self._running.add(sequence)
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
            if sequence.is_in_lane and self._is_lane_pending:
                self._spell_out_step()
            self._running.leave(sequence)
            self._peak.left()
        else:
            self._waiting.remove(sequence)
        sequence.finish(reason, self._clock())
        self._peak.ended(sequence, reason)
        del self._sequences[request_id]
        self._finished[request_id] = sequence
        self._counts["aborted" if reason is FinishReason.ABORT else "finished"] += 1

    def configure(self, config: SchedulerConfig) -> None:
        """New settings from the next step on; running requests above a lowered limit run on."""
        self._traffic.config = config

    def set_budgets(self, budgets: Iterable[PoolBudget]) -> SchedulerOutput:
        """Other KV budgets from now on, between two steps. What they no longer pay for is given up at once:
        planes of idle blocks, idle blocks, planes of running requests, running requests; the output says what
        that does to bytes. UsageError, and nothing changed, when a live request could not end any more.
        """
        if self._pending or self._is_lane_pending:
            raise InvariantError("budgets change between two steps; call update() first")
        budgets = tuple(budgets)
        for sequence in self._sequences.values():
            refuse_unfinishable(sequence, self._manager, budgets, self._max_model_len)
        precision, step = self._manager.precision, StepPlan(budget=0)
        precision.set_budgets(budgets)
        precision.shed_idle()
        precision.lower_overspent(lowering_order(self._running, precision))
        for victim in self._growth.victims():
            if not precision.is_overspent:
                break
            self._growth.preempt(step, victim)
            precision.shed_idle()
        return step.output(self._num_steps, self._manager)

    # --- one step

    def schedule(self) -> SchedulerOutput:
        """Decide the next step; one without tokens when nothing can run."""
        if self._is_lane_pending or any(self._sequences.get(r) is s for r, s in self._pending.items()):
            raise InvariantError("schedule() was called again before update() of the step before")
        self._finished.clear()
        step = StepPlan(budget=self._traffic.config.max_num_batched_tokens)
        if self._manager.precision.can_lower:
            is_relieved = all(s.awaited is not None for s in self._waiting)
            self._restores.begin(self._running, self._traffic.config, is_relieved=is_relieved)
        self._schedule_lane(step)
        self._schedule_apart(step)
        if not step.preempted:
            self._admitting.admit_waiting(step)
        self._is_lane_pending = step.lane is not None
        self._pending = {r: sequence for r, (sequence, _) in step.chunks.items()}
        num_tokens = step.num_tokens
        if num_tokens:
            self._num_steps += 1
            self._counts["scheduled_tokens"] += num_tokens
        return step.output(self._num_steps, self._manager)

    def _schedule_lane(self, step: StepPlan) -> None:
        """A token for everybody who decodes, if there is room for all; else nobody stays in the lane."""
        running, config = self._running, self._traffic.config
        running.gather(step.budget)
        lane = running.lane
        if not len(lane):
            return
        is_everybody = not running.decodes_apart()
        if (
            is_everybody
            and len(lane) <= step.budget
            and lane.grow(lambda s: growth_reserve(config, s.request.priority))
        ):
            step.add_lane(lane)
        else:
            running.dissolve()

    def _schedule_apart(self, step: StepPlan) -> None:
        """Running requests one by one: those that decode, then those whose prompt is being computed."""
        running = self._running
        decodes = running.decodes_apart()
        others = [s for s in running.apart if not s.is_decoding]
        self._schedule_each(step, decodes)
        step.begin_prefills(self._traffic.config)
        self._schedule_each(step, others)
        if decodes or step.preempted:
            has_all = all(s.request_id in step.chunks for s in decodes)
            running.is_calm = has_all and not step.preempted

    def _schedule_each(self, step: StepPlan, running: list[Sequence]) -> None:
        for sequence in running:
            is_runnable = sequence.status is Status.RUNNING and not sequence.awaits_planes
            if not is_runnable or step.budget <= 0:
                continue
            if sequence.num_tokens <= sequence.num_slots and sequence.is_decoding:
                step.add(sequence, 1, ())  # most decode steps: the block at hand has room
            else:
                self._growth.schedule(step, sequence)

    def update(self, output: SchedulerOutput, result: RunnerOutput) -> StepUpdates:
        """Take a step's result: advance, publish, append sampled tokens, end what is done.

        Requests aborted since `schedule` are skipped. One update per sampled request that is live.
        """
        pending, self._pending = self._pending, {}
        updates = StepUpdates(output.step, self._clock())
        if not self._is_lane_pending:
            self._intake.take_each(output.chunks, result.sampled, pending, updates)
            return updates
        self._is_lane_pending = False
        rest = self._intake.take_lane(result.sampled, updates)
        if output.others:
            self._intake.take_each(output.others, rest, pending, updates)
        return updates

    # --- several steps at once

    def decode_run(self) -> DecodeRun | None:
        """The coming steps in which all running requests decode and nothing else can happen before an
        arrival; None where there are none, or where it cannot be told beforehand.

        For callers that know what is sampled, and that nobody forks, aborts or reconfigures meanwhile.
        """
        running, config = self._running, self._traffic.config
        if not self._manager.precision.is_nominal:
            return None  # planes may come back
        if not len(running) or len(running) > config.max_num_batched_tokens:
            return None
        if len(self._waiting) and len(running) < config.max_num_seqs:
            return None  # somebody may be admitted
        if any(not s.is_decoding or s.stop_ids(self._eos_token_ids) for s in running):
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
        if not 1 <= len(end_s) <= run.num_steps or self._running[:] != list(run.sequences):
            raise InvariantError("this run of steps is not the one that lies ahead")
        self._finished.clear()
        self._running.dissolve()
        reserves = [growth_reserve(self._traffic.config, s.request.priority) for s in run.sequences]
        perform(run, self._manager, tokens=tokens, end_s=end_s, reserves=reserves)
        self._num_steps += len(end_s)
        self._counts["scheduled_tokens"] += len(end_s) * len(run.sequences)
        ended: list[SequenceUpdate] = []
        for sequence, own in zip(run.sequences, tokens, strict=True):
            reason = self._intake.end_if_done(sequence)
            if reason is not None:
                ended.append(
                    SequenceUpdate(
                        request_id=sequence.request_id, new_token_ids=tuple(own.tolist()),
                        finish_reason=reason, sequence=sequence,
                    )
                )  # fmt: skip
        return tuple(ended)

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

    def _is_pending(self, sequence: Sequence) -> bool:
        """Whether it is scheduled and update() was not called yet."""
        return sequence.request_id in self._pending or (self._is_lane_pending and sequence.is_in_lane)

    def _spell_out_step(self) -> None:
        """Somebody leaves in the middle of a step: the lane's members are updated one by one."""
        self._pending = {s.request_id: s for s in self._running.dissolve()} | self._pending
        self._is_lane_pending = False
