"""Trace replay: what a prefix cache of a given size and eviction policy would hit on recorded traffic.

Requests come in arrival order. A block is identified by its whole prefix; a hit is the longest leading run of
resident blocks; after the lookup all blocks of the request are inserted, the partial last one included, and
the cache is trimmed to capacity one block at a time. Output tokens are not inserted. With `full_blocks_only`
the rules are those of `KVCacheManager` serving one request after the other, eviction by eviction.

`guarded`, the default, learns which blocks return and falls back to LRU where that does not pay. `lru` keeps
each request's head longest; `lfu` is textbook; `fifo` is by first insertion. `optimal` is
Belady's rule with bypass, which no rule can beat; `optimal_pinned` must admit the current request, as an
engine must. Array-based and native (csrc/), with a pure-Python twin of the same answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from kvtune.cache.replay_native import NativeCore, NativeCurve, NativeReplay, NativeTrace, library_path
from kvtune.cache.replay_python import PYTHON_POLICIES, PythonCurve, PythonReplay, PythonTrace
from kvtune.cache.replay_records import (
    Int32Array,
    IntArray,
    Outcome,
    ReplayJob,
    checked_arrays,
    engine_limits,
)
from kvtune.errors import HostError, UsageError
from kvtune.workload import BlockTrace

__all__ = ["DEFAULT_POLICY", "LRUCurve", "ReplayResult", "Replayer", "TenantHits", "policy_names"]

DEFAULT_POLICY: Final = "guarded"
OFFLINE_POLICIES: Final = ("optimal", "optimal_pinned")
_STEPS: Final = 100

Progress = Callable[[int, int], None]
"""Called with (references done, references in all) some hundred times a run."""


def policy_names() -> tuple[str, ...]:
    """Every policy a replay knows; the offline optima last."""
    return (*PYTHON_POLICIES, *OFFLINE_POLICIES)


@dataclass(frozen=True, slots=True)
class TenantHits:
    """One tenant's share of a replay."""

    tenant: str
    num_requests: int
    blocks_total: int
    blocks_hit: int
    tokens_total: int
    tokens_hit: int


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """What one policy hit at one capacity.

    `capacity_blocks` is None for an unbounded cache. `request_blocks` int64 [R] are the blocks that may be
    cached (with `full_blocks_only`: full ones); `tokens_total` counts all prompt tokens, those of unknown
    content included. `evictions` are the blocks that left, in order; None unless asked for. `core_bytes`:
    memory of the replay core, None where Python keeps it.
    """

    policy: str
    capacity_blocks: int | None
    request_blocks: npt.NDArray[np.int64]
    tokens_total: int
    outcome: Outcome
    evictions: Int32Array | None
    elapsed_s: float
    core: str
    core_bytes: int | None

    @property
    def num_requests(self) -> int:
        return len(self.outcome.hit_blocks)

    @cached_property
    def blocks_total(self) -> int:
        return int(self.request_blocks.sum())

    @cached_property
    def blocks_hit(self) -> int:
        return int(self.outcome.hit_blocks.sum(dtype=np.int64))

    @cached_property
    def tokens_hit(self) -> int:
        return int(self.outcome.hit_tokens.sum())

    @property
    def block_hit_rate(self) -> float:
        return _share(self.blocks_hit, self.blocks_total)

    @property
    def token_hit_rate(self) -> float:
        return _share(self.tokens_hit, self.tokens_total)

    @property
    def second_half_block_hit_rate(self) -> float:
        """Hit blocks over blocks of the later half of the requests, served by a warm cache."""
        half = self.num_requests // 2
        hits = int(self.outcome.hit_blocks[half:].sum(dtype=np.int64))
        return _share(hits, int(self.request_blocks[half:].sum(dtype=np.int64)))

    @property
    def num_evicted(self) -> int:
        return int(self.outcome.num_evicted.sum(dtype=np.int64))

    @property
    def num_rejected(self) -> int:
        """Requests that need more blocks than the cache has (`full_blocks_only` alone refuses them)."""
        return int(self.outcome.is_rejected.sum())


@dataclass(frozen=True, slots=True, eq=False)
class LRUCurve:
    """Exact LRU hits at every capacity: `hits[C]` blocks and `token_hits[C]` tokens at C blocks, int64
    [num_unique + 1]; larger caches hit no more."""

    hits: IntArray
    token_hits: IntArray
    blocks_total: int
    tokens_total: int
    elapsed_s: float
    core: str
    core_bytes: int | None

    def blocks_hit(self, capacity: int | None) -> int:
        return int(self.hits[self._at(capacity)])

    def block_hit_rate(self, capacity: int | None) -> float:
        return _share(self.blocks_hit(capacity), self.blocks_total)

    def token_hit_rate(self, capacity: int | None) -> float:
        return _share(int(self.token_hits[self._at(capacity)]), self.tokens_total)

    def capacity_for(self, blocks_hit: int) -> int | None:
        """The smallest capacity with at least so many hits, None where no capacity has."""
        at = int(np.searchsorted(self.hits, blocks_hit))
        return at if at < len(self.hits) else None

    def _at(self, capacity: int | None) -> int:
        largest = len(self.hits) - 1
        return largest if capacity is None else min(max(0, capacity), largest)


class _Run(Protocol):
    def run(self, until: int) -> None: ...
    def num_bytes(self) -> int | None: ...


