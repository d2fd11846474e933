"""The policies that learn: conformance, what each promises beyond it, and the guard over a bad learner."""

import random

import numpy as np
import pytest
import replay_models as textbook

from kvtune.cache.eviction import LRU
from kvtune.cache.eviction_gdsf import GDSF
from kvtune.cache.eviction_guarded import Guarded
from kvtune.cache.eviction_hazard import Hazard
from kvtune.cache.eviction_survival import NUM_AGES, NUM_CLASSES, Survival
from kvtune.cache.replay import Replayer
from kvtune.testing.eviction_policy import EvictionPolicySuite, LeafFirstSuite


class TestGDSFConforms(EvictionPolicySuite):
    def make_policy(self):
        return GDSF(24)


class TestGDSFIsLeafFirst(LeafFirstSuite):
    def make_policy(self):
        return GDSF(24)


class TestHazardConforms(EvictionPolicySuite):
    def make_policy(self):
        return Hazard(24)


class TestHazardIsLeafFirst(LeafFirstSuite):
    def make_policy(self):
        return Hazard(24)


class TestGuardedConforms(EvictionPolicySuite):
    def make_policy(self):
        return Guarded(24)


class TestGuardedIsLeafFirst(LeafFirstSuite):
    def make_policy(self):
        return Guarded(24)


class Pool:
    """Serves requests, lists of content names, as the manager does: for policies under test alone."""

    def __init__(self, policy, capacity):
        self.policy, self.capacity = policy, capacity
        self.ids, self.free = {}, list(range(capacity))
        self.num_hit = 0

    def serve(self, request):
        run = next((i for i, name in enumerate(request) if name not in self.ids), len(request))
        self.num_hit += run
        self.policy.begin(request, run)
        for name in request[:run]:
            self.policy.pin(self.ids[name])
        for depth in range(run, len(request)):
            block = self.free.pop() if self.free else self._evict()
            self.ids[request[depth]] = block
            parent = self.ids[request[depth - 1]] if depth else None
            self.policy.insert(block, depth=depth, content=request[depth], parent=parent)
        for name in reversed(request):
            self.policy.unpin(self.ids[name])

    def _evict(self):
        victim = self.policy.victim()
        self.policy.remove(victim)
        del self.ids[next(name for name, block in self.ids.items() if block == victim)]
        return victim


def serve(policy, requests, capacity):
    pool = Pool(policy, capacity)
    for request in requests:
        pool.serve(request)
    return pool


def visits(seed, *, count=3000):
    """Returning conversations of 4 blocks among questions nobody asks twice."""
    rng = random.Random(seed)
    for i in range(count):
        name = f"once-{i}" if rng.random() < 0.6 else f"again-{rng.randrange(12)}"
        yield [(name, depth) for depth in range(4)]


def test_gdsf_keeps_what_was_used_often_even_after_an_eviction():
    policy = GDSF(4)
    pool = serve(policy, [["a"]] * 5 + [["b"], ["c"], ["d"], ["e"]], 4)
    assert set(pool.ids) == {"a", "c", "d", "e"}  # lru would have dropped a
    for number in range(40):
        pool.serve([f"x{number}"])  # L rises until a leaves
    assert "a" not in pool.ids
    pool.serve(["a"])
    for number in range(5):
        pool.serve([f"y{number}"])
    assert "a" in pool.ids


def test_gdsf_favours_the_deeper_of_two_blocks_used_alike():
    """Both paths leave leaf first; of the leaves the one that costs more to compute again stays."""
    long, short = [("l", depth) for depth in range(600)], ["s"]
    pool = serve(GDSF(602), [long, short, ["t"], ["u"]], 602)
    assert ("l", 599) in pool.ids
    assert "s" not in pool.ids


def test_hazard_is_lru_until_it_has_learned_something():
    requests = list(textbook.random_requests(2, count=40))
    trace, _ = textbook.trace_of(requests)
    assert trace.num_references < 256
    logs = [Replayer(trace, core="python").replay(p, 9, keep_log=True).evictions for p in ("lru", "hazard")]
    assert logs[0].tolist() == logs[1].tolist()


@pytest.mark.parametrize("policy", [Hazard, Guarded])
def test_learning_keeps_those_that_return_and_lets_go_of_those_that_never_do(policy):
    lru, learned = (serve(p, visits(5), 40) for p in (LRU(), policy(40)))
    assert learned.num_hit > 1.3 * lru.num_hit
    assert sum(name.startswith("again") for name, _ in learned.ids) >= 32


def test_the_score_is_the_best_rate_of_hits_over_all_horizons():
    """Against a plain double loop over the definition."""
    rng = np.random.default_rng(3)
    survival = Survival()
    for _ in range(4000):
        block_class, bucket = int(rng.integers(NUM_CLASSES)), int(rng.integers(NUM_AGES))
        survival.add_at_risk(block_class, bucket, int(rng.integers(1, 9)))
        if rng.random() < 0.5:
            survival.add_used(block_class, survival.edges[bucket])
    assert survival.advance(300, 2.0)
    edges = survival.edges
    hazard = _shrunk(survival, 2.0)
    for block_class in range(0, NUM_CLASSES, 17):
        lowest = np.inf
        for b in range(NUM_AGES - 1):
            rates, alive, room = [], 1.0, 0.0
            for k in range(b, NUM_AGES - 1):
                p = min(hazard[block_class, k], 0.999)
                room += alive * (1 - p / 2) * (edges[k + 1] - edges[k])
                alive *= 1 - p
                rates.append((1 - alive) / room)
            lowest = min(lowest, max(rates))
            assert survival.score(block_class, edges[b]) == pytest.approx(lowest, rel=1e-12)


