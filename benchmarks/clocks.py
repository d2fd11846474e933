"""Clocks for benchmarks that serve requests, on machines that others use as well."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch


class Clock(Protocol):
    """Seconds for the engine, and the sleep that goes with them."""

    def __call__(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class PlainClock:
    """Wall time; `awake`: wall time and `cpu`: CPU time in which sleeping only moves the hand."""

    def __init__(self, kind: str) -> None:
        self._read = time.process_time if kind == "cpu" else time.perf_counter
        self._slept = 0.0
        self._is_wall = kind == "wall"

    def __call__(self) -> float:
        return self._read() + self._slept

    def sleep(self, seconds: float) -> None:
        if self._is_wall:
            time.sleep(seconds)
        else:
            self._slept += seconds


class SteadyClock:
    """Time in which a slower machine makes time pass slower; sleeping only moves the hand.

    Every `EVERY_S` a reading first times a probe of small matrix products, as a step of the model has. The
    probe's own time does not count; the median of the last nine says how fast time passes, against the
    median of the first ones. `read` may be the process's CPU time, which does not count being scheduled out.
    Work is slowed by a busy machine as much as the probe only roughly: between kinds of load that use memory
    and arithmetic in other shares, times are off by some 5 %; one kind beside itself is safe.
    """

    EVERY_S = 0.02
    FIRST, LAST = 50, 9

    def __init__(self, read: Callable[[], float] = time.perf_counter) -> None:
        self._now = read
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randn(16, 320, generator=generator).bfloat16()
        self._matrix = torch.randn(1024, 320, generator=generator).bfloat16()
        for _ in range(20):
            self._probe()  # warm up
        self._standard = statistics.median(self._probe() for _ in range(self.FIRST))
        self._recent: deque[float] = deque(maxlen=self.LAST)
        self._time, self._speed = 0.0, 1.0
        self._read = self._probed = self._now()
        self.speeds: list[float] = []

    def __call__(self) -> float:
        now = self._now()
        self._time += (now - self._read) * self._speed
        if now - self._probed > self.EVERY_S:
            self._recent.append(self._probe())
            self._speed = self._standard / statistics.median(self._recent)
            self.speeds.append(self._speed)
            now = self._probed = self._now()
        self._read = now
        return self._time

    def sleep(self, seconds: float) -> None:
        self._time += seconds

    def _probe(self) -> float:
        with torch.inference_mode():
            torch.nn.functional.linear(self._rows, self._matrix)  # not timed: a step left it cold
            start = self._now()
            for _ in range(12):
                torch.nn.functional.linear(self._rows, self._matrix)
            return self._now() - start


def clock_named(kind: str) -> Clock:
    """`wall`; `awake`: without the time slept; `cpu`: this process's; `steady`, `steady-cpu`: wall or CPU
    time at the machine's speed of the moment."""
    if kind in ("steady", "steady-cpu"):
        return SteadyClock(time.perf_counter if kind == "steady" else time.process_time)
    return PlainClock(kind)
