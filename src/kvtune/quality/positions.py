"""KL against position: where in a context, and how late in an answer, a candidate begins to differ.

A mean over all tokens hides damage that grows with distance; a cache read at long range shows it there first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtune.quality.bootstrap import bootstrap_mean
from kvtune.quality.coverage import finite
from kvtune.quality.divergence import TokenDivergence

__all__ = ["kl_by_position"]

FIRST_EDGE = 32
"""Context positions are binned by doubling from here; answers by doubling from their first token."""

Pairs = Sequence[tuple[TokenDivergence, TokenDivergence]]


def kl_by_position(
    pairs: Pairs, prompt_lengths: Sequence[int], clusters: Sequence[str], *, rng: np.random.Generator
) -> dict[str, list[dict[str, Any]]]:
    """Mean KL (nats per token, A/A floor beside it) by position, for as many requests as `pairs` has.

    `context`: tokens before the scored one, prompt included. `answer`: tokens of the answer before it. Each
    entry: `from`, `to` (first and last position), `num_tokens`, `kl` with bounds over sessions, `floor`.
    """
    starts = list(prompt_lengths)[: len(pairs)]
    sessions = list(clusters)[: len(pairs)]
    places = [np.arange(len(candidate.kl)) for candidate, _ in pairs]
    by_context = [start + place for start, place in zip(starts, places, strict=True)]
    return {
        "context": _binned(pairs, by_context, FIRST_EDGE, sessions, rng),
        "answer": _binned(pairs, places, 1, sessions, rng),
    }


def _binned(
    pairs: Pairs, places: Sequence[npt.NDArray[np.int64]], first: int, sessions: Sequence[str],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:  # fmt: skip
    last = max((int(place.max()) for place in places if len(place)), default=-1)
    edges = [0, first]
    while edges[-1] <= last:
        edges.append(2 * edges[-1])
    bins = [_one(pairs, places, span, sessions, rng) for span in itertools.pairwise(edges)]
    return [found for found in bins if found is not None]


def _one(
    pairs: Pairs, places: Sequence[npt.NDArray[np.int64]], span: tuple[int, int], sessions: Sequence[str],
    rng: np.random.Generator,
) -> dict[str, Any] | None:  # fmt: skip
    """One bin, [low, high) positions; None where no token lies in it."""
    low, high = span
    inside = [(place >= low) & (place < high) for place in places]
    rows = [i for i, mask in enumerate(inside) if mask.any()]
    if not rows:
        return None
    counts = np.array([inside[i].sum() for i in rows], np.float64)
    kl, floor = (np.array([float(pairs[i][side].kl[inside[i]].mean()) for i in rows]) for side in (0, 1))
    estimate = bootstrap_mean(kl, [sessions[i] for i in rows], rng=rng, weights=counts)
    return {
        "from": low, "to": high - 1, "num_tokens": int(counts.sum()), "kl": estimate.to_dict(),
        "floor": finite(float(np.average(floor, weights=counts))),
    }  # fmt: skip
