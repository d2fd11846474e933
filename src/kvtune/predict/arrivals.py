"""How many requests are coming: counts per window, forecast by whichever simple rule did best so far.

Public traces are won by the last value or a short average; a daily season shows in few of them, and bursts
cannot be foreseen at all (Azure's code trace at 10 s). So the rules are judged on the stream itself: the one
with the least discounted absolute error answers, and only while a gate finds it better than the last value.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvtune.errors import UsageError
from kvtune.predict.gate import Gate

__all__ = ["ArrivalForecast", "ArrivalPredictor"]

_AVERAGES: Final = (0.1, 0.3, 0.6)
"""Weights of the newest window in the exponential averages."""
_MEMORY: Final = 0.98
"""What an error counts one window later."""
_MIN_WEIGHT: Final = 8.0
"""A rule is believed once it was judged about this often."""
_NUM_ERRORS: Final = 512
_MIN_ERRORS: Final = 20
LAST: Final = "last value"


@dataclass(frozen=True, slots=True)
class ArrivalForecast:
    """Requests expected in the coming window, and the interval that held 80 % of the past errors.

    `low` and `high` are None while fewer than 20 errors are known.
    """

    count: float
    low: float | None
    high: float | None
    rule: str


class ArrivalPredictor:
    """Forecasts the next count from the counts of past windows. Not thread-safe.

    `season`: windows per day (or other period), None without one. Baseline: the last value; its rivals are
    exponential averages, the mean of all, and the count one season ago.
    """

    def __init__(self, *, season: int | None = None) -> None:
        if season is not None and season < 2:
            raise UsageError(f"a season needs at least 2 windows, found {season}")
        self._season = season
        self._counts: deque[float] = deque(maxlen=season or 1)
        self._averages: dict[float, float] = {}
        self._total = 0.0
        self.num_observed = 0
        self._errors: dict[str, tuple[float, float]] = {}  # rule -> (discounted errors, their weight)
        self._misses: deque[float] = deque(maxlen=_NUM_ERRORS)
        self.gate = Gate(scale=1.0)

    def candidates(self) -> Mapping[str, float]:
        """Every rule's forecast of the next count; empty before the first observation."""
        if not self._counts:
            return {}
        shown = {LAST: self._counts[-1], "mean of all": self._total / self.num_observed}
        shown |= {f"average {weight}": level for weight, level in self._averages.items()}
        if len(self._counts) == self._season:
            shown["season"] = self._counts[0]
        return shown

    def predict(self) -> ArrivalForecast:
        """The next window. UsageError before the first observation."""
        candidates = self.candidates()
        if not candidates:
            raise UsageError("no window was observed yet; observe at least one count first")
        rule = self._best(candidates) if self.gate.is_on else LAST
        count = candidates[rule]
        if len(self._misses) < _MIN_ERRORS:
            return ArrivalForecast(count, None, None, rule)
        misses = sorted(self._misses)
        spread = math.sqrt(count + 1.0)
        low, high = (misses[int(share * (len(misses) - 1))] for share in (0.1, 0.9))
        return ArrivalForecast(count, max(0.0, count + low * spread), max(0.0, count + high * spread), rule)

    def observe(self, count: float) -> None:
        """A window ended with this many requests."""
        if not count >= 0.0 or math.isinf(count):
            raise UsageError(f"a count of arrivals must be finite and not negative, found {count}")
        candidates = self.candidates()
        if candidates:
            self._judge(candidates, count)
        for weight in _AVERAGES:
            before = self._averages.get(weight, count)
            self._averages[weight] = before + weight * (count - before)
        self._counts.append(count)
        self._total += count
        self.num_observed += 1

    def _judge(self, candidates: Mapping[str, float], count: float) -> None:
        shown = self.predict().count
        self._misses.append((count - shown) / math.sqrt(shown + 1.0))
        # Errors in units of the level: a window of a busy hour does not outvote a quiet night.
        level = self._averages[_AVERAGES[1]] + 1.0
        best = self._best(candidates)
        self.gate.observe(abs(count - candidates[LAST]) / level, abs(count - candidates[best]) / level)
        for rule, forecast in candidates.items():
            error, weight = self._errors.get(rule, (0.0, 0.0))
            self._errors[rule] = (_MEMORY * error + abs(count - forecast) / level, _MEMORY * weight + 1.0)

    def _best(self, candidates: Mapping[str, float]) -> str:
        means = {
            rule: error / weight
            for rule, (error, weight) in self._errors.items()
            if rule in candidates and weight >= _MIN_WEIGHT
        }
        return min(means, key=lambda rule: means[rule], default=LAST)
