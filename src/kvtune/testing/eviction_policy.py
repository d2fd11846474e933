"""Conformance of an `EvictionPolicy`: each sentence of the port's contract, proved."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from kvtune.cache.eviction import EvictionPolicy
from kvtune.types import BlockId

__all__ = ["EvictionPolicySuite", "LeafFirstSuite"]


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except KeyError:
        return True
    return False


def _idle(policy: EvictionPolicy, block_id: int, *, depth: int = 0) -> BlockId:
    """Insert a block and make it a candidate."""
    policy.insert(BlockId(block_id), depth=depth)
    policy.unpin(BlockId(block_id))
    return BlockId(block_id)


def _evict(policy: EvictionPolicy) -> BlockId:
    victim = policy.victim()
    assert victim is not None, "there are candidates, but no victim"
    policy.remove(victim)
    return victim


class EvictionPolicySuite:
    """Subclass with `make_policy`; holds for every policy, whatever order it prefers."""

    def make_policy(self) -> EvictionPolicy:
        """A fresh, empty policy."""
        raise NotImplementedError

    def test_an_empty_policy_has_no_victim(self) -> None:
        policy = self.make_policy()
        assert policy.victim() is None
        assert len(policy) == 0

    def test_a_block_in_use_is_no_candidate(self) -> None:
        policy = self.make_policy()
        policy.insert(BlockId(3), depth=0)
        assert policy.victim() is None
        assert len(policy) == 0

    def test_an_unpinned_block_becomes_the_victim(self) -> None:
        policy = self.make_policy()
        _idle(policy, 3)
        assert policy.victim() == 3
        assert len(policy) == 1

    def test_asking_for_the_victim_changes_no_answer(self) -> None:
        policy = self.make_policy()
        for block_id in range(5):
            _idle(policy, block_id)
        assert len({policy.victim() for _ in range(4)}) == 1
        assert len(policy) == 5

    def test_a_pinned_block_is_never_the_victim(self) -> None:
        policy = self.make_policy()
        for block_id in range(6):
            _idle(policy, block_id)
        policy.pin(BlockId(0))
        policy.pin(BlockId(5))
        assert {_evict(policy) for _ in range(4)} == {1, 2, 3, 4}
        assert policy.victim() is None
        policy.unpin(BlockId(5))
        assert policy.victim() == 5

    def test_every_candidate_leaves_exactly_once(self) -> None:
        policy = self.make_policy()
        for block_id in range(50):
            _idle(policy, block_id, depth=block_id % 7)
        left = [_evict(policy) for _ in range(50)]
        assert sorted(left) == list(range(50))
        assert policy.victim() is None

    def test_an_id_can_come_back_after_it_left(self) -> None:
        policy = self.make_policy()
        _idle(policy, 1)
        assert _evict(policy) == 1
        policy.insert(BlockId(1), depth=4)
        assert policy.victim() is None
        policy.unpin(BlockId(1))
        assert _evict(policy) == 1

    def test_misuse_raises_key_error(self) -> None:
        policy = self.make_policy()
        policy.insert(BlockId(1), depth=0)
        assert _refuses(lambda: policy.insert(BlockId(1), depth=0)), "inserted twice"
        assert _refuses(lambda: policy.pin(BlockId(1))), "pinned while pinned"
        assert _refuses(lambda: policy.remove(BlockId(1))), "removed while pinned"
        assert _refuses(lambda: policy.unpin(BlockId(2))), "unpinned, never inserted"
        policy.unpin(BlockId(1))
        assert _refuses(lambda: policy.unpin(BlockId(1))), "unpinned twice"

    def test_random_lives_agree_with_a_plain_set(self) -> None:
        rng = random.Random(7)  # noqa: S311  a test sequence, not a secret
        policy = self.make_policy()
        pinned: set[BlockId] = set()
        idle: set[BlockId] = set()
        for _ in range(5000):
            block_id = BlockId(rng.randrange(24))
            if block_id in pinned:
                policy.unpin(block_id)
                pinned.remove(block_id)
                idle.add(block_id)
            elif block_id not in idle:
                policy.insert(block_id, depth=rng.randrange(4))
                pinned.add(block_id)
            elif rng.random() < 0.7:
                policy.pin(block_id)
                idle.remove(block_id)
                pinned.add(block_id)
            else:
                idle.remove(_evict(policy))
            victim = policy.victim()
            assert len(policy) == len(idle)
            assert (victim in idle) if idle else victim is None

    def test_cost_per_eviction_does_not_grow_with_the_number_of_blocks(self) -> None:
        small, large = self._seconds_per_block(1 << 10), self._seconds_per_block(1 << 14)
        assert large < 8 * small, f"16x the blocks cost {large / small:.1f}x per block; linear would be 16x"

    def _seconds_per_block(self, num_blocks: int) -> float:
        def run() -> float:
            policy = self.make_policy()
            start = time.process_time()
            for block_id in range(num_blocks):
                _idle(policy, block_id)
            for _ in range(num_blocks):
                _evict(policy)
            return (time.process_time() - start) / num_blocks

        return min(run() for _ in range(4))


class LeafFirstSuite:
    """Subclass with `make_policy` for a policy that keeps prefixes whole: when requests unpin deepest
    first, no block leaves before its resident children."""

    def make_policy(self) -> EvictionPolicy:
        """A fresh, empty policy."""
        raise NotImplementedError

    def test_children_leave_before_their_parents(self) -> None:
        rng = random.Random(11)  # noqa: S311  a test sequence, not a secret
        policy = self.make_policy()
        resident: dict[tuple[int, ...], BlockId] = {}
        free = [BlockId(i) for i in range(24)]
        for _ in range(3000):
            path = tuple(rng.randrange(2) for _ in range(rng.randrange(1, 6)))
            prefixes = [path[: i + 1] for i in range(len(path))]
            policy.begin(prefixes, sum(prefix in resident for prefix in prefixes))
            for prefix in prefixes:
                if prefix in resident:
                    policy.pin(resident[prefix])
            for depth, prefix in enumerate(prefixes):
                if prefix not in resident:
                    if not free:
                        free.append(self._evict_leaf(policy, resident))
                    resident[prefix] = free.pop()
                    parent = resident[prefix[:-1]] if depth else None
                    policy.insert(resident[prefix], depth=depth, content=prefix, parent=parent)
            for prefix in reversed(prefixes):
                policy.unpin(resident[prefix])

    def _evict_leaf(self, policy: EvictionPolicy, resident: dict[tuple[int, ...], BlockId]) -> BlockId:
        victim = _evict(policy)
        path = next(p for p, block_id in resident.items() if block_id == victim)
        del resident[path]
        orphans = [p for p in resident if p[: len(path)] == path]
        assert not orphans, f"{path} left before its children {orphans}"
        return victim
