"""What a workload looked like, in a few numbers a recipe can hold.

No text and no request is kept: moments, deciles, shares. Requests of one session resemble each other, so
every standard error is clustered by session (ratio estimator). `drift` compares another workload with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtune.workload.blocks import block_trace, has_content
from kvtune.workload.prefix import session_labels
from kvtune.workload.request import Workload, WorkloadRequest, transcript
from kvtune.workload.reuse import previous_reference
from kvtune.workload.script import script_of

__all__ = ["IntArray", "Lengths", "Observed", "clustered_mean", "observe", "workload_profile"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MAX_REQUESTS: Final = 100_000
"""The first so many are profiled; more would not make any figure here better."""
MAX_VALUES: Final = 24
"""Values of one tag that are kept; rarer ones count as `other`."""
MAX_NAME: Final = 40
TAGS: Final = ("case", "task", "language")
"""Tags the gate reports its strata by."""

_WINDOWS: Final = tuple(2**i for i in range(4, 12))
_MIN_WINDOWS: Final = 8
_MIN_CLUSTERS: Final = 8
_DECILES: Final = tuple(range(10, 100, 10))


def workload_profile(workload: Workload) -> dict[str, Any]:
    """JSON of what `workload_drift` needs of the workload a recipe is proven on.

    Lengths are characters for text (no tokenizer is needed), tokens otherwise; members that the workload
    does not tell (arrivals, answers, shared prefixes) are None.
    """
    seen = observe(workload)
    return {
        "version": 1, "num_requests": seen.num_requests, "num_sessions": seen.num_sessions,
        "prompt": _length_profile(seen.prompt, seen.clusters),
        "answer": _length_profile(seen.answer, seen.clusters),
        "sharing": seen.sharing, "arrivals": seen.arrivals,
        "strata": {name: _strata(labels, seen.clusters) for name, labels in seen.labels.items()},
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lengths:
    """`values` float64 [R], nan where a request does not state it; `unit` says what was counted."""

    unit: str
    values: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """The quantities of R requests. `clusters` int64 [R]: the session each belongs to; `labels`: stratum ->
    value of each request; `sharing`, `arrivals`: as in the profile."""

    num_requests: int
    num_sessions: int
    clusters: IntArray
    prompt: Lengths | None
    answer: Lengths | None
    sharing: Mapping[str, Any] | None
    arrivals: Mapping[str, Any] | None
    labels: Mapping[str, Sequence[str]]


def observe(workload: Workload) -> Observed:
    """Measure a workload's requests, those known to be unservable left out."""
    requests = [r for r in workload.requests[:MAX_REQUESTS] if r.problem is None]
    labels = session_labels(requests)
    known: dict[str, int] = {}
    clusters = np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.int64)
    return Observed(
        num_requests=len(requests), num_sessions=len(known), clusters=clusters, prompt=_prompts(requests),
        answer=_answers(requests), sharing=_sharing(workload, requests), arrivals=_arrivals(requests),
        labels=_labels(requests),
    )  # fmt: skip


def clustered_mean(values: FloatArray, clusters: IntArray) -> tuple[float, float | None]:
    """(mean, its standard error with requests clustered by session); no error below 8 sessions."""
    if not len(values):
        return 0.0, None
    _, places = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(places).astype(np.float64)
    mean = float(values.mean())
    if len(sizes) < _MIN_CLUSTERS:
        return mean, None
    residual = np.bincount(places, weights=values) - mean * sizes
    variance = len(sizes) / (len(sizes) - 1) * float((residual**2).sum()) / len(values) ** 2
    return mean, math.sqrt(variance)


def _prompts(requests: Sequence[WorkloadRequest]) -> Lengths | None:
    if 2 * sum(r.has_text for r in requests) > len(requests):
        return _lengths("characters", requests, lambda r: len(transcript(r)) if r.has_text else None)
    return _lengths(
        "tokens", requests, lambda r: len(r.token_ids) if r.token_ids is not None else r.input_length
    )


def _answers(requests: Sequence[WorkloadRequest]) -> Lengths | None:
    """Recorded token counts, else recorded texts, else what was asked for: the first most requests have."""
    sources: tuple[tuple[str, Callable[[WorkloadRequest], int | None]], ...] = (
        ("tokens", lambda r: r.output_length),
        ("characters", lambda r: None if r.answer is None else len(r.answer)),
        ("tokens at most", lambda r: r.max_tokens),
    )
    for unit, length in sources:
        found = _lengths(unit, requests, length)
        if found is not None:
            return found
    return None


