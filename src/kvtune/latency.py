"""What requests saw in one run, as one JSON object under the keys `vllm bench serve` uses.

Definitions follow vLLM's benchmark: TTFT, end-to-end latency (e2el) and inter-token latency in
milliseconds over completed requests, TPOT = (e2el - TTFT) / (output tokens - 1) where there are two.
`schema_version`, `is_complete` and `incomplete_reason` are AIPerf's. Real and simulated runs share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BenchRecord", "latency_statistics", "summarise"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRecord:
    """What one request took and gave. Times in seconds; `start_s` on the run's clock."""

    request_id: str
    start_s: float
    input_tokens: int | None
    output_tokens: int
    cached_tokens: int | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    itl_s: Sequence[float] | npt.NDArray[np.float64] = ()
    text: str = ""
    error: str | None = None


def summarise(records: Sequence[BenchRecord], duration_s: float, *, details: bool = False) -> dict[str, Any]:
    """The result object without what only the caller knows (date, backend, model). NaN never appears:
    a statistic without data is None."""
    done = [record for record in records if record.error is None]
    inputs = sum(record.input_tokens or 0 for record in done)
    outputs = sum(record.output_tokens for record in done)
    gaps = [np.asarray(r.itl_s, float) for r in done]
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "num_prompts": len(records),
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_cached_tokens": _sum_known(record.cached_tokens for record in done),
        "request_throughput": len(done) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "max_concurrent_requests": _most_at_once(done),
        **latency_statistics("ttft", [r.ttft_s for r in done]),
        **latency_statistics("tpot", [r.tpot_s for r in done]),
        **latency_statistics("itl", np.concatenate(gaps) if gaps else ()),
        **latency_statistics("e2el", [r.e2e_s for r in done]),
        "is_complete": len(done) == len(records),
        "incomplete_reason": next((r.error for r in records if r.error is not None), None),
    }
    return result | _details(records) if details else result


def _sum_known(counts: Iterable[int | None]) -> int | None:
    """None where the server never said, not zero."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def latency_statistics(
    name: str, seconds: Sequence[float | None] | npt.NDArray[np.float64]
) -> dict[str, float | None]:
    """`mean_<name>_ms` and the like [ms] over the values that are there; None where none is."""
    if not isinstance(seconds, np.ndarray):
        seconds = np.array([value for value in seconds if value is not None], float)
    values = seconds * 1e3
    keys = [f"{stem}_{name}_ms" for stem in ("mean", "median", "std", "p90", "p95", "p99")]
    if values.size == 0:
        return dict.fromkeys(keys)
    quantiles = np.percentile(values, [90, 95, 99])
    figures = [values.mean(), np.median(values), values.std(), *quantiles]
    return {key: float(figure) for key, figure in zip(keys, figures, strict=True)}


def _most_at_once(records: Sequence[BenchRecord]) -> int:
    """Largest number of requests between their start and their last token at any moment."""
    edges = [edge for r in records for edge in ((r.start_s, 1), (r.start_s + (r.e2e_s or 0.0), -1))]
    running = most = 0
    for _, change in sorted(edges):  # at equal times departures (-1) come first
        running += change
        most = max(most, running)
    return most


def _details(records: Sequence[BenchRecord]) -> dict[str, Any]:
    return {
        "request_ids": [r.request_id for r in records],
        "input_lens": [r.input_tokens for r in records],
        "output_lens": [r.output_tokens for r in records],
        "cached_lens": [r.cached_tokens for r in records],
        "start_times": [r.start_s for r in records],
        "ttfts": [r.ttft_s for r in records],
        "itls": [np.asarray(r.itl_s, float).tolist() for r in records],
        "latencies": [r.e2e_s for r in records],
        "errors": [r.error or "" for r in records],
    }
