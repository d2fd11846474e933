"""How far a candidate's next-token distributions lie from the reference's, token by token.

| symbol | meaning | shape |
|---|---|---|
| T | scored tokens of one item | |
| k | token ids whose log-probabilities are known | |
| p, q | reference and candidate probabilities | [T, k] |

All arithmetic in float64. With the whole vocabulary the KL divergence is exact. With k ids the rest
of the vocabulary is lumped into one outcome; by the data-processing inequality the lumped KL never
exceeds the true one: it is a **lower bound**, so a FAIL on it stands and a PASS is stated with its k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtune.errors import TargetError
from kvtune.target import Scores

__all__ = ["TokenDivergence", "divergence", "is_bit_equal", "kl_divergence"]

Floats = npt.NDArray[np.float64]

TAIL_FLOOR = 1e-7
"""Mass mixed into both lumped tails: float32 log-probabilities leave 1 - sum(p) uncertain by about this
much. Mixing the same point mass into p and q can only lower their KL, so the bound stays a lower one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDivergence:
    """Per scored token of one item; each array [T] float64. `num_ids`: fewest ids compared at a token.

    `kl` in nats, `flips` 1.0 where the most likely token differs, `delta_nll` the candidate's
    negative log-likelihood of the reference token minus the reference's (positive: worse).
    """

    item_id: str
    kl: Floats
    flips: Floats
    delta_nll: Floats
    num_ids: int
    is_exact: bool

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.kl).all() and np.isfinite(self.delta_nll).all())


def divergence(reference: Scores, candidate: Scores) -> TokenDivergence:
    """Compare two replays of the same tokens. TargetError when they are not of the same tokens."""
    if reference.item_id != candidate.item_id or len(reference.argmax) != len(candidate.argmax):
        raise TargetError(
            f"replay of {reference.item_id!r} came back as {candidate.item_id!r} with "
            f"{len(candidate.argmax)} of {len(reference.argmax)} tokens; the engine's scores cannot be used"
        )
    kl, num_ids, is_exact = kl_divergence(reference, candidate)
    nll_reference = -reference.token_logprobs.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf is a NaN that the verdict reports
        delta_nll = -candidate.token_logprobs.astype(np.float64) - nll_reference
    return TokenDivergence(
        item_id=reference.item_id, kl=kl,
        flips=(reference.argmax != candidate.argmax).astype(np.float64),
        delta_nll=delta_nll, num_ids=num_ids, is_exact=is_exact,
    )  # fmt: skip


def kl_divergence(reference: Scores, candidate: Scores) -> tuple[Floats, int, bool]:
    """KL(reference || candidate) per token [T] in nats, fewest ids compared, and whether it is exact."""
    log_p, log_q, present = _aligned(reference, candidate)
    num_ids = int(present.sum(axis=1).min()) if len(present) else 0
    if reference.is_full and bool(present.all()):
        return _sum_kl(_normalised(log_p), _normalised(log_q)), num_ids, True
    log_p, log_q = _with_tail(log_p, present), _with_tail(log_q, present)
    return _sum_kl(log_p, log_q), num_ids, False


def is_bit_equal(one: Scores, other: Scores) -> bool:
    """Whether two replays agree in every bit: then nothing that was read from the cache differed."""
    return (
        one.item_id == other.item_id
        and np.array_equal(one.ids, other.ids)
        and np.array_equal(one.argmax, other.argmax)
        and _same_bits(one.logprobs, other.logprobs)
        and _same_bits(one.token_logprobs, other.token_logprobs)
    )


def _same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _aligned(reference: Scores, candidate: Scores) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Both log-probabilities at the reference's ids [T, k] and which of them both sides know."""
    log_p = reference.logprobs.astype(np.float64)
    log_q = candidate.logprobs.astype(np.float64)
    known = reference.ids >= 0
    if np.array_equal(reference.ids, candidate.ids):
        return log_p, log_q, known
    # the engine answered with its own top ids: look up each reference id among them, row by row
    order = np.argsort(candidate.ids, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(candidate.ids, order, axis=1)
    found = np.empty(reference.ids.shape, np.int64)
    for row, (have, want) in enumerate(zip(sorted_ids, reference.ids, strict=True)):
        found[row] = np.minimum(np.searchsorted(have, want), sorted_ids.shape[1] - 1)
    matches = np.take_along_axis(sorted_ids, found, axis=1) == reference.ids
    log_q = np.take_along_axis(np.take_along_axis(log_q, order, axis=1), found, axis=1)
    return log_p, np.where(matches & known, log_q, -np.inf), matches & known


def _normalised(log_p: Floats) -> Floats:
    high = log_p.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return log_p - high - np.log(np.exp(log_p - high).sum(axis=1, keepdims=True))


def _with_tail(log_p: Floats, present: npt.NDArray[np.bool_]) -> Floats:
    """[T, k] -> [T, k+1] log-probabilities: ids both sides know, then everything else as one outcome."""
    p = np.where(present, np.exp(log_p), 0.0)
    total = p.sum(axis=1, keepdims=True)
    tail = np.maximum(1.0 - total, 0.0) + TAIL_FLOOR  # NaN stays NaN: np.maximum propagates it
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.concatenate([p, tail], axis=1) / (total + tail))


def _sum_kl(log_p: Floats, log_q: Floats) -> Floats:
    """Sum over outcomes of p (log p - log q); outcomes with p = 0 add nothing, q = 0 < p is infinite."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * (log_p - log_q)
    kl = np.where(log_p == -np.inf, np.where(np.isnan(log_q), np.nan, 0.0), terms).sum(axis=1)
    return np.where(kl < 0, 0.0, kl)  # KL >= 0; rounding alone can go below, NaN passes through