def _lengths(
    unit: str, requests: Sequence[WorkloadRequest], length: Callable[[WorkloadRequest], int | None]
) -> Lengths | None:
    """None unless most requests state a length."""
    stated = [length(r) for r in requests]
    values = np.array([math.nan if n is None or n < 1 else float(n) for n in stated])
    is_known = np.isfinite(values)
    return Lengths(unit, values) if 2 * int(is_known.sum()) > len(values) else None


def _length_profile(lengths: Lengths | None, clusters: IntArray) -> dict[str, Any] | None:
    if lengths is None:
        return None
    known = np.isfinite(lengths.values)
    values, labels = lengths.values[known], clusters[known]
    mean, error = clustered_mean(np.log(values), labels)
    edges = np.percentile(values, _DECILES).tolist()
    shares = [clustered_mean((values <= edge).astype(np.float64), labels) for edge in edges]
    return {
        "unit": lengths.unit, "n": len(values), "mean_log": mean, "error": error,
        "deciles": edges, "shares": [s[0] for s in shares], "share_errors": [s[1] for s in shares],
        "longest": float(values.max()),
    }  # fmt: skip


def _sharing(workload: Workload, requests: Sequence[WorkloadRequest]) -> dict[str, Any] | None:
    """Share of prompt tokens that an empty cache hits within windows of so many successive requests.

    Hit rates grow with the number of requests seen, so workloads are compared over windows of one size.
    """
    if not any(has_content(r) for r in requests):
        return None
    trace = block_trace(dataclasses.replace(workload, requests=tuple(requests)))
    request = trace.request_of_reference()
    previous = previous_reference(trace.block_ids)
    from_request = np.where(previous >= 0, request[np.maximum(previous, 0)], -1)
    total = trace.prompt_tokens.astype(np.float64)
    windows: dict[str, dict[str, float]] = {}
    for size in _WINDOWS:
        count = len(requests) // size
        if count < _MIN_WINDOWS:
            break
        is_hit = from_request >= request // size * size
        tokens = trace.block_tokens[is_hit].astype(np.float64)
        hit = np.bincount(request[is_hit], weights=tokens, minlength=len(requests)).astype(np.float64)
        rates = _sums(hit, size, count) / np.maximum(_sums(total, size, count), 1.0)
        windows[str(size)] = {"mean": float(rates.mean()), "sd": float(rates.std(ddof=1)), "n": count}
    return {"block_size": trace.block_size, "windows": windows} if windows else None


def _sums(values: FloatArray, size: int, count: int) -> FloatArray:
    return values[: size * count].reshape(count, size).sum(axis=1)


def _arrivals(requests: Sequence[WorkloadRequest]) -> dict[str, Any] | None:
    """Logarithm of the arrival rate per second, and its error from stretches of equally many requests."""
    times = np.array([r.arrival_s for r in requests])
    gaps = np.diff(times)
    count = min(32, len(gaps) // 8)
    if count < _MIN_WINDOWS or not gaps.sum() > 0:
        return None
    size = len(gaps) // count
    means = _sums(gaps, size, count) / size
    error = float(means.std(ddof=1) / math.sqrt(count) / means.mean()) if means.mean() > 0 else None
    return {"log_rate": -math.log(float(gaps.mean())), "error": error, "n": count}


def _strata(labels: Sequence[str], clusters: IntArray) -> dict[str, Any]:
    """Value -> {share, error}; values beyond the most frequent are `other`."""
    frequent = {value for value, _ in Counter(labels).most_common(MAX_VALUES)}
    folded = np.array([v if v in frequent else "other" for v in labels])
    return {value: _share(folded == value, clusters) for value in sorted(set(folded.tolist()))}


def _share(is_it: npt.NDArray[np.bool_], clusters: IntArray) -> dict[str, Any]:
    share, error = clustered_mean(is_it.astype(np.float64), clusters)
    return {"share": share, "error": error}


def _labels(requests: Sequence[WorkloadRequest]) -> dict[str, list[str]]:
    found = {
        tag: [r.tags.get(tag, "untagged")[:MAX_NAME] for r in requests]
        for tag in TAGS if any(tag in r.tags for r in requests)
    }  # fmt: skip
    if any(r.has_text for r in requests):
        found["script"] = [script_of(transcript(r)) if r.has_text else "no text" for r in requests]
    return found | {"form": [_form(r) for r in requests]}


def _form(request: WorkloadRequest) -> str:
    """What a request is made of: chat with system prompt, tools, several turns; a bare prompt; token ids."""
    if not request.messages:
        return "prompt" if request.has_text else "no text"
    roles = [m.role for m in request.messages]
    parts = ["chat"]
    parts += ["system"] if "system" in roles else []
    parts += ["tools"] if request.tools else []
    parts += ["history"] if "assistant" in roles else []
    return " + ".join(parts)
