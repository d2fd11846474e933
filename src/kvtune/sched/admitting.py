"""Who of the waiting requests starts in this step, and with what of its prefix cached."""

from __future__ import annotations

from collections.abc import Callable

from kvtune.cache import PrefixMatch
from kvtune.errors import InvariantError
from kvtune.sched.admission import admission_reserve, recompute_misses
from kvtune.sched.restores import PlaneRestores
from kvtune.sched.sequence import Sequence
from kvtune.sched.step import StepPlan
from kvtune.sched.traffic import Traffic
from kvtune.types import Admission, MissCause

__all__ = ["Admitting"]


class Admitting:
    """Takes requests from the queue, in its order, as long as there is room. Written by `Scheduler` alone."""

    def __init__(self, traffic: Traffic, restores: PlaneRestores, clock: Callable[[], float]) -> None:
        self._traffic = traffic
        self._manager = traffic.manager
        self._running = traffic.running
        self._waiting = traffic.waiting
        self._restores = restores
        self._clock = clock

    def admit_waiting(self, step: StepPlan) -> None:
        for sequence in self._waiting:
            if step.budget <= 0 or len(self._running) >= self._traffic.config.max_num_seqs:
                return
            if sequence.awaited is not None and self._manager.leader_of(sequence.awaited):
                continue
            match = self._match(sequence)
            if match.leader is not None:
                self._traffic.counts["waited_for_leader"] += sequence.awaited is None
                sequence.awaited = match.awaited
            elif not self._admit(step, sequence, match):
                return  # whoever lacks room is not overtaken

    def _match(self, sequence: Sequence) -> PrefixMatch:
        match = self._manager.match(
            sequence.token_ids,
            cache_salt=sequence.request.cache_salt,
            block_hashes=sequence.block_hashes,
        )
        sequence.block_hashes = match.block_hashes
        return match

    def _admit(self, step: StepPlan, sequence: Sequence, match: PrefixMatch) -> bool:
        config = self._traffic.config
        num_tokens = step.chunk(sequence.num_tokens - match.num_tokens, config)
        if not num_tokens:
            return False
        peak, lowering = self._traffic.peak, self._traffic.lowering
        if config.admission == "peak" and not peak.admits(sequence, match, self._running, config):
            return False
        reserve = admission_reserve(config, sequence.request.priority)
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
            lowered = lowering.admit(
                sequence, num_tokens, self._running, reserve, found=match, match=self._match
            )
            if lowered is not None:
                match, allocation = lowered
                break
            if len(self._running):
                return False
            if not num_tokens:
                raise InvariantError(f"request {sequence.request_id!r} does not fit an empty cache")
            # Nothing else runs: no reserve, then smaller chunks until one fits.
            num_tokens = num_tokens if gate is not None else num_tokens // 2
            reserve, gate = 0.0, None
        self._waiting.remove(sequence)
        self._record(step, sequence, match)
        sequence.start(self._clock(), num_computed_tokens=match.num_tokens)
        self._running.add(sequence)
        if lowered is None and self._restores.await_planes(sequence):
            return True  # its blocks are pinned; it starts when their planes are back
        num_tokens = min(num_tokens, sequence.num_uncomputed_tokens)
        if num_tokens:
            step.add(sequence, num_tokens, allocation.copies)
        return True

    def _record(self, step: StepPlan, sequence: Sequence, match: PrefixMatch) -> None:
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
        counts = self._traffic.counts
        counts["admitted"] += 1
        counts["resumed"] += is_resumed
        counts["recomputed_tokens"] += misses.get(MissCause.PREEMPTED, 0)
