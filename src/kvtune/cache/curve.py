"""The exact LRU curve in a few dozen points, and where it bends."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from kvtune.cache.replay import LRUCurve

__all__ = ["curve_record"]

_NUM_POINTS: Final = 96
_ENOUGH: Final = 0.9


def curve_record(curve: LRUCurve, *, num_points: int = _NUM_POINTS) -> dict[str, Any]:
    """Plain JSON: `points` over capacity on a logarithmic scale, `knee`, `enough` and `unbounded`.

    `knee`: the capacity whose share of all hits is furthest above its share of all blocks: from there on
    another block buys less than the average one (Satopaa et al. 2011, "Kneedle", without smoothing: the curve
    is exact). `enough`: the smallest capacity with 90 % of the hits of an unbounded cache. All three are None
    for a trace without a hit.
    """
    largest = len(curve.hits) - 1
    most = int(curve.hits[largest]) if largest >= 0 else 0
    if not most:
        return {"points": [], "knee": None, "enough": None, "unbounded": None}
    shares = curve.hits / most - np.arange(largest + 1) / largest
    knee = int(np.argmax(shares))
    enough = int(np.searchsorted(curve.hits, _ENOUGH * most))
    spaced = np.round(np.geomspace(max(1, largest // 10_000), largest, num_points)).astype(np.int64)
    return {
        "points": [_point(curve, at) for at in sorted({*spaced.tolist(), knee, enough})],
        "knee": _point(curve, knee),
        "enough": {"share": _ENOUGH, **_point(curve, enough)},
        "unbounded": _point(curve, largest),
    }


def _point(curve: LRUCurve, capacity: int) -> dict[str, Any]:
    return {
        "capacity_blocks": capacity,
        "blocks_hit": curve.blocks_hit(capacity),
        "block_hit_rate": curve.block_hit_rate(capacity),
        "token_hit_rate": curve.token_hit_rate(capacity),
    }
