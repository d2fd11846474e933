"""Benchmark records of a server's streams and of an engine's load run; `kvtune.latency` sums them up."""

from __future__ import annotations

import numpy as np

from kvtune.adapters.openai_client import StreamResult
from kvtune.latency import BenchRecord, summarise
from kvtune.target import LoadRequest, LoadResult

__all__ = ["BenchRecord", "arrivals_at_rate", "of_load", "of_stream", "summarise"]


def of_stream(result: StreamResult) -> BenchRecord:
    return BenchRecord(
        request_id=result.request_id,
        start_s=result.start_s,
        input_tokens=result.num_prompt_tokens,
        output_tokens=result.output_tokens,
        cached_tokens=result.num_cached_tokens,
        ttft_s=result.ttft_s,
        tpot_s=result.tpot_s,
        e2e_s=result.e2e_s,
        itl_s=result.itl_s,
        text=result.text,
        error=result.error,
    )


def of_load(result: LoadResult, request: LoadRequest) -> BenchRecord:
    return BenchRecord(
        request_id=result.request_id,
        start_s=request.arrival_s,
        input_tokens=len(request.prompt_token_ids),
        output_tokens=len(result.token_ids),
        cached_tokens=result.num_cached_tokens,
        ttft_s=result.ttft_s,
        tpot_s=result.tpot_s,
        e2e_s=result.e2e_s,
        itl_s=result.itl_s,
        error=result.error,
    )


def arrivals_at_rate(
    num_requests: int, rate: float, *, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Arrival times [s], gamma gaps of mean 1 / rate; burstiness 1 is Poisson, below 1 burstier."""
    if np.isinf(rate):
        return [0.0] * num_requests
    gaps = rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=num_requests)
    return [0.0, *np.cumsum(gaps)[: num_requests - 1].tolist()]
