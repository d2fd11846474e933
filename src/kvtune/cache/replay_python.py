"""The replay core in pure Python: the same answers as csrc/, block for block, some ten times slower.

It serves where the package was installed without a C++ compiler, and it is the second opinion the tests
hold the native core to. Policies are the classes that KVCacheManager runs.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from kvtune.cache.eviction import FIFO, LRU, EvictionPolicy
from kvtune.cache.eviction_gdsf import GDSF
from kvtune.cache.eviction_guarded import Guarded
from kvtune.cache.eviction_hazard import Hazard
from kvtune.cache.replay_policies import LFU, OptimalPinned, next_uses
from kvtune.cache.replay_records import Int32Array, IntArray, Outcome, ReplayJob, TraceArrays
from kvtune.errors import InvariantError, UsageError
from kvtune.types import BlockId

__all__ = ["PYTHON_POLICIES", "PythonCurve", "PythonPolicy", "PythonReplay", "PythonTrace"]


@dataclass(frozen=True, slots=True)
class PythonPolicy:
    """`make(capacity, **parameters)` builds the policy; `parameters` are the names it knows."""

    make: Callable[..., EvictionPolicy]
    parameters: tuple[str, ...] = ()


PYTHON_POLICIES: Final[Mapping[str, PythonPolicy]] = {
    "fifo": PythonPolicy(FIFO),
    "lru": PythonPolicy(LRU),
    "lfu": PythonPolicy(LFU),
    "gdsf": PythonPolicy(GDSF),
    "hazard": PythonPolicy(Hazard),
    "guarded": PythonPolicy(Guarded),
}
"""Twins of csrc/registry.h. The two offline optima are apart: they are built from a trace."""


class PythonTrace:
    """A checked trace. UsageError where its ids make no prefix tree."""

    def __init__(self, arrays: TraceArrays) -> None:
        self.arrays = arrays
        _check_offsets(arrays)
        _check_prefixes(arrays)


def _check_offsets(arrays: TraceArrays) -> None:
    start = arrays.request_start
    if start[0] != 0 or start[-1] != arrays.num_references or (np.diff(start) < 0).any():
        raise UsageError("block trace: its offsets do not rise from 0 to the number of block ids")
    ids = arrays.block_ids
    if len(ids) and (ids.min() < 0 or ids.max() >= arrays.num_unique):
        raise UsageError("block trace: it names a block outside 0..num_unique-1")


def _check_prefixes(arrays: TraceArrays) -> None:
    ids, start = arrays.block_ids, arrays.request_start
    depths = np.arange(len(ids)) - np.repeat(start[:-1], np.diff(start))
    parents = np.where(depths > 0, np.concatenate([[-1], ids[:-1]])[: len(ids)], -1)
    for values in (depths, parents):
        first = np.empty(arrays.num_unique, dtype=np.int64)
        first[ids[::-1]] = values[::-1]  # of equal indices the last assignment stays
        differs = np.flatnonzero(first[ids] != values)
        if len(differs):
            request = int(np.searchsorted(start, differs[0], side="right")) - 1
            raise UsageError(
                f"block trace, request {request}: a block has two depths or two parents there; ids must name "
                "whole prefixes"
            )


class _Cache:
    """Who is resident, and how many blocks left."""

    def __init__(self, job: ReplayJob) -> None:
        self.capacity = job.capacity
        self.resident: set[int] = set()
        self.num_evicted = 0
        self.log: list[int] | None = [] if job.keep_log else None

    def leave(self, block: int) -> None:
        """The block is evicted, or, not admitted at all, passes by."""
        self.resident.discard(block)
        self.num_evicted += 1
        if self.log is not None:
            self.log.append(block)


@dataclass(frozen=True, slots=True)
class _Request:
    index: int
    blocks: Sequence[int]
    """That may be cached."""
    num_slots: int
    num_hit: int


class _Server(Protocol):
    def serve(self, request: _Request) -> None: ...


class _PinnedServer:
    """Makes an EvictionPolicy's calls in KVCacheManager's order; see csrc/policy.h."""

    def __init__(self, cache: _Cache, policy: EvictionPolicy) -> None:
        self._cache, self._policy = cache, policy

    def serve(self, request: _Request) -> None:
        cache, policy = self._cache, self._policy
        kept = min(len(request.blocks), cache.capacity)
        policy.begin(request.blocks, request.num_hit)
        for block in request.blocks[: request.num_hit]:
            policy.pin(BlockId(block))
        self._make_room(min(request.num_slots, cache.capacity) - request.num_hit)
        for depth in range(request.num_hit, kept):
            block = BlockId(request.blocks[depth])
            if block in cache.resident:
                policy.pin(block)
            else:
                cache.resident.add(block)
                parent = BlockId(request.blocks[depth - 1]) if depth else None
                policy.insert(block, depth=depth, content=block, parent=parent)
        for depth in range(len(request.blocks) - 1, kept - 1, -1):
            cache.leave(request.blocks[depth])
        for depth in range(kept - 1, -1, -1):
            policy.unpin(BlockId(request.blocks[depth]))

    def _make_room(self, num_new: int) -> None:
        cache, policy = self._cache, self._policy
        for _ in range(num_new - (cache.capacity - len(cache.resident))):
            victim = policy.victim()
            if victim is None:
                raise InvariantError("the policy names no victim though candidates are left")
            policy.remove(victim)
            cache.leave(victim)


class _PinnedOptimumServer(_PinnedServer):
    def __init__(self, cache: _Cache, policy: OptimalPinned) -> None:
        super().__init__(cache, policy)
        self._optimum = policy

    def serve(self, request: _Request) -> None:
        self._optimum.look_at(request.index)
        super().serve(request)


class _FIFOServer:
    """Textbook fifo: room is made before each insert, and the current request's blocks may leave."""

    def __init__(self, cache: _Cache) -> None:
        self._cache = cache
        self._order: OrderedDict[int, None] = OrderedDict()

    def serve(self, request: _Request) -> None:
        cache, order = self._cache, self._order
        for block in request.blocks:
            if block in cache.resident:
                continue
            if len(cache.resident) == cache.capacity:
                cache.leave(order.popitem(last=False)[0])
            cache.resident.add(block)
            order[block] = None


