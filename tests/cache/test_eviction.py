"""Eviction policies: the conformance suites, and the order each one promises."""

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
