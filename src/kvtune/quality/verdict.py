"""The gate: is this configuration harmless on these requests, harmful, or not yet known?

    not finite ------------------------------> FAIL
    lossy knob, every bit equal -------------> INERT      (the knob did nothing, or was never read)
    every bit equal -------------------------> PASS       (lossless)
    lower bound of any metric > margin ------> FAIL
    A/A floor of any metric > margin / 3 ----> UNDECIDED  (the ruler is too coarse)
    too few sessions ------------------------> UNDECIDED
    every upper bound <= margin -------------> PASS
    otherwise -------------------------------> UNDECIDED  (says how many more requests)

All bounds are one-sided on the *excess* over the A/A floor, per token, with sessions drawn whole: 95 %, or
more where several candidates or looks share the error (see `levels`). Probes and the user's own checker are
paired right-or-wrong answers against a margin of their own. Each metric is tested at its margin; passing
needs all of them, so no correction is due (intersection-union). A high-value request that was harmed fails
alone, whatever the means say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from kvtune.quality.answers import AnswerOutcome
from kvtune.quality.bootstrap import CONFIDENCE, Estimate, bootstrap_mean
from kvtune.quality.coverage import (
    METRICS,
    blind_spots,
    by_stratum,
    covered,
    finite,
    item_means,
    num_tokens,
    worst,
)
from kvtune.quality.divergence import TokenDivergence, divergence, is_bit_equal
from kvtune.quality.margins import Margin
from kvtune.quality.probes import ProbeOutcome
from kvtune.quality.replay import Reference
from kvtune.target import Scores

__all__ = [
    "METRICS",
    "MetricVerdict",
    "QualityVerdict",
    "Verdict",
    "combine",
    "judge",
    "weigh_divergences",
]

MIN_CLUSTERS = 8
"""Below this a bootstrap over sessions is guesswork."""
FLOOR_SHARE = 1 / 3
MAX_MORE_REQUESTS = 100_000


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNDECIDED = "UNDECIDED"
    INERT = "INERT"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricVerdict:
    """One metric against its margin. `raw`: before the floor was subtracted; `excess`: after, with bounds.

    `more_requests`: how many more would settle it at the spread seen; None where no number would.
    """

    name: str
    margin: float
    raw: float
    floor: float
    excess: Estimate
    verdict: Verdict
    more_requests: int | None = None
    unit: str = "requests"
    """What `more_requests` counts: requests, or questions of probes."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "margin": self.margin, "raw": finite(self.raw), "floor": finite(self.floor),
            "excess": self.excess.to_dict(), "verdict": self.verdict.value,
            "more_requests": self.more_requests, "unit": self.unit,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityVerdict:
    """What the gate says and on what it rests. `is_proven`: a reader may call the answers unharmed."""

    verdict: Verdict
    reason: str
    margin: Margin
    metrics: tuple[MetricVerdict, ...] = ()
    num_requests: int
    num_clusters: int
    num_tokens: int
    num_ids: int = 0
    is_exact_kl: bool = False
    is_bit_equal: bool = False
    is_lossless: bool = False
    is_synthetic_text: bool = False
    num_decode: int = 0
    worst_request: Mapping[str, Any] = field(default_factory=dict[str, Any])
    strata: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    confidence: float = CONFIDENCE
    probes: ProbeOutcome | None = None
    answers: AnswerOutcome | None = None
    cannot_see: tuple[str, ...] = ()
    num_planned: int = 0
    """Requests of the whole sample; fewer were replayed where an early look decided."""
    divergences: tuple[tuple[TokenDivergence, TokenDivergence], ...] = field(default=(), repr=False)
    """(candidate, A/A floor) of each replayed request, in order; not part of `to_dict`."""

    @property
    def more_requests(self) -> int | None:
        """What an UNDECIDED verdict still needs; None where it is decided or no number would do."""
        if self.verdict is not Verdict.UNDECIDED:
            return None
        return max((m.more_requests for m in self.metrics if m.more_requests is not None), default=None)

    @property
    def is_proven(self) -> bool:
        return self.verdict is Verdict.PASS and (self.is_lossless or not self.is_synthetic_text)

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict.value, "reason": self.reason, "proven": self.is_proven,
            "lossless": self.is_lossless, "bit_equal": self.is_bit_equal,
            "margin": self.margin.to_dict(),
            "metrics": {m.name: m.to_dict() for m in self.metrics},
            "num_requests": self.num_requests, "num_clusters": self.num_clusters,
            "num_tokens": self.num_tokens, "num_decode_requests": self.num_decode,
            "kl_ids": self.num_ids, "kl_exact": self.is_exact_kl,
            "synthetic_text": self.is_synthetic_text,
            "worst_request": dict(self.worst_request), "strata": [dict(s) for s in self.strata],
            "notes": list(self.notes), "confidence": self.confidence,
            "covered": covered(self.strata, self.probes), "cannot_see": list(self.cannot_see),
            "more_requests": self.more_requests, "num_planned": self.num_planned or self.num_requests,
            "probes": None if self.probes is None else self.probes.to_dict(),
            "answers": None if self.answers is None else self.answers.to_dict(),
        }  # fmt: skip


