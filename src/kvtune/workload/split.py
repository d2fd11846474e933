"""Splitting a workload into a part to search on and a part to confirm on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from kvtune.errors import UsageError

__all__ = ["split_by_session"]


class _HasSession(Protocol):
    @property
    def request_id(self) -> str: ...
    @property
    def session_id(self) -> str: ...


R = TypeVar("R", bound=_HasSession)


def split_by_session(
    requests: Sequence[R], fraction: float, rng: random.Random | np.random.Generator
) -> tuple[tuple[R, ...], tuple[R, ...]]:
    """(search, confirm): about `fraction` of the requests first, never a session in both.

    Sessions are drawn at random; a request without a session is one of its own (`materialise` labels
    requests that share a prefix). Both parts keep the given order. Raises UsageError unless
    0 < fraction < 1 and there are at least two sessions.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"the share of requests to search on must lie between 0 and 1, found {fraction}")
    sizes: dict[str, int] = {}
    for request in requests:
        key = _key(request)
        sizes[key] = sizes.get(key, 0) + 1
    if len(sizes) < 2:
        raise UsageError(
            f"the {len(requests)} requests form {len(sizes)} session; confirming a winner on requests the "
            "search never saw needs at least two"
        )
    chosen = _draw(sizes, fraction * len(requests), rng)
    search = tuple(r for r in requests if _key(r) in chosen)
    return search, tuple(r for r in requests if _key(r) not in chosen)


def _key(request: _HasSession) -> str:
    return f"session {request.session_id}" if request.session_id else f"request {request.request_id}"


def _draw(sizes: dict[str, int], wanted: float, rng: random.Random | np.random.Generator) -> set[str]:
    """Sessions in random order, each taken if that brings the total nearer to `wanted`."""
    order = list(sizes)
    rng.shuffle(order)  # pyright: ignore[reportArgumentType]  # numpy shuffles lists in place
    chosen: set[str] = set()
    total = 0
    for key in order:
        if abs(total + sizes[key] - wanted) <= abs(total - wanted):
            chosen.add(key)
            total += sizes[key]
    smallest = min(order, key=lambda key: sizes[key])
    if not chosen:
        chosen.add(smallest)
    elif len(chosen) == len(sizes):
        chosen.discard(smallest)
    return chosen
