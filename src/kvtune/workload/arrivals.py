"""When requests arrive: rate, burstiness at several scales, and what a coarse clock hides."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["arrival_cv", "arrival_statistics"]

FloatArray = npt.NDArray[np.float64]

_WINDOWS_S: Final = (1.0, 10.0, 60.0, 600.0)
_MIN_WINDOWS: Final = 10
_NUM_BINS: Final = 120
_MAX_COUNTED: Final = 10_000_000
_COARSE_SHARE: Final = 0.5
_POISSON_TOP: Final = 1.5
_BURSTY_FROM: Final = 3.0


def arrival_cv(arrival_s: FloatArray) -> float | None:
    """Coefficient of variation of the gaps between arrivals; 1 for a Poisson process. None below three
    arrivals or where all come at once."""
    gaps = np.diff(arrival_s)
    if len(gaps) < 2 or not gaps.any():
        return None
    return float(gaps.std() / gaps.mean())


def arrival_statistics(arrival_s: FloatArray) -> dict[str, Any] | None:
    """Of sorted arrivals in seconds from 0; None where `arrival_cv` is.

    `burstiness`: (CV - 1) / (CV + 1), from -1 (clockwork) over 0 (Poisson) to 1 (Goh and Barabasi 2008).
    `dispersion`: per window, variance / mean of the counts (1 for Poisson) and peak / mean; windows of
    which the trace holds fewer than 10 are left out. `is_clock_coarse`: most arrivals share their time with
    others, so that the CV tells more of the clock than of the users. `kind` is read off the
    dispersion in the first window of 10 s or more that holds a request on average: a coarse clock does not
    spoil that.
    """
    cv = arrival_cv(arrival_s)
    if cv is None:
        return None
    duration = float(arrival_s[-1] - arrival_s[0])
    gaps = np.diff(arrival_s)
    zero_share = float((gaps == 0).mean())
    dispersion = [
        _dispersion(arrival_s, window)
        for window in _WINDOWS_S
        if _MIN_WINDOWS <= duration / window <= _MAX_COUNTED
    ]
    is_coarse = zero_share > _COARSE_SHARE
    return {
        "rate_per_s": len(arrival_s) / duration,
        "duration_s": duration,
        "cv": cv,
        "burstiness": (cv - 1) / (cv + 1),
        "simultaneous_share": zero_share,
        "smallest_gap_s": float(gaps[gaps > 0].min()),
        "is_clock_coarse": is_coarse,
        "dispersion": dispersion,
        "kind": _kind(cv, dispersion, is_coarse=is_coarse),
        "timeline": _timeline(arrival_s, duration),
    }


def _dispersion(arrival_s: FloatArray, window: float) -> dict[str, float]:
    counts = _counts(arrival_s, window)
    mean = float(counts.mean())
    return {
        "window_s": window, "mean_count": mean, "index": float(counts.var()) / mean,
        "peak_to_mean": float(counts.max()) / mean,
    }  # fmt: skip


def _counts(arrival_s: FloatArray, window: float) -> npt.NDArray[np.int64]:
    """Arrivals per whole window; the last, cut-off one is left out."""
    place = ((arrival_s - arrival_s[0]) / window).astype(np.int64)
    counts = np.bincount(place)
    return counts[:-1] if len(counts) > 1 else counts


def _kind(cv: float, dispersion: list[dict[str, float]], *, is_coarse: bool) -> str:
    index = next((d["index"] for d in dispersion if d["window_s"] >= 10 and d["mean_count"] >= 1), None)
    if index is None:
        if is_coarse:
            return "unknown"
        index = cv * cv
    if index < 1 / _POISSON_TOP:
        return "regular"
    if index <= _POISSON_TOP:
        return "poisson"
    return "uneven" if index < _BURSTY_FROM else "bursty"


def _timeline(arrival_s: FloatArray, duration: float) -> dict[str, Any]:
    """Counts in at most 120 bins of a round width."""
    width = duration / _NUM_BINS
    scale = 10.0 ** math.floor(math.log10(width))
    width = next(step * scale for step in (1, 2, 5, 10) if step * scale >= width)
    counts = np.bincount(((arrival_s - arrival_s[0]) / width).astype(np.int64))
    return {"bin_s": width, "counts": counts.tolist()}