class _OptimumServer:
    """Belady's rule with bypass: furthest next use first, then deepest, then the higher number."""

    def __init__(self, cache: _Cache, arrays: TraceArrays) -> None:
        self._cache, self._start = cache, arrays.request_start
        self._after = next_uses(arrays)
        self._next_use: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []

    def serve(self, request: _Request) -> None:
        cache = self._cache
        low = int(self._start[request.index])
        uses: list[int] = self._after[low : low + len(request.blocks)].tolist()
        for depth, (block, use) in enumerate(zip(request.blocks, uses, strict=True)):
            cache.resident.add(block)
            self._next_use[block] = use
            heapq.heappush(self._heap, (-use, -depth, -block))
        while len(cache.resident) > cache.capacity:
            use, _, block = heapq.heappop(self._heap)
            if self._next_use.get(-block) == -use:
                del self._next_use[-block]
                cache.leave(-block)


def _server(trace: PythonTrace, job: ReplayJob, cache: _Cache) -> _Server:
    is_optimum = job.policy in {"optimal", "optimal_pinned"}
    entry = None if is_optimum else PYTHON_POLICIES.get(job.policy)
    if not is_optimum and entry is None:
        raise UsageError("the replay core does not know this policy")
    known = () if entry is None else entry.parameters
    for name in job.parameters:
        if name not in known:
            raise UsageError(f"no policy parameter '{name}'; known here: {', '.join(known) or 'none'}")
    if job.policy == "optimal":
        return _OptimumServer(cache, trace.arrays)
    if entry is None:
        return _PinnedOptimumServer(cache, OptimalPinned(trace.arrays))
    if job.policy == "fifo" and job.limits is None:
        return _FIFOServer(cache)
    return _PinnedServer(cache, entry.make(job.capacity, **job.parameters))


