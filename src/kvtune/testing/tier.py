"""Conformance of a `Tier`: each sentence of the port's contract, proved."""

from __future__ import annotations

import numpy as np

from kvtune.tiers import Payload, Tier

__all__ = ["TierSuite"]


def _bytes(seed: int, size: int) -> Payload:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


class TierSuite:
    """Subclass with `make_tier`, which returns an empty tier of exactly that capacity."""

    def make_tier(self, *, capacity_bytes: int) -> Tier:
        """A fresh, empty tier."""
        raise NotImplementedError

    def test_an_empty_tier_holds_nothing(self) -> None:
        tier = self.make_tier(capacity_bytes=100)
        assert (len(tier), tier.used_bytes, tier.capacity_bytes) == (0, 0, 100)
        assert tier.get(b"a") is None

    def test_gives_back_what_was_put_byte_for_byte_and_keeps_it(self) -> None:
        tier = self.make_tier(capacity_bytes=1000)
        payloads = {bytes([i]): _bytes(i, 10 + 7 * (i % 3)) for i in range(12)}
        assert all(tier.put(key, payload) for key, payload in payloads.items())
        for _ in range(2):
            for key, payload in payloads.items():
                found = tier.get(key)
                assert found is not None
                assert np.array_equal(found, payload)
        assert (len(tier), tier.used_bytes) == (12, sum(p.size for p in payloads.values()))

    def test_keeps_a_copy(self) -> None:
        tier = self.make_tier(capacity_bytes=100)
        payload = _bytes(0, 40)
        before = payload.copy()
        assert tier.put(b"a", payload)
        payload[:] = 0
        found = tier.get(b"a")
        assert found is not None
        assert np.array_equal(found, before)
        found[:] = 0
        again = tier.get(b"a")
        assert again is not None
        assert np.array_equal(again, before)

    def test_never_holds_more_than_its_capacity_and_lets_nothing_else_go(self) -> None:
        tier = self.make_tier(capacity_bytes=100)
        assert tier.put(b"a", _bytes(1, 60))
        assert not tier.put(b"b", _bytes(2, 41))
        assert tier.get(b"b") is None
        assert tier.get(b"a") is not None
        assert tier.put(b"b", _bytes(2, 40))
        assert tier.used_bytes == 100

    def test_a_key_holds_what_was_put_last_or_nothing(self) -> None:
        tier = self.make_tier(capacity_bytes=100)
        assert tier.put(b"a", _bytes(1, 60))
        assert tier.put(b"a", _bytes(2, 90))  # its own old bytes make room
        found = tier.get(b"a")
        assert found is not None
        assert np.array_equal(found, _bytes(2, 90))
        assert not tier.put(b"a", _bytes(3, 101))
        assert (tier.get(b"a"), len(tier), tier.used_bytes) == (None, 0, 0)

    def test_discarding_makes_room_and_forgives_strangers(self) -> None:
        tier = self.make_tier(capacity_bytes=100)
        for round_ in range(50):
            assert tier.put(b"a", _bytes(round_, 50))
            assert tier.put(b"b", _bytes(round_ + 1, 50))
            tier.discard(b"a")
            tier.discard(b"stranger")
            assert (tier.get(b"a"), tier.used_bytes) == (None, 50)
            tier.discard(b"b")
        assert len(tier) == 0

    def test_clearing_lets_everything_go(self) -> None:
        tier = self.make_tier(capacity_bytes=100)
        assert tier.put(b"a", _bytes(1, 50))
        tier.clear()
        assert (tier.get(b"a"), len(tier), tier.used_bytes) == (None, 0, 0)
        assert tier.put(b"b", _bytes(1, 100))

    def test_a_tier_without_capacity_takes_nothing(self) -> None:
        tier = self.make_tier(capacity_bytes=0)
        assert not tier.put(b"a", _bytes(1, 1))
        assert tier.get(b"a") is None
