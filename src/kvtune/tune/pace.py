"""The wall-clock budget: what steps cost here, what is left, what must be kept for the confirmation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

__all__ = ["Pace"]


class Pace:
    """Measured costs by name, in seconds per unit; time left until the deadline. One writer: the run."""

    def __init__(self, clock: Callable[[], float], budget_s: float) -> None:
        self._clock = clock
        self._start = clock()
        self.budget_s = budget_s
        self._spent: dict[str, tuple[float, float]] = {}
        self._held_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    @property
    def until_deadline_s(self) -> float:
        return self.budget_s - self.elapsed_s

    @property
    def left_s(self) -> float:
        """What may be spent now: without the seconds that are held back."""
        return self.until_deadline_s - self._held_s

    @contextlib.contextmanager
    def holding(self, seconds: float) -> Generator[None]:
        """Inside, `left_s` lacks these seconds: they are kept for what comes after."""
        self._held_s += seconds
        try:
            yield
        finally:
            self._held_s -= seconds

    @contextlib.contextmanager
    def measure(self, name: str, units: float = 1.0) -> Generator[None]:
        """Add what the block takes to the cost of `units` of `name`; also when it fails."""
        begin = self._clock()
        try:
            yield
        finally:
            seconds, known = self._spent.get(name, (0.0, 0.0))
            self._spent[name] = (seconds + self._clock() - begin, known + max(units, 1e-9))

    def cost_s(self, name: str, units: float = 1.0) -> float:
        """Expected seconds for `units` of `name`; 0 where nothing was measured yet."""
        seconds, known = self._spent.get(name, (0.0, 1.0))
        return seconds / known * units

    def affordable(self, name: str, *, share: float, low: int, high: int) -> int:
        """How many units of `name` fit into a share of the whole budget, within [low, high]."""
        each = self.cost_s(name)
        if each <= 0:
            return high
        return max(min(low, high), min(high, int(self.budget_s * share / each)))
