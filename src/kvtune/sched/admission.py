"""Who may start: input that can never be served is refused, and how much room must stay behind."""

from __future__ import annotations

from collections.abc import Mapping

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.errors import UsageError
from kvtune.sched.sequence import Sequence
from kvtune.spec import PoolBudget
from kvtune.types import MissCause, Request

__all__ = [
    "admission_reserve",
    "growth_reserve",
    "recompute_misses",
    "refuse_unfinishable",
    "refuse_unservable",
]

_PREFIX_FIRST = (
    MissCause.NEVER_SEEN,
    MissCause.EVICTED,
    MissCause.LOWERED,
    MissCause.WINDOW,
    MissCause.LAST_TOKEN,
    MissCause.DISABLED,
    MissCause.PARTIAL_BLOCK,
)


def refuse_unservable(request: Request, num_tokens: int, manager: KVCacheManager, max_model_len: int) -> None:
    """UsageError when even an empty cache could not serve the request to its end."""
    name = f"request {request.request_id!r}"
    if not num_tokens:
        raise UsageError(f"{name} has an empty prompt; give at least one token")
    if request.sampling.max_tokens < 1:
        raise UsageError(f"{name} asks for {request.sampling.max_tokens} tokens; max_tokens must be >= 1")
    if num_tokens >= max_model_len:
        raise UsageError(
            f"{name} has {num_tokens} prompt tokens, the model takes {max_model_len} with at least one "
            "to generate; shorten the prompt"
        )
    # The token sampled last is never computed, so it needs no slot.
    longest = min(num_tokens + request.sampling.max_tokens, max_model_len) - 1
    if not manager.fits(longest):
        raise UsageError(
            f"{name} may grow to {longest} tokens, more than the whole KV cache holds; "
            "lower max_tokens or raise kv_budget"
        )


def refuse_unfinishable(
    sequence: Sequence, manager: KVCacheManager, budgets: tuple[PoolBudget, ...], max_model_len: int
) -> None:
    """UsageError when a live request could not be served to its end under other budgets."""
    longest = min(sequence.num_prompt_tokens + sequence.sampling.max_tokens, max_model_len) - 1
    if not manager.fits(longest, budgets):
        raise UsageError(
            f"request {sequence.request_id!r} may grow to {longest} tokens, more than that KV budget holds; "
            "abort it, wait for its end, or give more"
        )


def growth_reserve(config: SchedulerConfig, priority: int) -> float:
    """Share of blocks a running request must leave: the headroom is for priority > 0 alone."""
    return 0.0 if priority > 0 else config.reserved


def admission_reserve(config: SchedulerConfig, priority: int) -> float:
    """Share of blocks that must stay available after an admission: watermark plus headroom."""
    return config.watermark + growth_reserve(config, priority)


def recompute_misses(
    sequence: Sequence, misses: Mapping[MissCause, int], num_cached: int
) -> Mapping[MissCause, int]:
    """Causes after a preemption: what had been computed and is not cached any more is PREEMPTED."""
    lost = max(0, sequence.most_computed_tokens - num_cached)
    if not sequence.num_preemptions or not lost:
        return misses
    causes = dict(misses)
    rest = lost
    for cause in _PREFIX_FIRST:  # the lost tokens are the leading missed ones
        taken = min(rest, causes.get(cause, 0))
        rest -= taken
        if taken:
            causes[cause] -= taken
    return {c: n for c, n in causes.items() if n} | {MissCause.PREEMPTED: lost}