def _shrunk(survival, blocks_per_release):
    """Hazards by the definition: each class leans on the wider one with the weight of 4 releases."""
    used = survival._used.reshape(3, 5, 8, NUM_AGES)
    at_risk = survival._at_risk.reshape(3, 5, 8, NUM_AGES)
    weight, hazard = 4 * blocks_per_release, np.full(NUM_AGES, 0.05)
    for axes in ((0, 1, 2), (1, 2), (2,), ()):
        hazard = (used.sum(axes) + hazard * weight) / (at_risk.sum(axes) + weight)
        hazard = hazard[..., None, :]
    return np.broadcast_to(hazard[..., 0, :], used.shape).reshape(-1, NUM_AGES)


class Perverse(GDSF):
    """Lets go of the leaf used last: the worst learner there is."""

    choose = staticmethod(max)

    def victim(self):
        leaves = (block for block in self._resident.values() if not block.is_pinned and block.may_leave)
        chosen = self.choose(leaves, key=lambda block: block.order, default=None)
        return None if chosen is None else chosen.block_id


def local_requests(seed, count):
    """A working set that moves on slowly: LRU is right here."""
    rng = random.Random(seed)
    for i in range(count):
        name = i // 20 - rng.randrange(20)
        yield [(name, depth) for depth in range(3)]


def test_the_guard_bounds_what_the_worst_learner_can_lose():
    requests, capacity = list(local_requests(1, 20_000)), 80
    lru = serve(LRU(), requests, capacity).num_hit
    unguarded = serve(Perverse(), requests, capacity).num_hit
    guard = Guarded(capacity, learned=Perverse)
    guarded = serve(guard, requests, capacity).num_hit
    references = 3 * len(requests)
    assert lru - unguarded > 0.5 * references, "the learner must be bad, or the test shows nothing"
    assert lru - guarded == guard.num_behind
    assert lru - guarded <= references / 400 + 32 + 2 * capacity


def test_the_guard_gives_a_learner_that_came_right_another_chance():
    class Repentant(Perverse):
        num_requests = 0

        def begin(self, contents, num_hit):
            self.num_requests += 1
            if self.num_requests == 2000:
                self.choose = min  # least recently used from now on

    guard = Guarded(80, learned=Repentant)
    pool = Pool(guard, 80)
    states = []
    for request in local_requests(4, 30_000):
        pool.serve(request)
        states.append(guard.is_lru)
    assert any(states[:2000])
    assert not states[-1]


def test_the_guard_counts_the_shadow_as_a_pure_lru_cache_would_hit():
    requests = list(textbook.random_requests(9, count=3000, branches=3, deepest=7))
    guard, capacity = Guarded(60), 60
    guarded, lru = serve(guard, requests, capacity), serve(LRU(), requests, capacity)
    assert guard.num_behind == lru.num_hit - guarded.num_hit


@pytest.mark.parametrize("policy", [GDSF, Hazard, Guarded])
def test_blocks_that_a_window_has_passed_may_leave_before_the_blocks_in_use(policy):
    """A sliding group gives up early blocks while later ones of the same request are in use."""
    order = policy(8)
    order.begin(list("abcdef"), 0)
    for depth, name in enumerate("abcdef"):
        order.insert(depth, depth=depth, content=name, parent=depth - 1 if depth else None)
    for depth in range(4):
        order.unpin(depth)  # the window has passed a to d; e and f are in use
    left = []
    for _ in range(4):
        left.append(order.victim())
        order.remove(left[-1])
    assert sorted(left) == [0, 1, 2, 3]
    assert order.victim() is None


@pytest.mark.parametrize("policy", [GDSF, Hazard, Guarded])
def test_a_window_hit_frees_the_blocks_before_it(policy):
    """A request pins the last blocks of a path alone: those before them wait for nobody."""
    order = policy(8)
    order.begin(list("abcd"), 0)
    for depth, name in enumerate("abcd"):
        order.insert(depth, depth=depth, content=name, parent=depth - 1 if depth else None)
    for depth in (3, 2, 1, 0):
        order.unpin(depth)
    assert order.victim() == 3
    order.begin(list("abcd"), 4)
    order.pin(2)
    order.pin(3)
    left = []
    for _ in range(2):
        left.append(order.victim())
        order.remove(left[-1])
    assert sorted(left) == [0, 1]
    assert len(order) == 0


@pytest.mark.parametrize("policy", [Hazard, GDSF])
def test_what_is_remembered_of_evicted_blocks_is_bounded(policy):
    order = policy(10)
    pool = serve(order, ([f"n{i}"] for i in range(2000)), 10)
    assert len(pool.ids) == 10
    assert len(order._ghosts) == 80
