"""What a workload looks like: lengths, arrivals, and how much of its prompts an endless cache would reuse."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Final

import numpy as np

from kvtune.workload.prefix import CHARACTERS_PER_UNIT, PrefixTree, session_labels
from kvtune.workload.request import Workload, WorkloadRequest, transcript

__all__ = ["workload_statistics"]

SCHEMA_VERSION: Final = 1
_TOKENS_PER_BLOCK: Final = 16


def workload_statistics(workload: Workload) -> dict[str, Any]:
    """The JSON object of `kvtune trace`.

    Lengths of text requests are in characters (no tokenizer is at hand) and say so in `unit`.
    `arrival_cv`: coefficient of variation of the gaps between arrivals, None without arrival times.
    `prefix`: hits of a cache that never evicts; a block is identified by its whole prefix, partial last
    blocks count as blocks, output is not inserted.
    """
    requests = workload.requests
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
        "arrival_cv": _arrival_cv(requests),
        "prefix": _prefix(workload),
        "is_synthetic_text": workload.is_synthetic_text,
        "notes": list(workload.notes),
    }


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
    p50, p90, p99 = np.percentile(np.asarray(lengths, dtype=np.float64), [50, 90, 99]).tolist()
    return {
        "unit": unit, "n": len(lengths), "mean": sum(lengths) / len(lengths),
        "p50": p50, "p90": p90, "p99": p99, "max": max(lengths),
    }  # fmt: skip


def _arrival_cv(requests: Sequence[WorkloadRequest]) -> float | None:
    gaps = np.diff([request.arrival_s for request in requests])
    if len(gaps) < 2 or not gaps.any():
        return None
    return float(gaps.std() / gaps.mean())


def _prefix(workload: Workload) -> dict[str, Any]:
    tree = PrefixTree()
    blocks = hit_blocks = units = hit_units = 0
    block_size, unit = _block(workload)
    for request in workload.requests:
        content, length = _content(request, block_size, unit)
        num_known = len(tree)
        path = tree.add(content, salt=request.cache_salt)
        num_hits = sum(node < num_known for node in path)
        blocks += len(path)
        hit_blocks += num_hits
        units += length
        hit_units += min(length, num_hits * block_size)
    return {
        "ideal_block_hit_rate": hit_blocks / blocks if blocks else None,
        "ideal_token_hit_rate": hit_units / units if blocks else None,
        "hit_blocks": hit_blocks,
        "total_blocks": blocks,
        "unique_blocks": len(tree),
        "block_size": block_size if blocks else None,
        "unit": unit,
    }


def _block(workload: Workload) -> tuple[int, str]:
    if workload.block_size is not None:
        return workload.block_size, "tokens"
    if _unit(workload.requests) == "characters":
        return CHARACTERS_PER_UNIT, "characters"
    return _TOKENS_PER_BLOCK, "tokens"


def _content(request: WorkloadRequest, block_size: int, unit: str) -> tuple[Sequence[Hashable], int]:
    """(blocks of the prompt, its length); nothing where the unit differs or content is unknown."""
    content: Sequence[Hashable]
    if unit == "characters":
        content = transcript(request) if request.has_text else ""
    elif request.token_ids is not None:
        content = request.token_ids
    elif request.hash_ids is not None:
        return request.hash_ids, max(0, request.input_length or 0)
    else:
        return (), 0
    return [content[i : i + block_size] for i in range(0, len(content), block_size)], len(content)
