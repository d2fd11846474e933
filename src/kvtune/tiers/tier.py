"""The port of a tier: keep bytes under a key, give them back, let them go."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Payload", "Tier"]

Payload = npt.NDArray[np.uint8]
"""Bytes, one-dimensional."""


class Tier(Protocol):
    """A bounded store of byte strings. One thread.

    A fault is a miss: `put` returns False and `get` returns None instead of raising, so that whoever asked
    can compute again what it lacks.
    """

    @property
    def capacity_bytes(self) -> int:
        """Most payload bytes it ever holds."""
        ...

    @property
    def used_bytes(self) -> int:
        """Payload bytes it holds; never above `capacity_bytes`."""
        ...

    def put(self, key: bytes, payload: Payload) -> bool:
        """Keep a copy of the payload, instead of what the key held; False, and the key holds nothing, when
        there is no room. Nothing else leaves to make room: who may go is the caller's choice."""
        ...

    def get(self, key: bytes) -> Payload | None:
        """What was put last under the key, byte for byte; None when it is not here. It stays."""
        ...

    def discard(self, key: bytes) -> None:
        """Let the key go, if it is here."""
        ...

    def clear(self) -> None:
        """Let everything go."""
        ...

    def __len__(self) -> int:
        """Number of keys."""
        ...
