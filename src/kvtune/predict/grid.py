"""Token counts on a fixed grid: exact up to 16, then eight buckets per octave.

A distribution over lengths is a vector of bucket masses; inside a bucket it is uniform over the whole
numbers. One bucket is at most 9 % wide, so no quantile is off by more than that.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["EDGES", "MAX_LENGTH", "NUM_BUCKETS", "WIDTHS", "Floats", "bucket_of", "kernel_rows"]

Floats = npt.NDArray[np.float64]

_EXACT: Final = 16
_PER_OCTAVE: Final = 8
MAX_LENGTH: Final = 1 << 20
"""Longer outputs are counted as this long."""


def _edges() -> npt.NDArray[np.int64]:
    octaves = int(np.log2(MAX_LENGTH / _EXACT))
    steps = np.arange(1, octaves * _PER_OCTAVE + 1)
    grown = np.round(_EXACT * 2.0 ** (steps / _PER_OCTAVE)).astype(np.int64)
    edges = np.concatenate([np.arange(_EXACT + 1), grown, [MAX_LENGTH + 1]])
    return np.unique(edges)


EDGES: Final = _edges()
"""Bucket b holds the lengths EDGES[b] <= n < EDGES[b + 1]."""
NUM_BUCKETS: Final = len(EDGES) - 1
WIDTHS: Final[Floats] = np.diff(EDGES).astype(np.float64)


def bucket_of(length: int) -> int:
    """The bucket of a length; what lies outside the grid goes to its end."""
    place = int(np.searchsorted(EDGES, min(max(length, 0), MAX_LENGTH), side="right"))
    return place - 1


def kernel_rows(spread: float) -> Floats:
    """Row b: where an observation in bucket b puts its mass: a Gaussian of `spread` buckets, summing to 1."""
    if spread <= 0:
        return np.eye(NUM_BUCKETS)
    index = np.arange(NUM_BUCKETS)
    rows = np.exp(-0.5 * ((index[:, None] - index[None, :]) / spread) ** 2)
    return rows / rows.sum(axis=1, keepdims=True)
