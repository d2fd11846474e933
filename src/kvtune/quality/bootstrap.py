"""Intervals by resampling whole clusters: sessions for quality, requests for speed.

Tokens of one conversation are not independent, so sessions are drawn, not tokens.

- Means: cluster bootstrap-t (Efron 1982; Hall 1988). KL per session is heavily skewed, and on 32
  log-normal clusters the plain percentile bound misses the mean in 18 % of runs where 5 % are promised,
  the studentised one in 9 %.
- Quantiles and medians: percentile bootstrap over paired requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError

__all__ = ["NUM_RESAMPLES", "Estimate", "bootstrap_mean", "bootstrap_ratio"]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
"""Of each one-sided bound; [low, high] together is a 90 % interval."""

SE_FLOOR = 0.25
"""A resample that missed the few clusters with an effect has almost no spread; its studentised value
explodes. Its standard error counts as at least this share of the sample's."""

MIN_BEYOND = 40
"""Resamples that lie beyond a bound: a quantile that rests on fewer is a draw of its own."""

_CHUNK_BYTES = 32 * 2**20

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with one-sided 95 % bounds, the number of observations and of independent clusters."""

    value: float
    low: float
    high: float
    n: int
    num_clusters: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain JSON; a number that is not finite becomes null."""
        finite = {k: _finite(getattr(self, k)) for k in ("value", "low", "high")}
        return {**finite, "n": self.n, "num_clusters": self.num_clusters}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def bootstrap_mean(
    values: npt.ArrayLike, clusters: Sequence[str], *, rng: np.random.Generator,
    weights: npt.ArrayLike | None = None, num_resamples: int = NUM_RESAMPLES, confidence: float = CONFIDENCE,
) -> Estimate:  # fmt: skip
    """Weighted mean of `values` [n] with bounds, `clusters` [n] naming the cluster of each.

    `weights` [n] above zero, by default all 1: with the number of tokens a value stands for, the mean is
    that of tokens. `confidence`: of each one-sided bound. UsageError if empty.
    """
    data = np.asarray(values, np.float64)
    share = np.ones_like(data) if weights is None else np.asarray(weights, np.float64)
    if data.size == 0 or not data.size == len(clusters) == share.size:
        raise UsageError(
            f"a bootstrap needs one cluster and one weight per value, found {data.size} values, "
            f"{len(clusters)} clusters and {share.size} weights"
        )
    num_resamples = max(num_resamples, math.ceil(MIN_BEYOND / (1 - confidence)))
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(index, weights=data * share).astype(np.float64)
    counts = np.bincount(index, weights=share).astype(np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:  # one cluster says nothing about others
        return Estimate(value=mean, low=-np.inf, high=np.inf, n=data.size, num_clusters=1)
    low, high = _studentised_bounds(sums, counts, rng, num_resamples, confidence)
    return Estimate(value=mean, low=low, high=high, n=data.size, num_clusters=len(sums))


def _studentised_bounds(
    sums: Floats, counts: Floats, rng: np.random.Generator, num_resamples: int, confidence: float
) -> tuple[float, float]:
    ones = np.ones((1, len(sums)))
    mean, error = (float(x[0]) for x in _mean_and_error(ones, sums, counts))
    if not error > 0:  # every cluster alike (or not a number): nothing to resample
        return mean, mean
    parts = [
        _mean_and_error(weights, sums, counts) for weights in _multiplicities(len(sums), num_resamples, rng)
    ]
    means = np.concatenate([m for m, _ in parts])
    errors = np.concatenate([e for _, e in parts])
    t = (means - mean) / np.maximum(errors, SE_FLOOR * error)
    return (
        float(mean - error * np.quantile(t, confidence)),
        float(mean - error * np.quantile(t, 1 - confidence)),
    )


def _mean_and_error(weights: Floats, sums: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Ratio mean and its cluster-robust standard error for each row of multiplicities [R, C]."""
    total = weights @ counts
    mean = (weights @ sums) / total
    squares = weights @ (sums * sums) - 2 * mean * (weights @ (sums * counts))
    squares += mean * mean * (weights @ (counts * counts))
    num = weights.shape[1]
    return mean, np.sqrt(np.maximum(squares, 0.0) * (num / (num - 1))) / total


def _multiplicities(num_clusters: int, num_resamples: int, rng: np.random.Generator) -> list[Floats]:
    """How often each cluster was drawn [R, C], in pieces that stay small in memory."""
    rows = max(1, min(num_resamples, _CHUNK_BYTES // (8 * num_clusters)))
    share = np.full(num_clusters, 1.0 / num_clusters)
    sizes = [min(rows, num_resamples - done) for done in range(0, num_resamples, rows)]
    return [rng.multinomial(num_clusters, share, size=size).astype(np.float64) for size in sizes]


def bootstrap_ratio(
    numerator: npt.ArrayLike, denominator: npt.ArrayLike, statistic: Callable[[Floats], Floats], *,
    rng: np.random.Generator, num_resamples: int = NUM_RESAMPLES,
) -> Estimate:  # fmt: skip
    """statistic(numerator) / statistic(denominator) over the same requests [n], resampled together.

    `statistic` reduces the last axis ([R, n] -> [R]). Percentile bounds.
    """
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if above.size == 0 or above.shape != below.shape:
        raise UsageError(f"paired ratios need equal, non-empty samples, found {above.size} and {below.size}")
    value = float(statistic(above[None])[0] / statistic(below[None])[0])
    rows = max(1, _CHUNK_BYTES // (16 * above.size))
    ratios: list[Floats] = []
    for done in range(0, num_resamples, rows):
        pick = rng.integers(0, above.size, size=(min(rows, num_resamples - done), above.size))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(statistic(above[pick]) / statistic(below[pick]))
    spread = np.concatenate(ratios)
    low, high = np.nanquantile(spread, [1 - CONFIDENCE, CONFIDENCE]) if above.size > 1 else (-np.inf, np.inf)
    return Estimate(value=value, low=float(low), high=float(high), n=above.size, num_clusters=above.size)
