"""Requests that a KV budget holds, and how many of those sent met their latency target: with intervals.

The number people act on. Which requests come next is not known, so sessions are drawn again: a budget holds
more short ones than long ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtune.quality import Estimate, Slo, bootstrap_mean, bootstrap_ratio, wilson_interval
from kvtune.target import LoadReport
from kvtune.workload import TokenRequest

__all__ = ["RequestBytes", "held_in", "within_slo"]

Floats = npt.NDArray[np.float64]


class RequestBytes:
    """Allocator bytes of each request of a workload at its full length (prompt and answer)."""

    def __init__(self, requests: Sequence[TokenRequest]) -> None:
        self.lengths = [len(r.prompt_token_ids) + r.max_tokens for r in requests]
        self.sessions = [r.session_id or r.request_id for r in requests]

    def under(self, bytes_per_token: Callable[[int], float]) -> Floats:
        """[n] bytes; `bytes_per_token` of a length in tokens is asked once per length."""
        sizes = {n: n * bytes_per_token(n) for n in Counter(self.lengths)}
        return np.array([sizes[n] for n in self.lengths], np.float64)

    def ratio(self, above: Floats, below: Floats, rng: np.random.Generator) -> Estimate:
        """Mean bytes of one side over the other's, sessions drawn whole."""
        _, index = np.unique(np.asarray(self.sessions, dtype=object).astype(str), return_inverse=True)
        sums = [np.bincount(index, weights=side) for side in (above, below)]
        return bootstrap_ratio(sums[0], sums[1], lambda x: x.mean(axis=-1), rng=rng)


def held_in(
    budget_bytes: int, sizes: Floats, sessions: Sequence[str], rng: np.random.Generator
) -> dict[str, Any]:
    """Requests of mean size in the budget: {value, low, high, n, num_clusters}, one-sided 95 % bounds."""
    mean = bootstrap_mean(sizes, sessions, rng=rng)
    held = {"value": mean.value, "low": mean.high, "high": mean.low}  # larger requests: fewer are held
    out = {
        name: round(budget_bytes / size, 2) if np.isfinite(size) and size > 0 else None
        for name, size in held.items()
    }
    return {**out, "n": mean.n, "num_clusters": mean.num_clusters}


def within_slo(reports: Sequence[LoadReport], slo: Slo) -> dict[str, Any]:
    """Requests of the load that met both targets: a mean over runs, bounds by distinct requests (Wilson).

    Runs repeat the same requests, so they do not add to n.
    """
    met: dict[str, list[bool]] = {}
    for report in reports:
        for result in report.results:
            met.setdefault(result.request_id, []).append(slo.is_met(result))
    if not met:
        return {}
    mean = float(sum(sum(each) / len(each) for each in met.values()))
    low, high = wilson_interval(int(mean), len(met))[0], wilson_interval(-int(-mean // 1), len(met))[1]
    return {
        "value": round(mean, 2), "low": round(low * len(met), 2), "high": round(high * len(met), 2),
        "n": len(met), "num_runs": len(reports),
    }  # fmt: skip
