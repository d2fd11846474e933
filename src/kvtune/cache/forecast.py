"""What the past of a trace says a cache will hit in its future, or why it says nothing.

The history is replayed from an empty cache. Once that is full (at the latest from half of the history on) its
hit rate is the forecast, and the differences between windows are its uncertainty. A history that drifts, or
is too short to say more than a few points, gives reasons in place of a number.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvtune.cache.replay import Replayer
from kvtune.errors import UsageError
from kvtune.workload import BlockTrace, Drift, Stationarity, drift_of, first_requests, stationarity

__all__ = ["Forecast", "forecast_hit_rate"]

_NUM_WINDOWS: Final = 8
_STUDENT_90: Final = 1.895
"""Two-sided 90 % quantile of Student's t with 7 degrees of freedom."""
_HIT_TOLERANCE: Final = 6.0
_MAX_MARGIN: Final = 0.03
_MAX_BACKTEST_ERROR: Final = 0.03
_EARLIEST: Final = 0.1
"""Share of the history that is left out even where a small cache is full at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Block hit rate forecast for the requests after the history, at one capacity (None: unbounded).

    `status`: stationary (a forecast), drifting or too_short (`hit_rate` and its 90 % interval are None and
    `reasons` say why). `history_hit_rate`: what the warm cache really hit in the history, in any case.
    `num_history`: requests the forecast rests on. `actual`: hit rate of the requests that followed, where
    the trace holds some; `error`: forecast - actual.
    """

    policy: str
    capacity_blocks: int | None
    num_history: int
    status: str
    reasons: tuple[str, ...]
    hit_rate: float | None
    low: float | None
    high: float | None
    history_hit_rate: float
    actual: float | None

    @property
    def error(self) -> float | None:
        return None if self.hit_rate is None or self.actual is None else self.hit_rate - self.actual

    def to_dict(self) -> dict[str, Any]:
        found = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return found | {"reasons": list(self.reasons), "error": self.error}


def forecast_hit_rate(
    trace: BlockTrace, capacity: int | None, *, policy: str = "lru", history: float = 0.5
) -> Forecast:
    """Forecast from the first `history` share of the requests (1: all of them) what the next ones will hit
    in a cache of `capacity` blocks that goes on under `policy`.

    LRU is the floor of the default policy, and unlike one that is still learning it goes on as it went.
    Nothing after the history is looked at for the forecast. Raises UsageError for a share outside (0, 1].
    """
    if not 0 < history <= 1:
        raise UsageError(f"the share of the trace to forecast from must lie in (0, 1], found {history:g}")
    num_history = int(history * trace.num_requests)
    past = first_requests(trace, num_history)
    hits = _hits(past, policy, capacity)
    begin = _full_from(past, capacity)
    counts = np.diff(past.request_start).astype(np.float64)
    recent = _rate(hits[begin:], counts[begin:])
    verdict = stationarity(past)
    drift = None if verdict.verdict == "too_short" else _drift(hits, counts, begin, capacity)
    margin = 1.0 if drift is None else _margin(drift)
    status, reasons = _judge(verdict, drift, margin, _backtest(past, hits, counts, capacity))
    is_given = status == "stationary"
    return Forecast(
        policy=policy,
        capacity_blocks=capacity,
        num_history=num_history,
        status=status,
        reasons=reasons,
        hit_rate=recent if is_given else None,
        low=max(0.0, recent - margin) if is_given else None,
        high=min(1.0, recent + margin) if is_given else None,
        history_hit_rate=recent,
        actual=_actual(trace, num_history, policy, capacity),
    )


def _hits(trace: BlockTrace, policy: str, capacity: int | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 [R]: blocks each request hits."""
    return Replayer(trace).replay(policy, capacity).outcome.hit_blocks.astype(np.float64)


def _rate(hits: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> float:
    total = float(counts.sum())
    return float(hits.sum()) / total if total else 0.0


def _drift(
    hits: np.ndarray[Any, np.dtype[np.float64]],
    counts: np.ndarray[Any, np.dtype[np.float64]],
    begin: int,
    capacity: int | None,
) -> Drift:
    edges = np.linspace(begin, len(hits), _NUM_WINDOWS + 1).astype(np.int64)
    size = "an unbounded cache" if capacity is None else f"a cache of {capacity:,} blocks"
    return drift_of(f"the hit rate of {size}", hits, counts, edges, unit="points", tolerance=_HIT_TOLERANCE)


def _full_from(past: BlockTrace, capacity: int | None) -> int:
    """The request from which the cache is full and hits as it will go on: from then on a block's fate does
    not depend on the empty start."""
    earliest, latest = int(_EARLIEST * past.num_requests), past.num_requests // 2
    if capacity is None or capacity >= past.num_unique:
        return latest
    # Ids are dense in order of first appearance: the first with number `capacity` fills the cache.
    place = int(np.argmax(past.block_ids >= capacity))
    full = int(np.searchsorted(past.request_start, place, side="right"))
    return min(latest, max(earliest, full))


def _backtest(
    past: BlockTrace,
    hits: np.ndarray[Any, np.dtype[np.float64]],
    counts: np.ndarray[Any, np.dtype[np.float64]],
    capacity: int | None,
) -> tuple[float, float]:
    """(what the same method would have forecast in the middle of the history, what came)."""
    middle = past.num_requests // 2
    begin = _full_from(first_requests(past, middle), capacity)
    return _rate(hits[begin:middle], counts[begin:middle]), _rate(hits[middle:], counts[middle:])


def _judge(
    verdict: Stationarity, drift: Drift | None, margin: float, backtest: tuple[float, float]
) -> tuple[str, tuple[str, ...]]:
    if drift is not None and drift.is_drifting:
        return "drifting", (*verdict.reasons, drift.sentence())
    told, came = backtest
    if verdict.is_stationary and abs(told - came) > _MAX_BACKTEST_ERROR:
        return "drifting", (
            f"half way through the history the forecast was {100 * told:.1f} %, and {100 * came:.1f} % came",
        )
    if verdict.is_stationary and margin > _MAX_MARGIN:
        return "too_short", (
            f"chance alone moves the hit rate by {100 * margin:.1f} points; use more requests",
        )
    return verdict.verdict, verdict.reasons


def _margin(drift: Drift) -> float:
    """Half of the interval: the windows' spread, or at least what chance makes of it."""
    return _STUDENT_90 * max(drift.swing, drift.noise) / 100 / math.sqrt(_NUM_WINDOWS)


def _actual(trace: BlockTrace, num_history: int, policy: str, capacity: int | None) -> float | None:
    if num_history == trace.num_requests:
        return None
    hits = _hits(trace, policy, capacity)[num_history:]
    return _rate(hits, np.diff(trace.request_start)[num_history:])
