"""Right and wrong answers of two runs to the same questions: did the candidate lose more than it gained?

| | candidate right | candidate wrong |
|---|---|---|
| reference right | | `lost` |
| reference wrong | `gained` | |

Both discordant directions count: scoring only what the reference solves counts losses and never gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from kvtune.errors import UsageError
from kvtune.quality.bootstrap import CONFIDENCE, Estimate

__all__ = ["clustered_net_loss", "mcnemar_p", "net_loss", "pairs_needed"]

_Z = NormalDist().inv_cdf(CONFIDENCE)
_POWER_Z = NormalDist().inv_cdf(0.8)
_BISECTIONS = 60


def net_loss(lost: float, gained: float, n: float, *, confidence: float = CONFIDENCE) -> Estimate:
    """(lost - gained) / n with one-sided bounds of `confidence` each.

    Score interval of a difference of paired proportions (Tango 1998, Statistics in Medicine 17:891), which
    holds its level at the few discordant pairs that near-lossless settings give. Where no pair was lost the
    upper bound is at least 3 / n (rule of three; -ln(1 - confidence) / n in general). Counts may be
    fractions: effective sizes. UsageError for counts that no n pairs can have.
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise UsageError(f"{n} pairs cannot hold {lost} lost and {gained} gained")
    value = (lost - gained) / n

    def distance(delta: float) -> float:
        return _score(lost, gained, n, delta)

    z = NormalDist().inv_cdf(confidence)
    low = _crossing(distance, z, -1.0, value)
    high = _crossing(distance, -z, value, 1.0)
    if lost == 0:
        high = max(high, min(1.0, -math.log(1 - confidence) / n) - gained / n)
    return Estimate(value=value, low=low, high=high, n=round(n), num_clusters=round(n))


def clustered_net_loss(
    losses: Sequence[int], clusters: Sequence[str], *, confidence: float = CONFIDENCE
) -> Estimate:
    """`net_loss` of pairs that share contexts: `losses` [n] are 1 (lost), 0 or -1 (gained), `clusters` [n].

    Counts are divided by the design effect of the clusters (Rao and Scott 1992, Biometrics 48:577), which is
    never taken to be below 1; where no pair was lost, nothing tells how alike a cluster's pairs are, and a
    cluster counts once. UsageError if empty.
    """
    data = np.asarray(losses, np.float64)
    if data.size == 0 or data.size != len(clusters):
        raise UsageError(f"{data.size} pairs need as many clusters and at least one, found {len(clusters)}")
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    num, n = int(index.max()) + 1, data.size
    lost, gained = float((data > 0).sum()), float((data < 0).sum())
    effect = n / num if lost == 0 else _design_effect(data, index, num)
    found = net_loss(lost / effect, gained / effect, n / effect, confidence=confidence)
    return replace(found, n=n, num_clusters=num)


def _design_effect(data: np.ndarray, index: np.ndarray, num: int) -> float:
    """Variance of the mean over clusters drawn whole, by that over independent pairs; at least 1."""
    mean = float(data.mean())
    independent = float(((data - mean) ** 2).sum())
    if num < 2 or independent <= 0:
        return max(1.0, data.size / num)
    off = np.bincount(index, weights=data - mean, minlength=num)
    return max(1.0, num / (num - 1) * float((off * off).sum()) / independent)


def _score(lost: float, gained: float, n: float, delta: float) -> float:
    """Standard errors between what was seen and a true difference `delta`, falling in `delta`."""
    a, c = 2.0 * n, -gained * delta * (1 - delta)
    b = -(lost + gained) + (2 * n - lost + gained) * delta
    gain = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # most likely P(gained) under `delta`
    variance = n * (2 * gain + delta * (1 - delta))
    seen = lost - gained - n * delta
    if variance <= 0:
        return 0.0 if seen == 0 else math.copysign(math.inf, seen)
    return seen / math.sqrt(variance)


def _crossing(falling: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function passes `level` between two points."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if falling(middle) > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mcnemar_p(lost: int, gained: int) -> float:
    """Chance of at least `lost` of the discordant pairs being losses if either were as likely (exact McNemar
    test, one-sided for harm)."""
    count = lost + gained
    return math.fsum(math.comb(count, k) for k in range(lost, count + 1)) / 2**count


def pairs_needed(discordant_share: float, gap: float) -> int | None:
    """Pairs that decide, with 95 % confidence and 80 % power, a margin `gap` above the true net loss.

    n = (z_95 + z_80)^2 p_d / gap^2 (Connor 1987); with no discordance the rule of three. None if gap <= 0.
    """
    if gap <= 0:
        return None
    spread = (_Z + _POWER_Z) ** 2 * discordant_share / gap**2
    return math.ceil(max(spread, 3 / gap))
