"""Right and wrong answers of two runs to the same questions: did the candidate lose more than it gained?

| | candidate right | candidate wrong |
|---|---|---|
| reference right | | `lost` |
| reference wrong | `gained` | |

Both discordant directions count: scoring only what the reference solves counts losses and never gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from kvtune.errors import UsageError
from kvtune.quality.bootstrap import CONFIDENCE, Estimate

__all__ = ["mcnemar_p", "net_loss", "pairs_needed"]

_Z = NormalDist().inv_cdf(CONFIDENCE)
_POWER_Z = NormalDist().inv_cdf(0.8)
_BISECTIONS = 60


def net_loss(lost: int, gained: int, n: int) -> Estimate:
    """(lost - gained) / n with one-sided 95 % bounds.

    Score interval of a difference of paired proportions (Tango 1998, Statistics in Medicine 17:891), which
    holds its level at the few discordant pairs that near-lossless settings give. Where no pair was lost the
    upper bound is at least 3 / n (rule of three). UsageError for counts that no n pairs can have.
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise UsageError(f"{n} pairs cannot hold {lost} lost and {gained} gained")
    value = (lost - gained) / n

    def distance(delta: float) -> float:
        return _score(lost, gained, n, delta)

    low = _crossing(distance, _Z, -1.0, value)
    high = _crossing(distance, -_Z, value, 1.0)
    if lost == 0:
        high = max(high, min(1.0, 3 / n) - gained / n)
    return Estimate(value=value, low=low, high=high, n=n, num_clusters=n)


def _score(lost: int, gained: int, n: int, delta: float) -> float:
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
