"""KV memory of baseline and winner, predicted beside measured, where the target can be looked into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kvtune.target import Config, LoadRequest, MeasuresMemory, Target
from kvtune.tune.evaluation import CRASHES
from kvtune.tune.pace import Pace
from kvtune.workload import TokenRequest

__all__ = ["memory_record"]

MAX_REQUESTS = 8
SAFETY = 1.25
BUDGET_SHARE = 0.5
"""The requests looked at fill at most this share of the KV budget: nothing may be preempted."""


def memory_record(
    target: Target, sides: Mapping[str, Config], requests: Sequence[TokenRequest], *,
    kv_budget_bytes: int | None, context: int, pace: Pace,
) -> dict[str, Any]:  # fmt: skip
    """`{side: {"moments": [...]}}`, or `{"note": why not}`; never what ends a run that is as good as done."""
    if not isinstance(target, MeasuresMemory):
        return {"note": f"engine {target.name} does not tell its KV memory"}
    together = min([MAX_REQUESTS, *(int(c.get("max_num_seqs", MAX_REQUESTS)) for c in sides.values())])
    largest = max(target.kv_bytes_per_token(config, context=context) for config in sides.values())
    chosen = _chosen(requests, together, largest, kv_budget_bytes)
    if not chosen:
        return {"note": "no request of the workload fits twice into the KV budget"}
    found: dict[str, Any] = {"num_requests": len(chosen)}
    for side, config in sides.items():
        needed = SAFETY * max(pace.cost_s("start") + pace.cost_s("long load"), pace.cost_s("memory"))
        if pace.left_s < needed:  # a load run is what comes nearest to it before it was done once
            return {"note": "no time was left to look at the memory"}
        try:
            with pace.measure("memory"):
                moments = target.memory_moments(config, chosen, kv_budget_bytes=kv_budget_bytes)
        except CRASHES as error:
            return {"note": " ".join(f"looking at the memory of the {side} failed: {error}".split())}
        found[side] = {"moments": [asdict(moment) for moment in moments]}
    return found


def _chosen(
    requests: Sequence[TokenRequest], together: int, bytes_per_token: float, kv_budget_bytes: int | None
) -> list[LoadRequest]:
    """At most `together` requests, spread over the lengths, that are held at once with room to spare."""
    order = sorted(requests, key=lambda r: (len(r.prompt_token_ids), r.request_id))
    count = min(together, len(order))
    while count:
        picked = [order[i * (len(order) - 1) // max(1, count - 1)] for i in range(count)]
        tokens = sum(len(r.prompt_token_ids) + r.max_tokens for r in picked)
        if kv_budget_bytes is None or tokens * bytes_per_token <= BUDGET_SHARE * kv_budget_bytes:
            return [
                LoadRequest(
                    request_id=r.request_id, prompt_token_ids=r.prompt_token_ids, max_tokens=r.max_tokens,
                    cache_salt=r.cache_salt,
                )
                for r in picked
            ]  # fmt: skip
        count -= 1
    return []
