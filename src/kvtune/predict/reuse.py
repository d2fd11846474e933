"""Whether a prefix will be asked for again soon: what prefetching and keeping it would be worth.

What a whole cache will hit is forecast by replay, in `kvtune.cache.forecast`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from kvtune.errors import UsageError
from kvtune.predict.gate import Gate

__all__ = ["ReturnPredictor"]


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
        self._open: dict[Hashable, tuple[float, tuple[int, int]]] = {}
        self._uses: dict[Hashable, int] = {}
        self.gate = Gate(scale=0.5)

    def predict(self, prefix: Hashable) -> float:
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

    def use(self, prefix: Hashable, now_s: float) -> None:
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
