"""Which law the time between two uses of a block follows: exponential, Weibull, lognormal or Lomax.

Fitted on the earlier gaps, judged on the later ones by the Kolmogorov-Smirnov distance, so that a law with
more parameters has no advantage. A cache policy or a time to live can be chosen from it: under an
exponential law age tells nothing, under the others a block not reused for long is ever less likely to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["fit_gap_law"]

FloatArray = npt.NDArray[np.float64]

_MIN_GAPS: Final = 50
_MAX_GAPS: Final = 200_000
_STEPS: Final = 60


@dataclass(frozen=True, slots=True)
class _Law:
    name: str
    parameters: dict[str, float]
    cdf: Callable[[FloatArray], FloatArray]

    def distance(self, sample: FloatArray) -> float:
        """Kolmogorov-Smirnov distance to the sample."""
        values = np.sort(sample)
        expected = self.cdf(values)
        steps = np.arange(len(values) + 1) / len(values)
        # Ties (coarse clocks) are one step.
        last = np.append(values[1:] != values[:-1], True)
        first = np.insert(values[1:] != values[:-1], 0, True)
        above = np.abs(steps[1:] - expected)[last]
        below = np.abs(expected - steps[:-1])[first]
        return float(max(above.max(), below.max()))


def fit_gap_law(gaps_s: FloatArray) -> dict[str, Any] | None:
    """The best law of the positive gaps in their order, {name, parameters, distance, candidates, n}.

    None for fewer than 50 gaps above 0. `distance` is the KS distance on the later half.
    """
    positive = gaps_s[gaps_s > 0]
    if len(positive) < _MIN_GAPS:
        return None
    if len(positive) > _MAX_GAPS:
        positive = positive[:: -(-len(positive) // _MAX_GAPS)]
    middle = len(positive) // 2
    earlier, later = positive[:middle], positive[middle:]
    laws = [_exponential(earlier), _weibull(earlier), _lognormal(earlier), _lomax(earlier)]
    distances = {law.name: law.distance(later) for law in laws}
    best = min(laws, key=lambda law: distances[law.name])
    return {
        "name": best.name,
        "parameters": best.parameters,
        "distance": distances[best.name],
        "candidates": distances,
        "n": len(positive),
    }


def _exponential(gaps: FloatArray) -> _Law:
    mean = float(gaps.mean())
    return _Law("exponential", {"mean_s": mean}, lambda x: -np.expm1(-x / mean))


def _weibull(gaps: FloatArray) -> _Law:
    """Maximum likelihood; its equation in the shape has one root, found by bisection."""
    logs = np.log(gaps)
    mean_log, top = float(logs.mean()), float(logs.max())

    def score(shape: float) -> float:
        weights = np.exp(shape * (logs - top))
        return float((weights * logs).sum() / weights.sum()) - 1 / shape - mean_log

    shape = _root(score, 0.01, 100.0)
    scale = math.exp(top + math.log(float(np.exp(shape * (logs - top)).mean())) / shape)
    return _Law("weibull", {"shape": shape, "scale_s": scale}, lambda x: -np.expm1(-((x / scale) ** shape)))


def _lognormal(gaps: FloatArray) -> _Law:
    logs = np.log(gaps)
    mean, deviation = float(logs.mean()), max(1e-9, float(logs.std()))
    return _Law(
        "lognormal",
        {"median_s": math.exp(mean), "sigma": deviation},
        lambda x: _normal_cdf((np.log(x) - mean) / deviation),
    )


def _lomax(gaps: FloatArray) -> _Law:
    """A power law's tail, 1 - (1 + x / scale)^-shape: profile likelihood over the scale."""

    def fitted_shape(scale: float) -> float:
        return 1 / max(1e-12, float(np.log1p(gaps / scale).mean()))

    def likelihood(scale: float) -> float:
        shape = fitted_shape(scale)
        return math.log(shape / scale) - (shape + 1) / shape

    median = float(np.median(gaps))
    scale = max(np.geomspace(median / 1e3, median * 1e3, 2 * _STEPS).tolist(), key=likelihood)
    shape = fitted_shape(scale)
    return _Law(
        "lomax", {"shape": shape, "scale_s": scale}, lambda x: -np.expm1(-shape * np.log1p(x / scale))
    )


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Of an increasing function, by bisection on a logarithmic scale."""
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return math.sqrt(low * high)


def _normal_cdf(x: FloatArray) -> FloatArray:
    """Abramowitz and Stegun 26.2.17, error below 7.5e-8 (numpy has no erf)."""
    z = np.abs(x)
    t = 1 / (1 + 0.2316419 * z)
    coefficients = (0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429)
    series = sum(c * t ** (k + 1) for k, c in enumerate(coefficients))
    upper = np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * series
    return np.where(x >= 0, 1 - upper, upper)