class PythonReplay:
    """One replay of a job; `run` may be called in steps. The twin of NativeReplay."""

    name: Final = "python"

    def __init__(self, trace: PythonTrace, job: ReplayJob, outcome: Outcome) -> None:
        if job.capacity < 1:
            raise UsageError("the capacity must be at least 1 block")
        self._arrays, self._job, self._outcome = trace.arrays, job, outcome
        self._cache = _Cache(job)
        self._server = _server(trace, job, self._cache)
        self._position = 0

    def run(self, until: int) -> None:
        """Serve requests up to, not including, `until`."""
        for index in range(self._position, min(until, self._arrays.num_requests)):
            self._serve(index)
            self._position = index + 1

    def _serve(self, index: int) -> None:
        arrays, limits, cache = self._arrays, self._job.limits, self._cache
        low, high = int(arrays.request_start[index]), int(arrays.request_start[index + 1])
        num_slots = max_hit = high - low
        if limits is not None:
            high = low + int(limits.num_blocks[index])
            num_slots, max_hit = int(limits.num_slots[index]), int(limits.max_hit[index])
            if num_slots > cache.capacity:
                self._outcome.is_rejected[index] = 1
                return
        blocks: list[int] = arrays.block_ids[low:high].tolist()
        num_hit = 0
        for block in blocks[:max_hit]:
            if block not in cache.resident:
                break
            num_hit += 1
        before = cache.num_evicted
        self._server.serve(_Request(index, blocks, num_slots, num_hit))
        self._outcome.hit_blocks[index] = num_hit
        self._outcome.hit_tokens[index] = int(arrays.block_tokens[low : low + num_hit].sum())
        self._outcome.num_evicted[index] = cache.num_evicted - before

    def log(self) -> Int32Array:
        """The blocks that left, in order; empty unless the job keeps a log."""
        return np.asarray(self._cache.log or (), dtype=np.int32)

    def num_bytes(self) -> int | None:
        """Not known: Python's objects are counted by nobody."""
        return None


class PythonCurve:
    """The LRU hits of every capacity in one pass; the twin of NativeCurve (csrc/lru_curve.h says how)."""

    def __init__(self, trace: PythonTrace, *, first_counted: int = 0) -> None:
        arrays = trace.arrays
        self.hit_blocks: IntArray = np.zeros(arrays.num_unique + 1, dtype=np.int64)
        self.hit_tokens: IntArray = np.zeros(arrays.num_unique + 1, dtype=np.int64)
        self._arrays, self._first_counted = arrays, first_counted
        self._touched: dict[int, int] = {}
        self._times = _TouchTimes(2 * arrays.num_unique + 4096)
        self._now = self._position = 0

    def run(self, until: int) -> None:
        for index in range(self._position, min(until, self._arrays.num_requests)):
            self._serve(index, is_counted=index >= self._first_counted)
            self._position = index + 1

    def _serve(self, index: int, *, is_counted: bool) -> None:
        arrays, touched = self._arrays, self._touched
        low, high = int(arrays.request_start[index]), int(arrays.request_start[index + 1])
        blocks: list[int] = arrays.block_ids[low:high].tolist()
        if is_counted:
            for k, block in enumerate(blocks):
                if block not in touched:
                    break
                distance = len(touched) - self._times.rank(touched[block])
                self.hit_blocks[distance] += 1
                self.hit_tokens[distance] += arrays.block_tokens[low + k]
        for block in reversed(blocks):
            self._touch(block)

    def _touch(self, block: int) -> None:
        if self._now == self._times.size:
            self._compact()
        if block in self._touched:
            self._times.add(self._touched[block], -1)
        self._times.add(self._now, 1)
        self._touched[block] = self._now
        self._now += 1

    def _compact(self) -> None:
        order = sorted(self._touched, key=self._touched.__getitem__)
        self._touched = {block: time for time, block in enumerate(order)}
        self._times = _TouchTimes(self._times.size)
        for time in range(len(order)):
            self._times.add(time, 1)
        self._now = len(order)

    def num_bytes(self) -> int | None:
        return None


class _TouchTimes:
    """A Fenwick tree of ones at touch times."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tree = [0] * (size + 1)

    def add(self, time: int, change: int) -> None:
        i, tree = time + 1, self._tree
        while i <= self.size:
            tree[i] += change
            i += i & -i

    def rank(self, time: int) -> int:
        """Ones before `time`."""
        total, i, tree = 0, time, self._tree
        while i > 0:
            total += tree[i]
            i &= i - 1
        return total
