"""Discrete-event simulation of serving: the engine's own scheduler and manager, another clock.

The loop is the engine's: take requests that have arrived, let the scheduler decide a step, perform it
(here: ask the cost model how long it takes), tell the scheduler. (Vidur, MLSys 2024, simulates serving from
predicted step times in the same way, with a scheduler of its own.)
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.cache import CacheStats, KVCacheManager, cache_manager
from kvtune.config import CacheConfig, SchedulerConfig
from kvtune.errors import InvariantError, UsageError
from kvtune.latency import BenchRecord
from kvtune.sched import Scheduler, SchedulerStats, SequenceUpdate, SequenceView
from kvtune.sched.shape import ReadGeometry, StepShapes
from kvtune.sim.cost_model import CostModel
from kvtune.sim.requests import SimRequest
from kvtune.spec import ModelSpec, plan_arenas
from kvtune.types import RequestId, RunnerOutput, Sampled, SchedulerOutput, TokenArray

__all__ = ["STEP_COLUMNS", "Simulation", "SimulationRun"]

STEP_COLUMNS: Final = (
    "start_s", "seconds", "tokens", "decodes", "running", "waiting", "referenced", "idle", "preempted",
    "cached_tokens", "prompt_tokens",
)  # fmt: skip
"""Columns of `SimulationRun.steps`: when a step began and how long it took; tokens and decodes in it;
requests running and waiting after its decision; blocks of all groups referenced and idle after it;
requests preempted; prompt tokens of those admitted for the first time, found in the cache and in total."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationRun:
    """What came out, times in seconds on the clock of the arrivals.

    `steps` float64 [num_steps, len(STEP_COLUMNS)]; `queue_s` [num finished]: how long each finished request
    waited for its first step; `busy_s`: time spent in steps and in taking requests in.
    """

    records: tuple[BenchRecord, ...]
    steps: npt.NDArray[np.float64]
    queue_s: npt.NDArray[np.float64]
    preempted_requests: int
    duration_s: float
    busy_s: float
    num_blocks: int
    cache: CacheStats
    scheduler: SchedulerStats


@dataclass(slots=True)
class _Live:
    """A request under way, and the number that stands for its unknown tokens."""

    request: SimRequest
    own_token: int
    num_output: int = 0

    def next_token(self) -> int:
        tokens = self.request.output_token_ids
        token = self.own_token if tokens is None else int(tokens[self.num_output])
        self.num_output += 1
        return token

    def next_tokens(self, count: int) -> TokenArray:
        tokens = self.request.output_token_ids
        start, self.num_output = self.num_output, self.num_output + count
        if tokens is None:
            return np.full(count, self.own_token, dtype=np.int32)
        return tokens[start : self.num_output]


@dataclass(slots=True)
class _Log:
    records: list[BenchRecord] = field(default_factory=list[BenchRecord])
    queue_s: list[float] = field(default_factory=list[float])
    steps: array[float] = field(default_factory=lambda: array("d"))
    preempted_requests: int = 0
    submission_s: float = 0.0


