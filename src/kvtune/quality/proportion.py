"""Bounds of a share of successes."""

from __future__ import annotations

import math

from kvtune.errors import UsageError

__all__ = ["wilson_interval"]

_Z95 = 1.959964


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Two-sided 95 % interval of the share behind `successes` of `count` independent trials (Wilson 1927).

    Holds where the share is near 0 or 1, as recall is. UsageError for an empty or impossible count.
    """
    if not 0 <= successes <= count or not count:
        raise UsageError(f"a share needs 0 <= successes <= count, found {successes} of {count}")
    z2, share = _Z95 * _Z95, successes / count
    centre = share + z2 / (2 * count)
    half = _Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, (centre - half) / (1 + z2 / count)), min(1.0, (centre + half) / (1 + z2 / count))
