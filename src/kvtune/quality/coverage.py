"""What a verdict covers and what it cannot see: strata, the worst request, limits in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtune.quality.divergence import TokenDivergence
from kvtune.quality.probes import ProbeOutcome
from kvtune.quality.replay import Reference

__all__ = ["METRICS", "blind_spots", "by_stratum", "covered", "finite", "item_means", "num_tokens", "worst"]

METRICS = ("kl", "flips", "delta_nll")

Floats = npt.NDArray[np.float64]


def item_means(divergences: Sequence[TokenDivergence], metric: str) -> Floats:
    return np.array([float(getattr(d, metric).mean()) for d in divergences])


def num_tokens(divergences: Sequence[TokenDivergence]) -> Floats:
    """Tokens of each answer, its weight: one flip in an answer of one token is no flip rate of 100 %."""
    return np.array([float(len(d.kl)) for d in divergences])


def worst(reference: Reference, candidate: Sequence[TokenDivergence]) -> dict[str, Any]:
    kl = item_means(candidate, "kl")
    index = int(np.argmax(np.where(np.isnan(kl), np.inf, kl)))
    return {
        "request_id": candidate[index].item_id, "kl": finite(float(kl[index])),
        "flips": float(candidate[index].flips.mean()),
        "delta_nll": finite(float(candidate[index].delta_nll.mean())),
        "p999_token_kl": finite(float(np.quantile(np.concatenate([d.kl for d in candidate]), 0.999))),
        **dict(reference.strata[index]),
    }  # fmt: skip


def by_stratum(reference: Reference, candidate: Sequence[TokenDivergence]) -> list[dict[str, Any]]:
    """Raw means of each stratum, so that a reader sees which traffic the verdict covers."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, strata in enumerate(reference.strata):
        for pair in strata.items():
            groups.setdefault(pair, []).append(i)
    means, tokens = {m: item_means(candidate, m) for m in METRICS}, num_tokens(candidate)
    return [
        {"stratum": name, "value": value, "num_requests": len(rows),
         **{m: finite(float(np.average(means[m][rows], weights=tokens[rows]))) for m in METRICS}}
        for (name, value), rows in sorted(groups.items())
    ]  # fmt: skip


def covered(
    strata: Sequence[Mapping[str, Any]], probes: ProbeOutcome | None
) -> dict[str, dict[str, list[str]]]:
    """Values of each stratum that were seen: `requests` by replay, `probes` by questions."""
    sides: dict[str, dict[str, list[str]]] = {"requests": {}, "probes": {}}
    for side, entries in (("requests", strata), ("probes", probes.strata if probes else ())):
        for entry in entries:
            sides[side].setdefault(str(entry["stratum"]), []).append(str(entry["value"]))
    return sides


def blind_spots(reference: Reference, probes: ProbeOutcome | None) -> list[str]:
    """What this verdict cannot see, one sentence each."""
    longest = max(len(item.prompt_token_ids) for item in reference.items)
    answer = max(len(item.continuation) for item in reference.items)
    clusters = len(set(reference.clusters))
    spots = [
        f"prompts longer than {longest:,} tokens, the longest replayed",
        f"answers past their first {answer:,} tokens",
        "sampled answers: the replayed ones were generated greedily",
        f"kinds of request rarer than 1 in {max(1, clusters // 3):,}: {clusters:,} sessions may lack them",
    ]
    if reference.is_synthetic_text:
        spots.append("real text: prompts were made up from lengths and hashes")
    if probes is None:
        spots.append("whether answers stay right: no probe was asked")
    elif probes.left_out:
        names = ", ".join(str(t["task"]) for t in probes.left_out)
        spots.append(f"tasks that the baseline itself hardly solves: {names}")
    return spots


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