def judge(
    reference: Reference, scores: Sequence[Scores], *, margin: Margin, is_lossy: bool,
    rng: np.random.Generator, decode_scores: Sequence[Scores] | None = None,
    probes: ProbeOutcome | None = None, answers: AnswerOutcome | None = None,
    confidence: float = CONFIDENCE, num_planned: int | None = None,
) -> QualityVerdict:  # fmt: skip
    """Weigh a candidate's replay (and, where taken, decode replay, probes, answers) against the reference.

    `is_lossy`: the candidate differs from the baseline in a knob that changes what reads return.
    `confidence`: of each one-sided bound; those of `probes` and `answers` were made with their own.
    `num_planned`: requests of the whole sample, where `reference` is an early look at it.
    """
    base = _facts(reference, margin)
    base |= {"confidence": confidence, "probes": probes, "answers": answers}
    base["num_planned"] = num_planned or len(reference.items)
    base["cannot_see"] = tuple(blind_spots(reference, probes))
    pairs = list(zip(reference.scores, scores, strict=True))
    decoded = [reference.scores[i] for i in reference.decode_items] if decode_scores else []
    is_equal = all(is_bit_equal(a, b) for a, b in pairs)
    if is_equal and (is_lossy or _same_decode(reference, decode_scores)):
        return _judge_bit_equal(base, pairs, is_lossy)
    candidate = [divergence(a, b) for a, b in pairs]
    floor = [divergence(a, b) for a, b in zip(reference.scores, reference.aa_scores, strict=True)]
    base |= {"num_ids": min(d.num_ids for d in candidate), "is_exact_kl": all(d.is_exact for d in candidate)}
    base["divergences"] = tuple(zip(candidate, floor, strict=True))
    base["worst_request"], base["strata"] = worst(reference, candidate), by_stratum(reference, candidate)
    base["notes"] = (*base["notes"], *_notes(reference, candidate))
    decode_pair = (
        [divergence(a, b) for a, b in zip(decoded, decode_scores or (), strict=True)],
        [divergence(a, b) for a, b in zip(decoded, reference.decode_scores if decoded else (), strict=True)],
    )
    broken = [d.item_id for d in (*candidate, *decode_pair[0], *floor, *decode_pair[1]) if not d.is_finite]
    if broken:
        reason = f"log-probabilities of request {broken[0]!r} are not finite ({len(broken)} in all)"
        return QualityVerdict(verdict=Verdict.FAIL, reason=reason, **base)
    metrics = weigh_divergences(
        candidate, floor, reference.clusters, margin=margin, rng=rng, confidence=confidence
    )
    if decoded:
        base["num_decode"] = len(decoded)
        rows = reference.decode_items
        prefill_pair = [candidate[i] for i in rows], [floor[i] for i in rows]
        clusters = [reference.clusters[i] for i in rows]
        metrics += [
            _weigh_decode(prefill, decode_pair, prefill_pair, clusters, rng=rng, confidence=confidence)
            for prefill in metrics
        ]
    metrics += _weigh_answers(probes, answers, margin)
    verdict, reason = combine(metrics, base["num_clusters"], confidence)
    if answers is not None and answers.harm and verdict is not Verdict.FAIL:
        verdict, reason = Verdict.FAIL, answers.harm
    elif answers is not None and answers.doubt and verdict is Verdict.PASS:
        verdict, reason = Verdict.UNDECIDED, answers.doubt
    return QualityVerdict(verdict=verdict, reason=reason, metrics=tuple(metrics), **base)


