"""Whether a trace goes on as it began: only then does its past say what a cache will hit.

The first quarter of the requests warms the (endless) cache and is left out. The rest is cut into windows of
equally many requests; of each quantity the windows' values are tested for a trend (least squares) and for
swings between phases. Both must be large and clear of the noise between windows to count.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtune.workload.blocks import BlockTrace
from kvtune.workload.reuse import previous_reference

__all__ = ["MIN_REQUESTS", "Drift", "Stationarity", "drift_of", "first_requests", "stationarity"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MIN_REQUESTS: Final = 240
"""Below, the windows hold fewer than 15 requests each and nothing can be said."""

_WARM_UP: Final = 0.25
_NUM_WINDOWS: Final = 12
_MIN_SCORE: Final = 3.0
_RECENT: Final = 0.125
"""Reuse is local when the reference before lies at most this share of the trace back: a measure that,
unlike all reuse, does not grow just because more has been seen."""

_SWING_SHARE: Final = 0.6
"""Of the tolerance for a trend: swings are averaged over when a forecast is made."""

LENGTH_TOLERANCE: Final = 0.30
POINTS_TOLERANCE: Final = 6.0
RATE_TOLERANCE: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One quantity through the trace.

    `windows`: its value in each. `change`: of the fitted line from the first window to the last, `score` how
    many standard errors that is. `swing`: standard deviation around the line; `noise`: what it would be by
    chance alone. The latter four in `unit`: "points" (of 100) or "share" (of the mean).
    """

    name: str
    unit: str
    windows: tuple[float, ...]
    change: float
    score: float
    swing: float
    noise: float
    tolerance: float
    is_trend: bool
    is_swinging: bool

    @property
    def is_drifting(self) -> bool:
        return self.is_trend or self.is_swinging

    def sentence(self) -> str:
        """What drifts and by how much."""
        if self.is_trend:
            return f"{self.name} changes by {self._shown(self.change)} from beginning to end"
        return f"{self.name} swings by {self._shown(self.swing).lstrip('+')} from window to window"

    def _shown(self, x: float) -> str:
        return f"{100 * x:+.0f} %" if self.unit == "share" else f"{x:+.1f} points"

    def to_dict(self) -> dict[str, Any]:
        found = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return found | {"windows": list(self.windows), "is_drifting": self.is_drifting}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stationarity:
    """`verdict`: stationary, drifting, or too_short (fewer than 240 requests). `reasons`: sentences.

    `load` is the arrival rate's drift, None without arrival times. It is stated apart: a load that comes
    and goes changes latency, not which prefixes come again.
    """

    verdict: str
    reasons: tuple[str, ...]
    checks: tuple[Drift, ...]
    load: Drift | None

    @property
    def is_stationary(self) -> bool:
        return self.verdict == "stationary"

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "checks": [check.to_dict() for check in self.checks],
            "load": None if self.load is None else self.load.to_dict(),
        }


def first_requests(trace: BlockTrace, num_requests: int) -> BlockTrace:
    """The trace up to a request: ids are dense in order of first appearance, so they stay as they are."""
    end = int(trace.request_start[num_requests])
    ids = trace.block_ids[:end]
    return dataclasses.replace(
        trace,
        block_ids=ids,
        request_start=trace.request_start[: num_requests + 1],
        block_tokens=trace.block_tokens[:end],
        arrival_s=trace.arrival_s[:num_requests],
        tenant=trace.tenant[:num_requests],
        num_unique=int(ids.max()) + 1 if end else 0,
        prompt_tokens=trace.prompt_tokens[:num_requests],
        session=trace.session[:num_requests],
        request_class=trace.request_class[:num_requests],
    )


def stationarity(trace: BlockTrace) -> Stationarity:
    """Judge a trace; a part of one: `first_requests`."""
    end = trace.num_requests
    if end < MIN_REQUESTS:
        reason = f"{end} requests are too few to tell; {MIN_REQUESTS} are needed"
        return Stationarity(verdict="too_short", reasons=(reason,), checks=(), load=None)
    edges = window_edges(end)
    checks = (_lengths(trace, edges), *_reuse(trace, edges, end))
    load = _load(trace, edges)
    reasons = tuple(check.sentence() for check in checks if check.is_drifting)
    return Stationarity(
        verdict="drifting" if reasons else "stationary", reasons=reasons, checks=checks, load=load
    )