class Replayer:
    """Replays of one trace. `core`: auto (native where it was built), native or python.

    UsageError for arrays that make no prefix tree, for an unknown policy or parameter, for a capacity below
    one block; HostError where the native core is asked for and absent.
    """

    def __init__(
        self,
        trace: BlockTrace,
        *,
        full_blocks_only: bool = False,
        core: str = "auto",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.trace = trace
        self._clock = clock
        self._limits = engine_limits(trace) if full_blocks_only else None
        self._trace = _prepared(trace, core)
        self.core = "native" if isinstance(self._trace, NativeTrace) else "python"

    @property
    def full_blocks_only(self) -> bool:
        """Whether requests are served by an engine's rules."""
        return self._limits is not None

    @cached_property
    def _request_blocks(self) -> npt.NDArray[np.int64]:
        """[R] references that may be cached."""
        if self._limits is None:
            return np.diff(self.trace.request_start)
        return self._limits.num_blocks.astype(np.int64)

    @cached_property
    def tokens_total(self) -> int:
        return int(self.trace.prompt_tokens.sum())

    def replay(
        self,
        policy: str = DEFAULT_POLICY,
        capacity: int | None = None,
        *,
        parameters: Mapping[str, float] | None = None,
        keep_log: bool = False,
        progress: Progress | None = None,
    ) -> ReplayResult:
        """Run `policy` in a cache of `capacity` blocks (None: unbounded) from empty."""
        job = ReplayJob(
            policy=_known(policy),
            capacity=self._unbounded() if capacity is None else _positive(capacity),
            limits=self._limits,
            parameters=dict(parameters or {}),
            keep_log=keep_log,
        )
        outcome = Outcome.empty(self.trace.num_requests)
        begin = self._clock()
        if isinstance(self._trace, NativeTrace):
            run = NativeReplay(self._trace, job, outcome)
        else:
            run = PythonReplay(self._trace, job, outcome)
        self._drive(run, progress)
        return ReplayResult(
            policy=policy,
            capacity_blocks=capacity,
            request_blocks=self._request_blocks,
            tokens_total=self.tokens_total,
            outcome=outcome,
            evictions=run.log() if keep_log else None,
            elapsed_s=self._clock() - begin,
            core=self.core,
            core_bytes=run.num_bytes(),
        )

    def lru_curve(self, *, first_counted: int = 0, progress: Progress | None = None) -> LRUCurve:
        """Exact LRU hits of all capacities in one pass over the stack distances (Mattson et al. 1970).

        Requests before number `first_counted` warm the cache and are not counted. UsageError with
        `full_blocks_only`: an engine's private blocks take room, so its caches of different sizes do not
        contain one another.
        """
        if self._limits is not None:
            raise UsageError(
                "the curve of all capacities is for plain trace replay, not for full blocks only"
            )
        begin = self._clock()
        if isinstance(self._trace, NativeTrace):
            run = NativeCurve(self._trace, first_counted=first_counted)
        else:
            run = PythonCurve(self._trace, first_counted=first_counted)
        self._drive(run, progress)
        first = int(self.trace.request_start[min(first_counted, self.trace.num_requests)])
        return LRUCurve(
            hits=np.cumsum(run.hit_blocks),
            token_hits=np.cumsum(run.hit_tokens),
            blocks_total=self.trace.num_references - first,
            tokens_total=int(self.trace.prompt_tokens[first_counted:].sum()),
            elapsed_s=self._clock() - begin,
            core=self.core,
            core_bytes=run.num_bytes(),
        )

    def tenants(self, result: ReplayResult) -> tuple[TenantHits, ...]:
        """The hits of each tenant, those with most prompt tokens first."""
        count, tenant = len(self.trace.tenants), self.trace.tenant
        outcome = result.outcome
        summed = (self._request_blocks, outcome.hit_blocks, self.trace.prompt_tokens, outcome.hit_tokens)
        columns = [np.bincount(tenant, weights=values, minlength=count).astype(np.int64) for values in summed]
        requests = np.bincount(tenant, minlength=count)
        order = np.argsort(-columns[2], kind="stable")
        return tuple(
            TenantHits(self.trace.tenants[i], int(requests[i]), *(int(column[i]) for column in columns))
            for i in order.tolist()
        )

    def _unbounded(self) -> int:
        slots = 0 if self._limits is None else int(self._limits.num_slots.max(initial=0))
        return max(1, self.trace.num_unique + slots)

    def _drive(self, run: _Run, progress: Progress | None) -> None:
        """Run in about a hundred steps of as many references each, so that Ctrl-C works between them."""
        start, total = self.trace.request_start, self.trace.num_references
        bounds = np.searchsorted(start, np.linspace(0, total, _STEPS + 1)[1:], side="left")
        for until in sorted({*bounds.tolist(), self.trace.num_requests}):
            run.run(until)
            if progress is not None:
                progress(int(start[min(until, self.trace.num_requests)]), total)


def _prepared(trace: BlockTrace, core: str) -> NativeTrace | PythonTrace:
    if core not in {"auto", "native", "python"}:
        raise UsageError(f"the replay core is auto, native or python, found {core!r}")
    arrays = checked_arrays(trace)
    path = None if core == "python" else library_path()
    if path is not None:
        return NativeTrace(NativeCore(path), arrays)
    if core == "native":
        raise HostError("the native replay core is not built; reinstall kvtune with a C++ compiler at hand")
    return PythonTrace(arrays)


def _known(policy: str) -> str:
    if policy not in policy_names():
        raise UsageError(f"unknown eviction policy {policy!r}; known: {', '.join(policy_names())}")
    return policy


def _positive(capacity: int) -> int:
    if capacity < 1:
        raise UsageError(f"the capacity must be at least 1 block, found {capacity}")
    return capacity


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
