"""Which requests are replayed and which are sent as load, and at what times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from kvtune.target import LoadReport, LoadRequest
from kvtune.workload import TokenRequest

__all__ = ["LoadPlan", "choose_for_quality"]


def choose_for_quality(
    requests: Sequence[TokenRequest], count: int, rng: np.random.Generator
) -> tuple[TokenRequest, ...]:
    """`count` requests from as many sessions as possible: sessions are what an interval counts.

    Rounds over the sessions in random order, a random request of each per round.
    """
    sessions: dict[str, list[TokenRequest]] = {}
    for request in requests:
        sessions.setdefault(request.session_id or request.request_id, []).append(request)
    queues = [[members[i] for i in rng.permutation(len(members))] for members in sessions.values()]
    order = [queues[i] for i in rng.permutation(len(queues))]
    chosen: list[TokenRequest] = []
    while len(chosen) < count and any(order):
        chosen += [queue.pop() for queue in order if queue]
    return tuple(chosen[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """A load run in two lengths: neighbours in time, so that shared prefixes stay shared.

    `arrival_scale`: factor on the recorded times; 0 sends everything at once.
    """

    source: tuple[TokenRequest, ...]
    num_short: int
    max_tokens: int
    arrival_scale: float = 0.0

    @classmethod
    def of(cls, requests: Sequence[TokenRequest], *, count: int, num_short: int, max_tokens: int) -> Self:
        """The `count` earliest requests, all at once."""
        chosen = tuple(sorted(requests, key=lambda r: r.arrival_s)[:count])
        return cls(source=chosen, num_short=min(num_short, len(chosen)), max_tokens=max_tokens)

    @property
    def long(self) -> tuple[LoadRequest, ...]:
        start = self.source[0].arrival_s
        return tuple(
            LoadRequest(
                request_id=r.request_id, prompt_token_ids=r.prompt_token_ids,
                max_tokens=max(1, min(r.max_tokens, self.max_tokens)),
                arrival_s=(r.arrival_s - start) * self.arrival_scale, cache_salt=r.cache_salt,
            )
            for r in self.source
        )  # fmt: skip

    @property
    def short(self) -> tuple[LoadRequest, ...]:
        return self.long[: self.num_short]

    def saturating(self, burst: LoadReport) -> Self:
        """The same load over as long as the engine needed for all of it at once.

        Recorded traffic spreads over hours; at saturation queueing and batching show within seconds.
        Never slower than recorded.
        """
        span = self.source[-1].arrival_s - self.source[0].arrival_s
        return replace(self, arrival_scale=min(1.0, burst.duration_s / span) if span > 0 else 0.0)
