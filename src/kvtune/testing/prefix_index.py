"""Conformance of a `PrefixIndex`: each sentence of the port's contract, proved."""

from __future__ import annotations

import hashlib
import random

from kvtune.cache.prefix_index import PrefixIndex
from kvtune.types import BlockHash, BlockId

__all__ = ["PrefixIndexSuite"]


def _hash(number: int) -> BlockHash:
    return BlockHash(hashlib.sha256(number.to_bytes(8, "little")).digest())


class PrefixIndexSuite:
    """Subclass with `make_index`, which returns an index that remembers `max_evicted` evictions."""

    def make_index(self, *, max_evicted: int) -> PrefixIndex:
        """A fresh, empty index."""
        raise NotImplementedError

    def test_an_empty_index_finds_nothing(self) -> None:
        index = self.make_index(max_evicted=4)
        assert index.find(_hash(1)) is None
        assert len(index) == 0
        assert not index.was_evicted(_hash(1))

    def test_finds_what_was_inserted_and_only_that(self) -> None:
        index = self.make_index(max_evicted=4)
        index.insert(_hash(1), BlockId(0))
        index.insert(_hash(2), BlockId(7))
        assert (index.find(_hash(1)), index.find(_hash(2)), index.find(_hash(3))) == (0, 7, None)
        assert dict(index.items()) == {_hash(1): 0, _hash(2): 7}

    def test_finding_has_no_side_effect(self) -> None:
        index = self.make_index(max_evicted=4)
        index.insert(_hash(1), BlockId(3))
        before = dict(index.items())
        for number in (1, 2, 1):
            index.find(_hash(number))
        assert dict(index.items()) == before

    def test_refuses_a_second_block_for_a_hash(self) -> None:
        index = self.make_index(max_evicted=4)
        index.insert(_hash(1), BlockId(3))
        try:
            index.insert(_hash(1), BlockId(4))
        except KeyError:
            assert index.find(_hash(1)) == 3
        else:
            raise AssertionError("two blocks under one hash")

    def test_an_evicted_block_is_gone_and_remembered(self) -> None:
        index = self.make_index(max_evicted=4)
        index.insert(_hash(1), BlockId(3))
        index.evict(_hash(1))
        assert index.find(_hash(1)) is None
        assert index.was_evicted(_hash(1))
        assert not index.was_evicted(_hash(2))

    def test_refuses_to_evict_what_is_absent(self) -> None:
        index = self.make_index(max_evicted=4)
        try:
            index.evict(_hash(1))
        except KeyError:
            return
        raise AssertionError("evicted a block that was never there")

    def test_a_forgotten_block_is_gone_and_not_remembered(self) -> None:
        index = self.make_index(max_evicted=4)
        index.insert(_hash(1), BlockId(3))
        index.insert(_hash(2), BlockId(4))
        index.forget(_hash(1))
        assert index.find(_hash(1)) is None
        assert not index.was_evicted(_hash(1))
        assert index.find(_hash(2)) == 4
        index.insert(_hash(1), BlockId(5))
        assert index.find(_hash(1)) == 5

    def test_a_block_that_came_back_is_no_longer_evicted(self) -> None:
        index = self.make_index(max_evicted=4)
        index.insert(_hash(1), BlockId(3))
        index.evict(_hash(1))
        index.insert(_hash(1), BlockId(5))
        assert index.find(_hash(1)) == 5
        assert not index.was_evicted(_hash(1))

    def test_memory_of_evictions_is_bounded_and_keeps_the_latest(self) -> None:
        index = self.make_index(max_evicted=4)
        for number in range(40):
            index.insert(_hash(number), BlockId(0))
            index.evict(_hash(number))
        remembered = [number for number in range(40) if index.was_evicted(_hash(number))]
        assert remembered == [36, 37, 38, 39]

    def test_clear_forgets_blocks_and_evictions(self) -> None:
        index = self.make_index(max_evicted=4)
        index.insert(_hash(1), BlockId(3))
        index.insert(_hash(2), BlockId(4))
        index.evict(_hash(2))
        index.clear()
        assert len(index) == 0
        assert index.find(_hash(1)) is None
        assert not index.was_evicted(_hash(2))

    def test_random_operations_agree_with_a_dict(self) -> None:
        rng = random.Random(5)  # noqa: S311  a test sequence, not a secret
        index = self.make_index(max_evicted=8)
        model: dict[BlockHash, BlockId] = {}
        for step in range(4000):
            block_hash = _hash(rng.randrange(30))
            if block_hash in model:
                index.evict(block_hash)
                del model[block_hash]
            else:
                index.insert(block_hash, BlockId(step))
                model[block_hash] = BlockId(step)
            assert index.find(block_hash) == model.get(block_hash)
            assert len(index) == len(model)
        assert dict(index.items()) == model
