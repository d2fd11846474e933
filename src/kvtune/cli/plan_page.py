"""What `kvtune plan --html` adds to the plan of a trace: the study of its prefixes, and its statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtune.plan import Sizing
    from kvtune.workload import Workload

__all__ = ["trace_pictures"]

_POLICIES = ("lfu", "fifo")


def trace_pictures(workload: Workload, sizing: Sizing, budget: int | None) -> dict[str, Any]:
    """`cache`: what `simulate --mode cache` says of this trace, the budget's size among the sizes, None where
    only lengths are known; `statistics`: what `kvtune trace` says."""
    from kvtune.workload import workload_statistics

    return {"cache": _cache(workload, sizing, budget), "statistics": workload_statistics(workload)}


def _cache(workload: Workload, sizing: Sizing, budget: int | None) -> dict[str, Any] | None:
    from kvtune.cache.replay import DEFAULT_POLICY, Replayer
    from kvtune.cache.replay_report import study_record
    from kvtune.cache.replay_study import default_capacities, study
    from kvtune.cli.progress import TimeLeft
    from kvtune.errors import UsageError
    from kvtune.workload import block_trace

    try:
        blocks = block_trace(workload)
    except UsageError:  # lengths only: nothing tells what is shared
        return None
    block_bytes = sizing.model.prefix_bytes(blocks.block_size) or None
    sizes = set(default_capacities(blocks.num_unique))
    if budget is not None and block_bytes is not None and budget >= block_bytes:
        sizes.add(budget // block_bytes)
    replayer = Replayer(blocks)
    policies = tuple(dict.fromkeys((DEFAULT_POLICY, *_POLICIES)))
    with TimeLeft() as progress:
        found = study(replayer, policies, sorted(sizes), progress=progress)
    return study_record(replayer, found, block_bytes)