def weigh_divergences(
    candidate: Sequence[TokenDivergence], floor: Sequence[TokenDivergence], clusters: Sequence[str], *,
    margin: Margin, rng: np.random.Generator, confidence: float = CONFIDENCE,
) -> list[MetricVerdict]:  # fmt: skip
    """Each metric of a replay against its margin; `floor` is the A/A replay of the same items."""
    return [
        _weigh(m, (candidate, floor), clusters, margin=margin, rng=rng, confidence=confidence)
        for m in METRICS
    ]


def _same_decode(reference: Reference, decode_scores: Sequence[Scores] | None) -> bool:
    if not decode_scores:
        return True
    return all(is_bit_equal(a, b) for a, b in zip(reference.decode_scores, decode_scores, strict=True))


def _facts(reference: Reference, margin: Margin) -> dict[str, Any]:
    notes = ("generic: text is synthetic",) if reference.is_synthetic_text else ()
    return {
        "margin": margin, "num_requests": len(reference.items), "num_clusters": len(set(reference.clusters)),
        "num_tokens": sum(len(s.argmax) for s in reference.scores), "notes": notes,
        "is_synthetic_text": reference.is_synthetic_text,
    }  # fmt: skip


def _notes(reference: Reference, candidate: Sequence[TokenDivergence]) -> list[str]:
    notes: list[str] = []
    if reference.is_synthetic_text:
        notes.append("not proven: a lossy configuration needs real text")
    if not reference.decode_items:
        notes.append("no decode replay: scored by prefill alone")
    if not all(d.is_exact for d in candidate):
        k = min(d.num_ids for d in candidate)
        notes.append(f"KL over the {k} ids known to both sides, rest lumped: a lower bound of the true KL")
    return notes


def _judge_bit_equal(
    base: dict[str, Any], pairs: Sequence[tuple[Scores, Scores]], is_lossy: bool
) -> QualityVerdict:
    base |= {"is_bit_equal": True, "num_ids": min(a.ids.shape[1] for a, _ in pairs)}
    base["is_exact_kl"] = all(a.is_full for a, _ in pairs)
    if not all(np.isfinite(a.token_logprobs).all() for a, _ in pairs):
        return QualityVerdict(verdict=Verdict.FAIL, reason="log-probabilities are not finite", **base)
    if is_lossy:
        reason = "every bit equals the baseline's: the setting had no effect, or scoring never read the cache"
        return QualityVerdict(verdict=Verdict.INERT, reason=reason, **base)
    reason = "lossless: every bit equals the baseline's"
    return QualityVerdict(verdict=Verdict.PASS, reason=reason, is_lossless=True, **base)


_Means = np.ndarray[Any, np.dtype[np.float64]]
_Pair = tuple[Sequence[TokenDivergence], Sequence[TokenDivergence]]


def _weigh(
    name: str, pair: _Pair, clusters: Sequence[str], *, margin: Margin, rng: np.random.Generator,
    confidence: float,
) -> MetricVerdict:  # fmt: skip
    """One metric of (candidate, floor) over all requests."""
    raw, noise, tokens = item_means(pair[0], name), item_means(pair[1], name), num_tokens(pair[0])
    excess = bootstrap_mean(raw - noise, clusters, rng=rng, weights=tokens, confidence=confidence)
    if name == "flips":  # rule of three: where no flip was seen, drawing again cannot see one either
        excess = replace(excess, high=max(excess.high, -math.log(1 - confidence) / float(tokens.sum())))
    means = float(np.average(raw, weights=tokens)), float(np.average(noise, weights=tokens))
    return _metric_verdict(name, margin.limits()[name], means, excess)


def _weigh_decode(
    prefill: MetricVerdict, decode: _Pair, same_by_prefill: _Pair, clusters: Sequence[str], *,
    rng: np.random.Generator, confidence: float,
) -> MetricVerdict:  # fmt: skip
    """One metric as decoding would show it: all requests by prefill plus what decoding adds on the subset.

    Sixteen requests alone cannot hold a mean to the margin; their paired difference to the prefill replay
    of the same requests can, and is exactly zero where both paths compute the same bits. The bounds are
    sums of bounds, hence conservative.
    """
    raw, noise = item_means(decode[0], prefill.name), item_means(decode[1], prefill.name)
    known, known_noise = (item_means(side, prefill.name) for side in same_by_prefill)
    tokens = num_tokens(decode[0])
    added = bootstrap_mean(
        (raw - noise) - (known - known_noise), clusters, rng=rng, weights=tokens, confidence=confidence
    )
    excess = Estimate(
        value=prefill.excess.value + added.value, low=prefill.excess.low + added.low,
        high=prefill.excess.high + added.high, n=added.n, num_clusters=added.num_clusters,
    )  # fmt: skip
    means = float(np.average(raw, weights=tokens)), float(np.average(noise, weights=tokens))
    return _metric_verdict(f"decode_{prefill.name}", prefill.margin, means, excess)


