"""How much a batch will hold at its fullest: exactly where remaining lengths are known, in expectation where
only their distributions are.

The exact case is LightLLM's formula ("Past-Future", ASPLOS'25): by remaining length, longest first, the peak
is max_i (i x remaining_i + what the first i hold now). Where lengths are distributions, each moment's
holdings are summed over the batch first: per-request high quantiles would add up to nonsense, since not
everybody is long at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtune.predict.distribution import LengthDistribution
from kvtune.predict.grid import EDGES, WIDTHS, Floats

__all__ = ["HORIZONS", "Growth", "PeakForecast", "horizons_of", "peak_forecast", "survival_rows"]

HORIZONS: Final[Floats] = np.unique(np.append(0.0, np.round(np.exp2(np.arange(34.0) / 2.0))))
"""Steps ahead at which a batch is looked at: two per octave, up to 93,000."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One sequence of a batch in one KV cache group, as the forecast needs it.

    `num_tokens`: what it holds once its prefill is done; `generated`: output so far; `kept_blocks`: those of
    its blocks that stay with others when it ends; `longest`: its distribution of the whole output.
    """

    num_tokens: int
    generated: int
    kept_blocks: int
    output: LengthDistribution


@dataclass(frozen=True, slots=True)
class PeakForecast:
    """Expected blocks at the fullest moment, and the standard deviation there."""

    expected: float
    deviation: float
    high: float
    """Largest over time of mean + z x deviation: what is compared with the capacity."""


def horizons_of(sequences: Sequence[Growth]) -> Floats:
    """`HORIZONS` and the last steps of sequences that end at a limit: a peak of known lengths lies there."""
    limits = [(s.output.max_tokens, s.generated) for s in sequences]
    last = [float(limit - generated - 1) for limit, generated in limits if limit is not None]
    return np.union1d(HORIZONS, [steps for steps in last if steps > 0.0])


def survival_rows(sequences: Sequence[Growth], horizons: Floats) -> Floats:
    """P(still running after t more tokens | running now), [sequences, horizons].

    One that has outlived all that was ever seen, or its own limit, counts as about to end.
    """
    above = np.array([s.output.survival_at_edges for s in sequences])
    generated = np.array([float(s.generated) for s in sequences])
    at = generated[:, None] + np.concatenate([[0.0], horizons])[None, :] + 1.0
    bucket = np.clip(np.searchsorted(EDGES, at, side="right") - 1, 0, len(WIDTHS) - 1)
    low, high = np.take_along_axis(above, bucket, 1), np.take_along_axis(above, bucket + 1, 1)
    inside = np.clip((at - EDGES[bucket]) / WIDTHS[bucket], 0.0, 1.0)
    alive = low + (high - low) * inside
    limits = [s.output.max_tokens for s in sequences]
    ends = np.array([np.inf if limit is None else float(limit) for limit in limits])
    alive = np.where(at - 1.0 >= ends[:, None], 0.0, alive)
    now = alive[:, :1]
    ahead = np.divide(alive[:, 1:], now, out=np.zeros_like(alive[:, 1:]), where=now > 1e-12)
    ahead[:, horizons == 0.0] = 1.0  # they run now
    return ahead


def peak_forecast(
    sequences: Sequence[Growth],
    *,
    block_size: int,
    base_blocks: float = 0.0,
    window_blocks: int | None = None,
    z: float = 0.0,
    survival: Floats | None = None,
) -> PeakForecast:
    """Blocks held at the fullest moment from now on, nobody else being admitted.

    E(t) = base + sum of blocks_i(t) S_i(t) and V(t) = sum of blocks_i(t)^2 S_i(t) (1 - S_i(t)), with S the
    survival of what is left; the peak is taken over the sum, never request by request. `base_blocks` stay
    whatever ends; `window_blocks` bounds one sequence in a sliding group. `survival`: rows of
    `survival_rows` at `horizons_of`, to share between groups.
    """
    if not sequences:
        return PeakForecast(base_blocks, 0.0, base_blocks)
    horizons = horizons_of(sequences)
    alive = survival_rows(sequences, horizons) if survival is None else survival
    tokens = np.array([float(s.num_tokens) for s in sequences])[:, None] + horizons[None, :]
    blocks = np.ceil(tokens / block_size)
    if window_blocks is not None:
        blocks = np.minimum(blocks, window_blocks)
    blocks = np.maximum(blocks - np.array([float(s.kept_blocks) for s in sequences])[:, None], 0.0)
    expected = base_blocks + (blocks * alive).sum(axis=0)
    deviation = np.sqrt((blocks * blocks * alive * (1.0 - alive)).sum(axis=0))
    high = expected + z * deviation
    at = int(np.argmax(expected))
    return PeakForecast(float(expected[at]), float(deviation[at]), float(high.max()))
