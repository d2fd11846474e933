"""What a workload looks like: lengths, arrivals, how much of its prompts repeats and whether it stays so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from kvtune.errors import UsageError
from kvtune.workload.arrivals import arrival_cv, arrival_statistics
from kvtune.workload.blocks import BlockTrace, block_trace, has_content
from kvtune.workload.prefix import session_labels
from kvtune.workload.request import Workload, WorkloadRequest, transcript
from kvtune.workload.reuse import reuse_statistics
from kvtune.workload.stationarity import stationarity

__all__ = ["workload_statistics"]

SCHEMA_VERSION: Final = 2
_MAX_BINS: Final = 40


def workload_statistics(workload: Workload, *, block_size: int | None = None) -> dict[str, Any]:
    """The JSON object of `kvtune trace`.

    Lengths of text requests are in characters (no tokenizer is at hand) and say so in `unit`.
    `arrival_cv`: coefficient of variation of the gaps between arrivals, None without arrival times.
    `prefix`: hits of a cache that never evicts; a block is identified by its whole prefix, partial last
    blocks count as blocks, output is not inserted. `block_size`: tokens per block; by default the trace's
    own, else 16. `reuse`, `stationarity`: see `reuse_statistics`, `stationarity`; None where the trace
    holds lengths only.
    """
    requests = workload.requests
    trace = _trace(workload, block_size)
    reuse = None if trace is None else reuse_statistics(trace)
    arrivals = np.asarray([request.arrival_s for request in requests], dtype=np.float64)
    return {
        "schema_version": SCHEMA_VERSION,
        "path": None if workload.path is None else str(workload.path),
        "sha256": workload.sha256,
        "format": workload.format,
        "num_requests": len(requests),
        "num_sessions": len(set(session_labels(requests))),
        "duration_s": requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0,
        "input_tokens": _input_lengths(requests),
        "output_tokens": _output_lengths(requests),
        "arrival_cv": arrival_cv(arrivals),
        "arrivals": arrival_statistics(arrivals),
        "prefix": _prefix(trace, reuse),
        "reuse": None if reuse is None else {k: v for k, v in reuse.items() if k not in _IN_PREFIX},
        "stationarity": None if trace is None else stationarity(trace).to_dict(),
        "is_synthetic_text": workload.is_synthetic_text,
        "notes": [*workload.notes, *(() if trace is None else trace.notes)],
        "warnings": list(workload.warnings),
    }


def _trace(workload: Workload, block_size: int | None) -> BlockTrace | None:
    if not any(has_content(request) for request in workload.requests):
        if block_size is not None:
            raise UsageError(
                f"{workload.path or 'this workload'} holds lengths only, so it cannot be cut into blocks"
            )
        return None
    return block_trace(workload, block_size)


def _input_lengths(requests: Sequence[WorkloadRequest]) -> dict[str, Any] | None:
    if _unit(requests) == "characters":
        return _quantiles([len(transcript(r)) for r in requests if r.has_text], "characters")
    counted = [len(r.token_ids) if r.token_ids is not None else r.input_length for r in requests]
    return _quantiles([length for length in counted if length is not None], "tokens")


def _output_lengths(requests: Sequence[WorkloadRequest]) -> dict[str, Any] | None:
    recorded = [r.output_length for r in requests if r.output_length is not None]
    if recorded:
        return _quantiles(recorded, "tokens")
    return _quantiles([len(r.answer) for r in requests if r.answer is not None], "characters")


def _unit(requests: Sequence[WorkloadRequest]) -> str:
    num_text = sum(request.has_text for request in requests)
    return "characters" if 2 * num_text > len(requests) else "tokens"


def _quantiles(lengths: Sequence[int], unit: str) -> dict[str, Any] | None:
    """None when no request states the length; `n` says how many do."""
    if not lengths:
        return None
    values = np.asarray(lengths, dtype=np.float64)
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {
        "unit": unit, "n": len(lengths), "mean": sum(lengths) / len(lengths),
        "p50": p50, "p90": p90, "p99": p99, "min": min(lengths), "max": max(lengths),
        "histogram": _histogram(values),
    }  # fmt: skip


def _histogram(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, list[float]]:
    """{edges [n + 1], counts [n]}: four bins to a doubling, the same on every trace, so that pictures of two
    traces can be laid over each other; lengths below 1 count in the first."""
    place = np.floor(4 * np.log2(np.maximum(values, 1))).astype(np.int64)
    low, high = int(place.min()), int(place.max())
    counts = np.bincount(place - low)
    step = -(-len(counts) // _MAX_BINS)
    padded = np.concatenate([counts, np.zeros(-len(counts) % step, dtype=np.int64)])
    edges = [2 ** (at / 4) for at in range(low, high + 1 + step, step)]
    merged = padded.reshape(-1, step).sum(axis=1).tolist()
    return {"edges": edges[: len(merged) + 1], "counts": merged}


_IN_PREFIX: Final = frozenset(
    ("ideal_block_hit_rate", "ideal_token_hit_rate", "hit_blocks", "total_blocks", "unique_blocks")
)


def _prefix(trace: BlockTrace | None, reuse: dict[str, Any] | None) -> dict[str, Any]:
    if trace is None or reuse is None:
        return dict.fromkeys(_IN_PREFIX) | {"block_size": None, "unit": "tokens", "hit_blocks": 0} | {
            "total_blocks": 0, "unique_blocks": 0, "is_estimated": False, "is_lower_bound": False,
        }  # fmt: skip
    return {name: reuse[name] for name in sorted(_IN_PREFIX)} | {
        "block_size": trace.block_size,
        "unit": "tokens",
        "is_estimated": trace.is_estimated,
        "is_lower_bound": trace.is_lower_bound,
    }