def window_edges(end: int, *, begin: int | None = None, num_windows: int = _NUM_WINDOWS) -> IntArray:
    """Request numbers [num_windows + 1] between the warm-up (or `begin`) and `end`."""
    first = int(_WARM_UP * end) if begin is None else begin
    return np.linspace(first, end, num_windows + 1).astype(np.int64)


def drift_of(
    name: str, part: FloatArray, whole: FloatArray, edges: IntArray, *, unit: str, tolerance: float
) -> Drift:
    """Test sum(part) / sum(whole) over each window of requests for trend and swing; see `Drift`.

    `part`, `whole`: per request, float64 [R]; `edges`: request numbers [windows + 1].
    """
    parts, wholes = _window_sums(part, edges), np.maximum(_window_sums(whole, edges), 1e-12)
    windows = parts / wholes
    # What the windows would differ by if requests were drawn independently.
    ratio = np.repeat(windows, np.diff(edges))
    residual = (part[edges[0] : edges[-1]] - ratio * whole[edges[0] : edges[-1]]) ** 2
    noise = math.sqrt(float((_window_sums(residual, edges - edges[0]) / wholes**2).mean()))
    scale = 100.0 if unit == "points" else 1 / max(1e-12, abs(float(windows.mean())))
    change, score, swing = _line(windows * scale, noise * scale)
    is_trend = abs(change) > tolerance and score > _MIN_SCORE
    is_swinging = swing > _SWING_SHARE * tolerance and swing > _MIN_SCORE * noise * scale
    return Drift(
        name=name, unit=unit, windows=tuple(windows.tolist()), change=change, score=score, swing=swing,
        noise=noise * scale, tolerance=tolerance, is_trend=is_trend, is_swinging=is_swinging,
    )  # fmt: skip


def _line(values: FloatArray, noise: float) -> tuple[float, float, float]:
    """(change along the fitted line, its size in standard errors, standard deviation around it).

    The error rests on the deviation, or on `noise` where so few windows happen to lie closer to the line.
    """
    x = np.linspace(-0.5, 0.5, len(values))
    slope = float((x * values).sum() / (x * x).sum())
    residual = values - values.mean() - slope * x
    swing = math.sqrt(float((residual**2).sum()) / max(1, len(values) - 2))
    error = max(swing, noise) / math.sqrt(float((x * x).sum()))
    return slope, min(1e6, abs(slope) / error) if error else (1e6 if slope else 0.0), swing


def _lengths(trace: BlockTrace, edges: IntArray) -> Drift:
    tokens = trace.prompt_tokens.astype(np.float64)
    return drift_of(
        "prompt length", tokens, np.ones_like(tokens), edges, unit="share", tolerance=LENGTH_TOLERANCE
    )


def _reuse(trace: BlockTrace, edges: IntArray, end: int) -> tuple[Drift, Drift]:
    """All reuse, and that of recently used blocks, as shares of each window's references."""
    references = trace.block_ids[: int(trace.request_start[end])]
    request = trace.request_of_reference()[: len(references)]
    previous = previous_reference(references)
    is_old = previous >= 0
    is_recent = is_old & (request - request[np.maximum(previous, 0)] <= max(1, int(_RECENT * end)))
    count = np.diff(trace.request_start[: end + 1]).astype(np.float64)
    old, recent = (
        drift_of(
            name,
            np.bincount(request[mask], minlength=end).astype(np.float64),
            count,
            edges,
            unit="points",
            tolerance=POINTS_TOLERANCE,
        )
        for name, mask in (("reuse", is_old), ("recent reuse", is_recent))
    )
    return old, recent


def _load(trace: BlockTrace, edges: IntArray) -> Drift | None:
    """Requests per second: each request stands for the gap before it."""
    gaps = np.diff(trace.arrival_s, prepend=trace.arrival_s[:1])
    spans = _window_sums(gaps, edges)
    if not (spans > 0).all():
        return None
    return drift_of("arrival rate", np.ones_like(gaps), gaps, edges, unit="share", tolerance=RATE_TOLERANCE)


def _window_sums(values: FloatArray, bounds: IntArray) -> FloatArray:
    totals = np.concatenate([[0.0], np.cumsum(values)])
    return np.diff(totals[bounds])
