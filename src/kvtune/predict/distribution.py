"""A probability distribution over output lengths, in tokens."""

from __future__ import annotations

import math

import numpy as np

from kvtune.predict.grid import EDGES, NUM_BUCKETS, WIDTHS, Floats, bucket_of

__all__ = ["LengthDistribution"]


class LengthDistribution:
    """Masses over the buckets of `grid`; immutable.

    `max_tokens` is where the engine stops a request whatever it would have said: all mass above it sits
    on it.
    """

    __slots__ = ("_above", "masses", "max_tokens")

    def __init__(self, masses: Floats, *, max_tokens: int | None = None) -> None:
        """`masses`: one non-negative value per bucket, normalised here."""
        self.masses: Floats = masses / masses.sum()
        self.max_tokens = max_tokens
        self._above: Floats = np.concatenate([np.cumsum(self.masses[::-1])[::-1], [0.0]])

    @classmethod
    def known(cls, length: int) -> LengthDistribution:
        """All mass on one length, which must be at least 1: the oracle's forecast, or a length fixed by the
        request itself."""
        masses = np.zeros(NUM_BUCKETS)
        masses[-1] = 1.0
        return cls(masses, max_tokens=length)

    @property
    def survival_at_edges(self) -> Floats:
        """P(length >= EDGES[b]) for every edge, before `max_tokens`; shape [NUM_BUCKETS + 1]."""
        return self._above

    def survival(self, length: float) -> float:
        """P(the output is longer than `length`)."""
        if self.max_tokens is not None and length >= self.max_tokens:
            return 0.0
        return float(np.interp(length + 1, EDGES, self._above))

    def mean(self) -> float:
        """Expected tokens."""
        if self.max_tokens is None:
            return float(self.masses @ ((EDGES[:-1] + EDGES[1:] - 1) / 2))
        # E[min(L, m)] is P(L >= n) summed over n = 1 .. m; on a line from a to b over w whole numbers the
        # sum is w a + (b - a) (w - 1) / 2.
        edges = np.minimum(EDGES, self.max_tokens + 1)
        at = np.interp(edges, EDGES, self._above)
        widths, spans = np.diff(edges), np.diff(at)
        return float((widths * at[:-1] + spans * (widths - 1) / 2).sum() - at[0])

    def quantile(self, share: float) -> float:
        """Smallest length that covers `share` of the mass."""
        at = math.ceil(np.interp(share - 1.0, -self._above, EDGES)) - 1
        limit = math.inf if self.max_tokens is None else float(self.max_tokens)
        return min(max(float(at), 0.0), limit)

    def log_loss(self, length: int) -> float:
        """-log P(exactly this length), in nats."""
        return -math.log(max(self.probability(length), 1e-300))

    def probability(self, length: int) -> float:
        """P(exactly this length)."""
        if self.max_tokens is not None and length >= self.max_tokens:
            return float(np.interp(self.max_tokens, EDGES, self._above))
        bucket = bucket_of(length)
        return float(self.masses[bucket] / WIDTHS[bucket])

    def crps(self, length: int) -> float:
        """Continuous ranked probability score in tokens: the integral of (F - 1{x >= length})^2.

        For a point forecast it is the absolute error (Gneiting and Raftery 2007). `max_tokens` plays no part.
        """
        below = 1.0 - self._above
        bucket = bucket_of(length)
        cut = min(max(length, 0), int(EDGES[-1]) - 1) + 0.5  # the middle of what stands for this length
        inside = below[bucket] + (below[bucket + 1] - below[bucket]) * (cut - EDGES[bucket]) / WIDTHS[bucket]
        total = _integral_of_square(below[:bucket], below[1 : bucket + 1], WIDTHS[:bucket])
        total += _integral_of_square(below[bucket], inside, cut - EDGES[bucket])
        over = self._above
        total += _integral_of_square(1.0 - inside, over[bucket + 1], EDGES[bucket + 1] - cut)
        total += _integral_of_square(over[bucket + 1 : -1], over[bucket + 2 :], WIDTHS[bucket + 1 :])
        return total

    def __repr__(self) -> str:
        quantiles = ", ".join(f"p{share} {self.quantile(share / 100):.0f}" for share in (10, 50, 90, 99))
        return f"LengthDistribution({quantiles}; {NUM_BUCKETS} buckets)"


def _integral_of_square(start: Floats | float, end: Floats | float, width: Floats | float) -> float:
    """Integral of the squares of straight lines from `start` to `end` over `width`."""
    return float(np.sum((start * start + start * end + end * end) / 3.0 * width))