class Simulation:
    """One simulated server. Build it as an engine is built; `run` once.

    `on_step` sees every step's decision after it was performed, as `Engine.on_step` does.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        max_model_len: int,
        cost: CostModel,
        fingerprint: bytes = b"",
    ) -> None:
        plan = plan_arenas(
            spec, cache, max_model_len=max_model_len, max_num_seqs=scheduler.max_num_seqs,
            chunk=scheduler.chunk,
        )  # fmt: skip
        self.manager: KVCacheManager = cache_manager(plan, cache, fingerprint=fingerprint)
        self.scheduler = Scheduler(self.manager, scheduler, max_model_len=max_model_len, clock=self._clock)
        self.cost = cost
        self.on_step: Callable[[SchedulerOutput], None] | None = None
        self.num_blocks = sum(plan.num_blocks) + sum(plan.num_first_blocks)
        self._block_size = cache.block_size
        self._shapes = StepShapes(ReadGeometry.of(plan.groups, cache, num_heads=spec.num_attention_heads))
        self._now_s = 0.0
        self._live: dict[RequestId, _Live] = {}
        self._log = _Log()

    def _clock(self) -> float:
        return self._now_s

    def run(
        self, requests: Sequence[SimRequest], *, on_done: Callable[[int], None] | None = None
    ) -> SimulationRun:
        """Serve all requests to their end. `on_done` gets the number of finished requests after each.

        A request the scheduler refuses (too long for model or cache) is recorded as failed.
        """
        if self._live or self._log.records:
            raise UsageError("a simulation runs once; build another one")
        due = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
        at, empty_steps = 0, 0
        with _without_garbage_collection():
            while True:
                while at < len(due) and requests[due[at]].arrival_s <= self._now_s:
                    self._submit(requests[due[at]], due[at])
                    at += 1
                if self.scheduler.has_unfinished:
                    until_s = requests[due[at]].arrival_s if at < len(due) else float("inf")
                    if self._decode(until_s, on_done):
                        continue
                    empty_steps = 0 if self._step(on_done) else empty_steps + 1
                    if empty_steps > 1:
                        raise InvariantError("the scheduler has requests and runs none of them")
                elif at < len(due):
                    self._now_s = requests[due[at]].arrival_s
                else:
                    return self._result()

    def _submit(self, request: SimRequest, number: int) -> None:
        try:
            view = self.scheduler.add(
                request.to_request(number), block_hashes=request.block_hashes(number, self._block_size)
            )
        except UsageError as error:
            self._log.records.append(_failed(request, str(error)))
            return
        self._live[view.request_id] = _Live(request, number)
        seconds = self.cost.submission_s(request.num_prompt_tokens)
        self._now_s += seconds
        self._log.submission_s += seconds

    def _step(self, on_done: Callable[[int], None] | None) -> bool:
        """One step; False when the scheduler ran nothing."""
        start_s = self._now_s
        output = self.scheduler.schedule()
        if not output.num_chunks:
            return False
        row = self._shapes.row(output)
        seconds = self.cost.step_s(row)
        self._now_s = start_s + seconds
        sampled = tuple(
            Sampled(request_id=request_id, token_id=self._live[request_id].next_token())
            for request_id in output.sampling_ids
        )
        load = (row[0] + row[2], row[0], self.scheduler.num_running, self.scheduler.num_waiting)
        updates = self.scheduler.update(output, RunnerOutput(sampled=sampled))
        self._finish_all(updates.ended, on_done)
        self._log.steps.extend((start_s, seconds, *load, *self._blocks(), *_admissions(output)))
        if self.on_step is not None:
            self.on_step(output)
        return True

    def _decode(self, until_s: float, on_done: Callable[[int], None] | None) -> bool:
        """Make the decode steps before the next arrival as one; False where each must be decided."""
        run = None if self.on_step is not None else self.scheduler.decode_run()
        if run is None:
            return False
        tables = [self.manager.block_tables(s.request_id) for s in run.sequences]
        contexts = run.contexts()
        overlap = self._shapes.geometry.overlap(tables, contexts - 1)
        rows = self._shapes.decode_rows(contexts, run.num_steps, overlap=overlap)
        seconds = self.cost.seconds(rows)
        edges = np.cumsum(np.concatenate(([self._now_s], seconds)))  # adds in order, as step after step would
        num_steps = min(run.num_steps, int(np.searchsorted(edges[1:], until_s)) + 1)
        self._shapes.decoded(num_steps)
        start_s, end_s = edges[:num_steps], edges[1 : num_steps + 1]
        self._now_s = float(end_s[-1])
        num_running, num_waiting = self.scheduler.num_running, self.scheduler.num_waiting
        tokens = [self._live[s.request_id].next_tokens(num_steps) for s in run.sequences]
        before = self._blocks()
        self._finish_all(self.scheduler.perform(run, tokens, end_s.tolist()), on_done)
        after = self._blocks()
        steps = np.zeros((num_steps, len(STEP_COLUMNS)))
        steps[:, 0], steps[:, 1] = start_s, seconds[:num_steps]
        steps[:, 2:6] = len(tokens), len(tokens), num_running, num_waiting
        steps[:, 6] = np.linspace(before[0], after[0], num_steps)
        steps[:, 7] = np.linspace(before[1], after[1], num_steps)
        self._log.steps.frombytes(steps.tobytes())
        return True

    def _blocks(self) -> tuple[int, int]:
        """Blocks of all groups referenced and idle."""
        usage = self.manager.usage()
        return sum(group.referenced for group in usage), sum(group.idle for group in usage)

    def _finish_all(self, updates: Sequence[SequenceUpdate], on_done: Callable[[int], None] | None) -> None:
        """`updates`: of requests that ended."""
        for update in updates:
            self._finish(update.sequence)
            if on_done is not None:
                on_done(len(self._log.records))

    def _finish(self, sequence: SequenceView) -> None:
        live = self._live.pop(sequence.request_id)
        metrics = sequence.metrics
        self._log.records.append(
            BenchRecord(
                request_id=live.request.request_id,
                start_s=metrics.arrival_s,
                input_tokens=sequence.num_prompt_tokens,
                output_tokens=sequence.num_output_tokens,
                cached_tokens=sequence.num_cached_tokens,
                ttft_s=metrics.ttft_s,
                tpot_s=metrics.tpot_s,
                e2e_s=metrics.e2e_s,
                itl_s=np.diff(np.array(metrics.token_times_s)),
            )
        )
        self._log.queue_s.append((metrics.first_scheduled_s or 0.0) - metrics.arrival_s)
        self._log.preempted_requests += sequence.num_preemptions > 0

    def _result(self) -> SimulationRun:
        log = self._log
        steps = np.array(log.steps).reshape(-1, len(STEP_COLUMNS))
        return SimulationRun(
            records=tuple(log.records),
            steps=steps,
            queue_s=np.array(log.queue_s),
            preempted_requests=log.preempted_requests,
            duration_s=self._now_s,
            busy_s=log.submission_s + float(steps[:, 1].sum()),
            num_blocks=self.num_blocks,
            cache=self.manager.stats(),
            scheduler=self.scheduler.stats(),
        )


def _admissions(output: SchedulerOutput) -> tuple[int, int, int]:
    """Requests preempted, prompt tokens found in the cache, prompt tokens of new admissions."""
    admitted = [a for a in output.admitted if not a.is_resumed]
    cached = sum(a.num_cached_tokens for a in admitted)
    return len(output.preempted), cached, cached + sum(sum(a.misses.values()) for a in admitted)


def _failed(request: SimRequest, reason: str) -> BenchRecord:
    return BenchRecord(
        request_id=request.request_id, start_s=request.arrival_s, input_tokens=request.num_prompt_tokens,
        output_tokens=0, cached_tokens=None, ttft_s=None, tpot_s=None, e2e_s=None, error=reason,
    )  # fmt: skip


@contextmanager
def _without_garbage_collection() -> Generator[None]:
    """Millions of records without cycles: collecting costs a third of the time and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
