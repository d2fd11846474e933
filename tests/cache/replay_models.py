"""Textbook replays, written for reading alone: the definitions the fast cores are held to.

Each answers, per request, (blocks hit, blocks that left in order). A request is a list of keys, head to tail;
a key names a whole prefix. Everything is a plain list scanned from end to end.
"""

from __future__ import annotations

import itertools
import random

import numpy as np

from kvtune.workload import BlockTrace


def leading_run(request, resident):
    return next((i for i, key in enumerate(request) if key not in resident), len(request))


def replay_by_rank(requests, capacity, rank, *, is_pinned=True):
    """Insert everything, then let the block with the lowest rank leave until the rest fits.

    `rank(key, now)` orders the blocks; with `is_pinned` the current request's blocks leave only once nothing
    else is left, deepest first.
    """
    resident, steps = [], []
    for now, request in enumerate(requests):
        hit = leading_run(request, resident)
        resident += [key for key in request if key not in resident]
        gone = []
        while len(resident) > capacity:
            others = [key for key in resident if key not in request] if is_pinned else resident
            own = sorted(request, key=request.index, reverse=True)
            key = (
                min(others, key=lambda key: rank(key, now))
                if others
                else next(k for k in own if k in resident)
            )
            resident.remove(key)
            gone.append(key)
        steps.append((hit, gone))
    return steps


def depths(requests):
    return {key: depth for request in requests for depth, key in enumerate(request)}


def lru(requests, capacity):
    depth = depths(requests)

    def rank(key, now):
        last = max(r for r in range(now + 1) if key in requests[r])
        return last, -depth[key]

    return replay_by_rank(requests, capacity, rank)


def lfu(requests, capacity):
    """Uses since the last insertion, which a replay has to follow by itself."""
    depth, resident, uses, last, steps = depths(requests), [], {}, {}, []
    for now, request in enumerate(requests):
        hit = leading_run(request, resident)
        for key in request:
            uses[key] = uses[key] + 1 if key in resident else 1
            last[key] = now
        resident += [key for key in request if key not in resident]
        gone = []
        while len(resident) > capacity:
            others = [key for key in resident if key not in request]
            ranked = sorted(others, key=lambda key: (uses[key], last[key], -depth[key]))
            own = sorted((k for k in request if k in resident), key=request.index, reverse=True)
            gone.append((ranked or own)[0])
            resident.remove(gone[-1])
        steps.append((hit, gone))
    return steps


def fifo(requests, capacity):
    order, steps = [], []
    for request in requests:
        hit, gone = leading_run(request, order), []
        for key in request:
            if key not in order:
                if len(order) == capacity:
                    gone.append(order.pop(0))
                order.append(key)
        steps.append((hit, gone))
    return steps


def belady_rank(requests, number):
    """Furthest next use first, then deepest, then the higher number."""
    depth = depths(requests)

    def rank(key, now):
        later = (r for r in range(now + 1, len(requests)) if key in requests[r])
        return -next(later, len(requests)), -depth[key], -number[key]

    return rank


def optimal(requests, capacity, number):
    return replay_by_rank(requests, capacity, belady_rank(requests, number), is_pinned=False)


def optimal_pinned(requests, capacity, number):
    return replay_by_rank(requests, capacity, belady_rank(requests, number))


def most_hits(requests, capacity, *, is_pinned):
    """The most hit blocks that any rule could serve, by trying every cache content after every request."""
    best = {frozenset(): 0}
    for request in requests:
        following = {}
        for resident, hits_before in best.items():
            hits = hits_before + leading_run(request, resident)
            must = frozenset(request[:capacity]) if is_pinned else frozenset()
            may = sorted((resident | set(request)) - must)
            for size in range(capacity - len(must) + 1):
                for kept in itertools.combinations(may, min(size, len(may))):
                    after = must | set(kept)
                    following[after] = max(hits, following.get(after, -1))
        best = following
    return max(best.values(), default=0)


def random_requests(seed, *, count=120, branches=2, deepest=6):
    """Paths through a small tree; a key is the whole prefix."""
    rng = random.Random(seed)
    for _ in range(count):
        path = tuple(rng.randrange(branches) for _ in range(rng.randrange(0, deepest + 1)))
        yield [path[: i + 1] for i in range(len(path))]


def trace_of(requests, *, block_size=16, tenants=None):
    """(BlockTrace of keys, number of each key); a request's last block holds a token less."""
    number = {}
    ids = [number.setdefault(key, len(number)) for request in requests for key in request]
    lengths = [len(request) for request in requests]
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.full(len(ids), block_size, dtype=np.int32)
    tokens[start[1:][np.diff(start) > 0] - 1] = block_size - 1
    names = tenants or [""] * len(requests)
    known = tuple(dict.fromkeys(names)) or ("",)
    trace = BlockTrace(
        block_ids=np.asarray(ids, dtype=np.int64),
        request_start=start,
        block_tokens=tokens,
        arrival_s=np.arange(len(requests), dtype=np.float64),
        tenant=np.asarray([known.index(name) for name in names], dtype=np.int32),
        block_size=block_size,
        num_unique=len(number),
        prompt_tokens=np.asarray([max(0, n * block_size - 1) for n in lengths], dtype=np.int64),
        session=np.full(len(requests), -1, dtype=np.int32),
        request_class=np.zeros(len(requests), dtype=np.int32),
        tenants=known,
    )
    return trace, number
