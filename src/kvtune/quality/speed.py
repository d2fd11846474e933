"""Speed of two runs of the same requests, compared request by request.

TPOT: ratio of means over paired requests; TTFT: ratio of 95th percentiles; goodput: requests that met
the SLO per second. Ratios are candidate / baseline, with one-sided 95 % bounds on either side.
Requests of one run share its disturbances, so the interval is also held against the A/A pair:
a gain counts only beyond both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtune.quality.bootstrap import Estimate, bootstrap_ratio
from kvtune.target import LoadReport, LoadResult

__all__ = ["HIGHER_IS_BETTER", "SPEED_METRICS", "Slo", "SpeedRatios", "compare_speed", "summarise"]

Floats = npt.NDArray[np.float64]

SPEED_METRICS = ("tpot_s.mean", "ttft_s.p95", "goodput")
HIGHER_IS_BETTER = frozenset({"goodput"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency targets in seconds; None is no target."""

    ttft_p95_s: float | None = None
    tpot_p95_s: float | None = None

    def is_met(self, result: LoadResult) -> bool:
        """Whether one request stayed within both; a failed one never does."""
        if result.error is not None or result.ttft_s is None:
            return False
        ttft_ok = self.ttft_p95_s is None or result.ttft_s <= self.ttft_p95_s
        return ttft_ok and (self.tpot_p95_s is None or (result.tpot_s or 0.0) <= self.tpot_p95_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRatios:
    """Candidate over baseline by metric name; a metric without paired data is absent."""

    ratios: Mapping[str, Estimate]

    def exceeds(self, limit: float, *, bound: str) -> str | None:
        """Name of the first latency ratio whose `bound` (value | low | high) lies above `limit`."""
        for name in ("tpot_s.mean", "ttft_s.p95"):
            if name in self.ratios and getattr(self.ratios[name], bound) > limit:
                return name
        return None

    def to_dict(self) -> dict[str, Any]:
        return {name: estimate.to_dict() for name, estimate in self.ratios.items()}


def _mean(x: Floats) -> Floats:
    return x.mean(axis=-1)


def _median(x: Floats) -> Floats:
    return np.median(x, axis=-1)


def _p95(x: Floats) -> Floats:
    return np.quantile(x, 0.95, axis=-1)


_LATENCIES: Mapping[str, tuple[str, Callable[[Floats], Floats]]] = {
    "tpot_s.mean": ("tpot_s", _mean),
    "ttft_s.p95": ("ttft_s", _p95),
    "ttft_s.p50": ("ttft_s", _median),
    "e2e_s.p95": ("e2e_s", _p95),
}
"""Ratio -> the member of a result it is of, and the statistic. The first two are held to limits."""


def compare_speed(
    candidate: Sequence[LoadReport], baseline: Sequence[LoadReport], *, slo: Slo, rng: np.random.Generator
) -> SpeedRatios:
    """Ratios over the requests both sides finished; runs of one side are averaged per request."""
    above, below = _by_request(candidate), _by_request(baseline)
    ratios: dict[str, Estimate] = {}
    for name, (member, statistic) in _LATENCIES.items():
        pairs = _paired(above, below, member)
        if len(pairs) and float(statistic(pairs[None, :, 1])[0]) > 0:
            ratios[name] = bootstrap_ratio(pairs[:, 0], pairs[:, 1], statistic, rng=rng)
    durations = tuple(sum(r.duration_s for r in side) for side in (candidate, baseline))
    goodput = _goodput_ratio(above, below, durations, slo=slo, rng=rng)
    if goodput is not None:
        ratios["goodput"] = _over_runs(goodput, candidate, baseline, slo)
    return SpeedRatios(ratios=ratios)


def _by_request(reports: Sequence[LoadReport]) -> dict[str, list[LoadResult]]:
    grouped: dict[str, list[LoadResult]] = {}
    for report in reports:
        for result in report.results:
            grouped.setdefault(result.request_id, []).append(result)
    return grouped


def _paired(
    above: Mapping[str, Sequence[LoadResult]], below: Mapping[str, Sequence[LoadResult]], member: str
) -> Floats:
    rows: list[tuple[float, float]] = []
    for request_id in sorted(set(above) & set(below)):
        sides = [_seconds(side[request_id], member) for side in (above, below)]
        if sides[0] is not None and sides[1] is not None:
            rows.append((sides[0], sides[1]))
    return np.array(rows, np.float64).reshape(-1, 2)


def _seconds(results: Sequence[LoadResult], member: str) -> float | None:
    values = [getattr(r, member) for r in results if r.error is None and getattr(r, member) is not None]
    return float(np.mean(values)) if values else None


def _goodput_ratio(
    above: Mapping[str, Sequence[LoadResult]], below: Mapping[str, Sequence[LoadResult]],
    durations: tuple[float, ...], *, slo: Slo, rng: np.random.Generator,
) -> Estimate | None:  # fmt: skip
    ids = sorted(set(above) & set(below))
    if not ids or min(durations) <= 0:
        return None
    rates = [
        np.array([sum(slo.is_met(r) for r in side[i]) for i in ids], np.float64) / duration
        for side, duration in zip((above, below), durations, strict=True)
    ]
    if rates[1].sum() == 0:
        return None
    return bootstrap_ratio(rates[0], rates[1], _mean, rng=rng)


def _over_runs(
    estimate: Estimate, candidate: Sequence[LoadReport], baseline: Sequence[LoadReport], slo: Slo
) -> Estimate:
    """Widen to what single runs against each other show.

    A run has one duration, so drawing its requests again says nothing of how much that moves.
    """
    rates = [
        [sum(slo.is_met(r) for r in run.results) / run.duration_s for run in side if run.duration_s > 0]
        for side in (candidate, baseline)
    ]
    ratios = [a / b for a in rates[0] for b in rates[1] if b > 0]
    low, high = min([estimate.low, *ratios]), max([estimate.high, *ratios])
    return replace(estimate, low=low, high=high)


def summarise(reports: Sequence[LoadReport], slo: Slo) -> dict[str, Any]:
    """Absolute figures of one configuration's runs: latencies in seconds, rates per second."""
    results = [r for report in reports for r in report.results]
    done = [r for r in results if r.error is None]
    duration = sum(report.duration_s for report in reports)
    out: dict[str, Any] = {"num_requests": len(results), "num_failed": len(results) - len(done),
                           "duration_s": duration}  # fmt: skip
    for name, member in (("ttft_s", "ttft_s"), ("tpot_s", "tpot_s"), ("e2e_s", "e2e_s")):
        values = [getattr(r, member) for r in done if getattr(r, member) is not None]
        out[name] = _distribution(np.array(values, np.float64))
    out["itl_s"] = _distribution(np.array([gap for r in done for gap in r.itl_s], np.float64))
    met = sum(slo.is_met(r) for r in results)
    out["num_slo_met"] = met
    out["goodput"] = met / duration if duration > 0 else None
    tokens = sum(len(r.token_ids) for r in done)
    out["output_tokens_per_s"] = tokens / duration if duration > 0 else None
    out["num_cached_tokens"] = sum(r.num_cached_tokens for r in done)
    return out | _cache_figures(reports)


_COUNTED = {
    "queried": ("queried_tokens", "prefix_cache_queries"),
    "hit": ("hit_tokens", "prefix_cache_hits"),
    "preemptions": ("preemptions", "num_preemptions"),
    "recomputed": ("recomputed_tokens",),
}
"""What we report -> what kvtune's engine and vLLM call it."""


def _cache_figures(reports: Sequence[LoadReport]) -> dict[str, Any]:
    """Prefix hits of the device tier, preemptions, recomputed tokens; None where the engine counts none."""
    total: dict[str, float | None] = {}
    for figure, names in _COUNTED.items():
        found = [r.counters[name] for r in reports for name in names if name in r.counters]
        total[figure] = sum(found) if found else None
    queried, hit = total["queried"], total["hit"]
    return {
        "device_hit_rate": hit / queried if queried and hit is not None else None,
        "preemptions": total["preemptions"], "recomputed_tokens": total["recomputed"],
    }  # fmt: skip


def _distribution(values: Floats) -> dict[str, float | int | None]:
    statistics: dict[str, Callable[[Floats], Any]] = {
        "mean": np.mean, "p50": np.median, "p95": lambda x: np.quantile(x, 0.95),
        "p99": lambda x: np.quantile(x, 0.99),
    }  # fmt: skip
    out: dict[str, float | int | None] = {"n": len(values)}
    for name, statistic in statistics.items():
        value = float(statistic(values)) if len(values) else math.nan
        out[name] = value if math.isfinite(value) else None
    return out