def _weigh_answers(
    probes: ProbeOutcome | None, answers: AnswerOutcome | None, margin: Margin
) -> list[MetricVerdict]:
    """Right-or-wrong answers as metrics. Noise of the baseline turns answers either way: the bounds hold it,
    so there is no floor to take off."""
    out: list[MetricVerdict] = []
    if probes is not None:
        found = _metric_verdict("probes", margin.probes, (probes.loss.value, 0.0), probes.loss)
        more = probes.more_needed(margin.probes) if found.verdict is Verdict.UNDECIDED else None
        out.append(replace(found, more_requests=more, unit="questions"))
    if answers is not None and answers.loss is not None:
        out.append(_metric_verdict("checker", margin.probes, (answers.loss.value, 0.0), answers.loss))
    return out


def _metric_verdict(name: str, limit: float, means: tuple[float, float], excess: Estimate) -> MetricVerdict:
    """`means`: per token, of the candidate and of the A/A floor."""
    raw, noise = means
    floor_level = abs(noise)  # delta-NLL noise has a sign; its size is what blinds the ruler
    verdict = Verdict.UNDECIDED
    if excess.low > limit:
        verdict = Verdict.FAIL
    elif floor_level <= limit * FLOOR_SHARE and excess.high <= limit:
        verdict = Verdict.PASS
    return MetricVerdict(
        name=name, margin=limit, raw=raw, floor=floor_level, excess=excess, verdict=verdict,
        more_requests=_more_requests(excess, limit) if verdict is Verdict.UNDECIDED and
        floor_level <= limit * FLOOR_SHARE else None,
    )  # fmt: skip


def _more_requests(excess: Estimate, limit: float) -> int | None:
    """Requests to add until the bound that matters clears the margin: its distance shrinks as 1/sqrt(n)."""
    gap = limit - excess.value
    reach = excess.high - excess.value if gap > 0 else excess.value - excess.low
    if gap == 0 or not math.isfinite(reach):
        return None
    more = math.ceil(excess.n * ((reach / gap) ** 2 - 1))
    return max(more, 1) if more <= MAX_MORE_REQUESTS else None


def combine(metrics: Sequence[MetricVerdict], num_clusters: int, confidence: float) -> tuple[Verdict, str]:
    """The verdict of all metrics together, and its reason in words."""
    failed = [m for m in metrics if m.verdict is Verdict.FAIL]
    if failed and num_clusters >= MIN_CLUSTERS:
        harm = max(failed, key=lambda m: m.excess.low / m.margin)
        low = f"{harm.excess.low:.4g}"
        return Verdict.FAIL, (
            f"{harm.name} is at least {low} with {100 * confidence:.3g} % confidence, margin {harm.margin:g}"
        )
    blind = [m for m in metrics if m.floor > m.margin * FLOOR_SHARE]
    if blind:
        m = max(blind, key=lambda m: m.floor / m.margin)
        return Verdict.UNDECIDED, (
            f"A/A noise of {m.name} is {m.floor:.4g}, above a third of the margin {m.margin:g}: "
            "replay in float32 or choose a wider margin"
        )
    if num_clusters < MIN_CLUSTERS:
        return Verdict.UNDECIDED, (
            f"{num_clusters} sessions; at least {MIN_CLUSTERS - num_clusters} more are needed for an interval"
        )
    open_ = [m for m in metrics if m.verdict is Verdict.UNDECIDED]
    if open_:
        m = max(open_, key=lambda m: m.excess.high / m.margin)
        more = (
            "no practical number of" if m.more_requests is None else f"about {max(1, m.more_requests)} more"
        )
        return Verdict.UNDECIDED, (
            f"{m.name} is {m.excess.value:.4g} with bounds [{m.excess.low:.4g}, {m.excess.high:.4g}] around "
            f"the margin {m.margin:g}; {more} {m.unit} would settle it"
        )
    m = max(metrics, key=lambda m: m.excess.high / m.margin)
    return Verdict.PASS, f"closest is {m.name}: at most {m.excess.high:.4g}, margin {m.margin:g}"
