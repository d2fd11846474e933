"""Pick the next token of every sampled row.

A draw depends on (seed, token index) and that row's logits only: never on batch mates, chunking or
preemption. One uniform number per token inverts the cumulative distribution in vocabulary order.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtune.errors import UsageError
from kvtune.types import RequestId, Sampled, SamplingParams

__all__ = ["SampleRow", "check_sampling", "request_seed", "sample", "uniform"]

_SEED_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Who wants the token of one logits row: `index` counts the request's generated tokens from 0."""

    request_id: RequestId
    params: SamplingParams
    seed: int
    index: int


def check_sampling(params: SamplingParams, *, has_tokenizer: bool = True) -> None:
    """Raise UsageError on values no sampler can honour."""
    rules = (
        (params.max_tokens >= 1, f"max_tokens must be at least 1, found {params.max_tokens}"),
        (params.temperature >= 0.0, f"temperature must be 0 (greedy) or more, found {params.temperature}"),
        (0.0 < params.top_p <= 1.0, f"top_p must lie in (0, 1], found {params.top_p}"),
        (params.top_k >= 0, f"top_k must be 0 (off) or more, found {params.top_k}"),
        (params.logprobs is None or params.logprobs >= 0, f"logprobs must be >= 0, found {params.logprobs}"),
        (params.seed is None or -_SEED_LIMIT <= params.seed < _SEED_LIMIT,
         f"seed must fit in 64 bits, found {params.seed}"),
        (not isinstance(params.stop, str), "stop must be a tuple of strings, found one string"),
        (all(params.stop), "a stop string must not be empty"),
        (has_tokenizer or not params.stop,
         "stop strings need a tokenizer; this model folder has none, use stop_token_ids"),
    )  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise UsageError(message)


def request_seed(engine_seed: int, request_id: str, params: SamplingParams) -> int:
    """The request's own seed, or one derived from the engine's seed and the request id."""
    if params.seed is not None:
        return params.seed
    digest = hashlib.blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return struct.unpack("<q", digest)[0]


def uniform(seed: int, index: int) -> float:
    """The uniform number in [0, 1) of token `index`: 53 bits of BLAKE2b, the same on every platform."""
    digest = hashlib.blake2b(struct.pack("<qQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One token per row of `logits` [len(rows), V].

    Log-probabilities are those of the unmodified logits, before temperature and truncation, in float32.
    """
    greedy = _best_tokens(logits) if any(row.params.temperature == 0.0 for row in rows) else []
    with_logprobs = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = torch.log_softmax(logits[with_logprobs].float(), dim=-1) if with_logprobs else logits
    position = {row: i for i, row in enumerate(with_logprobs)}
    sampled: list[Sampled] = []
    for i, row in enumerate(rows):
        token = greedy[i] if row.params.temperature == 0.0 else _draw(logits[i], row)
        if i in position:
            sampled.append(_with_logprobs(row, token, logprobs[position[i]]))
        else:
            sampled.append(Sampled(request_id=row.request_id, token_id=token))
    return sampled


def _best_tokens(logits: torch.Tensor) -> list[int]:
    """Argmax of each row, ties to the lower id. numpy's takes a thirtieth of torch's time in bfloat16."""
    return logits.float().numpy().argmax(axis=-1).tolist()


def _with_logprobs(row: SampleRow, token: int, logprobs: torch.Tensor) -> Sampled:
    count = min(row.params.logprobs or 0, logprobs.shape[-1])
    values, ids = torch.topk(logprobs, count)
    top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(request_id=row.request_id, token_id=token, logprob=float(logprobs[token]), top=top)


def _draw(logits: torch.Tensor, row: SampleRow) -> int:
    """Temperature, then top-k, then top-p (as in vLLM), then the inverse of the cumulative distribution."""
    scores = logits.double().numpy() / row.params.temperature
    weights = np.exp(scores - scores.max())
    keep = _kept(weights, row.params)
    if keep is not None:
        weights = np.where(keep, weights, 0.0)
    cumulative = np.cumsum(weights)
    target = uniform(row.seed, row.index) * cumulative[-1]
    # side="right" skips tokens of weight zero: their cumulative value equals their predecessor's
    return min(int(np.searchsorted(cumulative, target, side="right")), int(np.flatnonzero(weights)[-1]))


def _kept(weights: np.ndarray, params: SamplingParams) -> np.ndarray | None:
    """Mask of tokens that survive top-k and top-p; None when nothing is cut. Ties go to lower ids."""
    k = params.top_k if 0 < params.top_k < len(weights) else len(weights)
    if k == len(weights) and params.top_p >= 1.0:
        return None
    order = np.argsort(-weights, kind="stable")[:k]
    if params.top_p < 1.0:
        mass = np.cumsum(weights[order])
        # the smallest set whose mass reaches top_p: keep up to and including the crossing token
        order = order[: int(np.searchsorted(mass, params.top_p * mass[-1])) + 1]
    keep = np.zeros(len(weights), dtype=bool)
    keep[order] = True
    return keep
