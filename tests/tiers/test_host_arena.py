"""The host arena keeps the port's contract, and takes memory only as it needs it."""

import resource

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.testing.tier import TierSuite
from kvtune.tiers import HostArena


class TestHostArena(TierSuite):
    def make_tier(self, *, capacity_bytes):
        return HostArena(capacity_bytes)


def test_an_arena_that_is_not_used_takes_no_memory_and_slots_are_used_again():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arena = HostArena(1 << 40)
    payload = np.zeros(1 << 16, dtype=np.uint8)
    for i in range(4000):  # 250 MiB through a few slots
        assert arena.put(str(i).encode(), payload)
        arena.discard(str(i - 3).encode())
    assert len(arena) == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_negative_capacity_is_refused():
    with pytest.raises(UsageError, match="capacity of at least 0 bytes, found -1"):
        HostArena(-1)
