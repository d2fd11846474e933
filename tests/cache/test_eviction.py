"""Eviction policies: the conformance suites, and the order each one promises."""

import numpy as np
import pytest

from kvtune.cache.eviction import FIFO, LRU, POLICIES, policy_factory
from kvtune.cache.eviction_gdsf import GDSF
from kvtune.cache.eviction_guarded import Guarded
from kvtune.cache.eviction_hazard import Hazard
from kvtune.errors import UsageError
from kvtune.testing.eviction_policy import EvictionPolicySuite, LeafFirstSuite


class TestLRUConforms(EvictionPolicySuite):
    def make_policy(self):
        return LRU()


class TestLRUIsLeafFirst(LeafFirstSuite):
    def make_policy(self):
        return LRU()


class TestFIFOConforms(EvictionPolicySuite):
    def make_policy(self):
        return FIFO()


def drain(policy):
    left = []
    while (victim := policy.victim()) is not None:
        policy.remove(victim)
        left.append(victim)
    return left


def test_lru_evicts_by_last_use():
    policy = LRU()
    for block in (1, 2, 3):
        policy.insert(block, depth=0)
    for block in (2, 3, 1):
        policy.unpin(block)
    policy.pin(2)
    policy.unpin(2)
    assert drain(policy) == [3, 1, 2]


def test_lru_does_the_same_for_many_blocks_at_once():
    rng = np.random.default_rng(4)
    single, many = LRU(), LRU()
    resident, pinned = set(), set()
    for _ in range(400):
        num = int(rng.choice([3, 30, 200]))
        verb = rng.integers(4)
        idle = sorted(resident - pinned)
        if verb == 0:
            ids = rng.permutation(sorted(set(range(600)) - resident))[:num].astype(np.int32)
            many.insert_all(ids)
            for block in ids.tolist():
                single.insert(block, depth=0)
            resident |= set(ids.tolist())
            pinned |= set(ids.tolist())
        elif verb == 1:
            ids = rng.permutation(sorted(pinned))[:num].astype(np.int32)
            many.unpin_all(ids)
            for block in ids.tolist():
                single.unpin(block)
            pinned -= set(ids.tolist())
        elif verb == 2:
            ids = rng.permutation(idle)[:num].astype(np.int32)
            many.pin_all(ids)
            for block in ids.tolist():
                single.pin(block)
            pinned |= set(ids.tolist())
        else:
            ids = many.take_oldest(num // 3)
            for block in ids.tolist():
                assert single.victim() == block
                single.remove(block)
            resident -= set(ids.tolist())
        assert len(single) == len(many) == len(resident - pinned)
        assert single.victim() == many.victim()
    fresh = np.arange(600, 800, dtype=np.int32)
    for policy in (single, many):
        policy.insert_all(fresh)
        policy.unpin_all(fresh)
        for refused in (policy.insert_all, policy.unpin_all):
            with pytest.raises(KeyError):
                refused(fresh)
    assert drain(single) == drain(many) != []


def test_lru_forgets_outdated_uses():
    policy = LRU()
    for block in range(4):
        policy.insert(block, depth=0)
    for step in range(20_000):
        policy.unpin(step % 4)
        policy.pin(step % 4)
    assert policy.num_uses < 5000


def test_fifo_evicts_by_first_insertion_whatever_was_used_since():
    policy = FIFO()
    for block in (4, 2, 3):
        policy.insert(block, depth=0)
    for block in (3, 2, 4, 3):
        if block == 3 and len(policy) == 3:
            policy.pin(3)
        policy.unpin(block)
    assert drain(policy) == [4, 2, 3]


def test_fifo_counts_a_block_that_came_back_as_new():
    policy = FIFO()
    for block in (1, 2):
        policy.insert(block, depth=0)
        policy.unpin(block)
    policy.remove(1)
    policy.insert(1, depth=0)
    policy.unpin(1)
    assert drain(policy) == [2, 1]


def test_policies_are_found_by_name_and_unknown_names_are_refused():
    assert {name: type(policy_factory(name)(8)) for name in POLICIES} == {
        "guarded": Guarded,
        "lru": LRU,
        "fifo": FIFO,
        "gdsf": GDSF,
        "hazard": Hazard,
    }
    with pytest.raises(UsageError, match="unknown eviction policy 'clock'; known: guarded, lru, fifo, gdsf"):
        policy_factory("clock")


def test_a_factory_of_the_callers_own_is_taken_as_it_is():
    class Mine(LRU):
        pass

    assert policy_factory(Mine) is Mine
