"""What of the cache will be asked for again: the hit rate to come, and whether one conversation returns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.errors import UsageError
from kvtune.predict.gate import Gate

__all__ = ["HitRateForecast", "ReturnPredictor", "forecast_hit_rate"]

_PARTS: Final = 4
"""The history is cut in this many parts; the first warms the cache up."""
_MAX_DRIFT: Final = 0.015
"""A trace whose parts differ by more than this, beyond chance, is not stationary."""
_MAX_GROWTH: Final = 0.15
"""The same for mean prompt lengths, relative: conversations that all grow older want ever more cache."""
_MIN_REQUESTS: Final = 200


@dataclass(frozen=True, slots=True)
class HitRateForecast:
    """Share of prompt tokens that the cache will serve, or the reason why nothing can be said.

    `low`, `high`: 95 % interval from the spread between runs of neighbours. `value` is None when the history
    is not stationary: then it is no guide to what comes.
    """

    value: float | None
    low: float | None
    high: float | None
    is_stationary: bool
    reason: str
    parts: tuple[float, ...]
    """Hit rate of each part of the history, warm-up first."""


def forecast_hit_rate(hit_tokens: Sequence[int], prompt_tokens: Sequence[int]) -> HitRateForecast:
    """The hit rate to come from one that was: per request, in order, tokens served and tokens asked for.

    The first quarter fills the cache and is left out; the other three must agree in hit rate and in the
    length of prompts. UsageError on input of unequal length, or with more tokens served than asked for.
    """
    hits, asked = np.asarray(hit_tokens, dtype=np.float64), np.asarray(prompt_tokens, dtype=np.float64)
    if len(hits) != len(asked) or bool((hits > asked).any()) or bool((hits < 0).any()):
        raise UsageError("every request needs 0 <= hit tokens <= prompt tokens, in two lists of one length")
    if len(hits) < _MIN_REQUESTS:
        reason = f"{len(hits)} requests are too few; {_MIN_REQUESTS} or more tell something"
        return HitRateForecast(None, None, None, False, reason, ())
    edges = np.linspace(0, len(hits), _PARTS + 1).astype(int)
    spans = [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
    parts = tuple(_rate(hits[span], asked[span]) for span in spans)
    drift, chance = _drift(hits, asked, spans[1:])
    reason = _why_not_stationary(drift, chance, asked, spans[1:])
    if reason:
        return HitRateForecast(None, None, None, False, reason, parts)
    later = slice(int(edges[1]), len(hits))
    value = _rate(hits[later], asked[later])
    reach = 1.96 * math.hypot(_standard_error(hits[later], asked[later]), drift / 2.0)
    low, high = max(0.0, value - reach), min(1.0, value + reach)
    return HitRateForecast(value, low, high, True, "the last three quarters agree", parts)


def _why_not_stationary(
    drift: float, chance: float, asked: npt.NDArray[np.float64], spans: Sequence[slice]
) -> str:
    if drift > _MAX_DRIFT + chance:
        return (
            f"hit rates of the last three quarters lie {100 * drift:.1f} points apart, "
            f"{100 * chance:.1f} are chance: the traffic changes, its past is no guide"
        )
    mean = float(asked.mean()) or 1.0
    growth, chance = _drift(asked / mean, np.ones_like(asked), spans)
    if growth > _MAX_GROWTH + chance:
        return (
            f"mean prompt lengths of the last three quarters lie {100 * growth:.0f} % apart, "
            f"{100 * chance:.0f} % are chance: prompts grow or shrink, and the cache they want with them"
        )
    return ""


def _rate(hits: npt.NDArray[np.float64], asked: npt.NDArray[np.float64]) -> float:
    total = float(asked.sum())
    return float(hits.sum()) / total if total else 0.0


def _standard_error(hits: npt.NDArray[np.float64], asked: npt.NDArray[np.float64]) -> float:
    """Of a ratio of sums, from about 20 runs of neighbours: requests near one another are alike."""
    size = max(1, len(hits) // 20)
    count = len(hits) // size
    h, a = hits[: count * size].reshape(count, size).sum(1), asked[: count * size].reshape(count, size).sum(1)
    total = float(a.sum())
    if count < 2 or not total:
        return 0.0
    rest = h - a * float(h.sum()) / total
    return math.sqrt(float((rest * rest).sum()) * count / (count - 1)) / total


def _drift(
    hits: npt.NDArray[np.float64], asked: npt.NDArray[np.float64], spans: Sequence[slice]
) -> tuple[float, float]:
    """(range of the parts' rates, the range that chance alone gives three parts in 19 cases of 20)."""
    rates = [_rate(hits[span], asked[span]) for span in spans]
    errors = [_standard_error(hits[span], asked[span]) for span in spans]
    return max(rates) - min(rates), 3.31 * float(np.mean(errors))  # Tukey's range of three normals


class ReturnPredictor:
    """P(a prefix is asked for again within `horizon_s`), learned online by class of prefix. Not thread-safe.

    A class is how often the prefix was used so far and how long it rested between its last two uses, both
    in powers of two: what tells a conversation under way from one that is over. Baseline: one share for all.
    Outcomes are taken when they are certain: at the next use, or after `horizon_s` without one.
    """

    def __init__(self, *, horizon_s: float, pseudo_count: float = 8.0) -> None:
        if not horizon_s > 0.0:
            raise UsageError(f"the horizon must be above 0 s, found {horizon_s}")
        self.horizon_s = horizon_s
        self._pseudo_count = pseudo_count
        self._returned: dict[tuple[int, int], float] = {}
        self._seen: dict[tuple[int, int], float] = {}
        self._total_returned = self._total_seen = 0.0
        self._open: dict[object, tuple[float, tuple[int, int]]] = {}
        self._uses: dict[object, int] = {}
        self.gate = Gate(scale=0.5)

    def predict(self, prefix: object) -> float:
        """For a prefix used before, counted from its last use; the baseline for any other."""
        last = self._open.get(prefix)
        return self.baseline() if last is None or not self.gate.is_on else self.predict_class(last[1])

    def predict_class(self, kind: tuple[int, int]) -> float:
        """The class's own share, leaning on everybody's while it saw few; whatever the gate says."""
        lean = self._pseudo_count
        returned = self._returned.get(kind, 0.0) + lean * self.baseline()
        return returned / (self._seen.get(kind, 0.0) + lean)

    def baseline(self) -> float:
        """Share of all uses followed by another within the horizon; 1/2 before the first outcome."""
        return (self._total_returned + 1.0) / (self._total_seen + 2.0)

    def use(self, prefix: object, now_s: float) -> None:
        """The prefix is asked for at `now_s`; times must not fall."""
        self.expire(now_s)
        last = self._open.pop(prefix, None)
        rest = 0
        if last is not None:
            self._take(last[1], is_returned=True)
            rest = 1 + max(0, math.frexp(now_s - last[0])[1])
        uses = self._uses[prefix] = self._uses.get(prefix, 0) + 1 if last is not None else 1
        self._open[prefix] = (now_s, (min(uses.bit_length(), 6), rest))

    def expire(self, now_s: float) -> None:
        """Settle what did not return in time."""
        while self._open:
            prefix = next(iter(self._open))  # in order of last use
            at, kind = self._open[prefix]
            if now_s - at <= self.horizon_s:
                return
            del self._open[prefix]
            self._uses.pop(prefix, None)
            self._take(kind, is_returned=False)

    def _take(self, kind: tuple[int, int], *, is_returned: bool) -> None:
        outcome = float(is_returned)
        self.gate.observe((outcome - self.baseline()) ** 2, (outcome - self.predict_class(kind)) ** 2)
        self._seen[kind] = self._seen.get(kind, 0.0) + 1.0
        self._returned[kind] = self._returned.get(kind, 0.0) + outcome
        self._total_seen += 1.0
        self._total_returned += outcome
