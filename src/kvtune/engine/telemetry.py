"""What the engine tells about itself: counters, memory. Read-only records, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvtune.cache import CacheStats, GroupUsage
from kvtune.sched import SchedulerStats

__all__ = ["EngineStats", "MemoryReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since construction and gauges of now.

    `blocks`: one entry per KV group (free, idle, referenced); `resident_bytes`: bytes of referenced and
    idle blocks by codec, K and V apart, under "k:<codec>" and "v:<codec>", and "padding".
    """

    blocks: tuple[GroupUsage, ...]
    cache: CacheStats
    scheduler: SchedulerStats
    resident_bytes: Mapping[str, int]

    def counters(self) -> dict[str, float]:
        """Flat name -> number, for load reports and logs."""
        flat: dict[str, float] = {
            "steps": self.scheduler.steps,
            "tokens_computed": self.scheduler.scheduled_tokens,
            "requests_running": self.scheduler.num_running,
            "requests_waiting": self.scheduler.num_waiting,
            "blocks_total": sum(usage.total for usage in self.blocks),
            "blocks_free": sum(usage.free for usage in self.blocks),
            "blocks_idle": sum(usage.idle for usage in self.blocks),
            "blocks_referenced": sum(usage.referenced for usage in self.blocks),
            "queried_tokens": self.cache.queried_tokens,
            "hit_tokens": self.cache.hit_tokens,
            "published_blocks": self.cache.published_blocks,
            "evicted_blocks": self.cache.evicted_blocks,
            "copied_blocks": self.cache.copied_blocks,
            "preemptions": self.scheduler.preemptions,
            "recomputed_tokens": self.scheduler.recomputed_tokens,
        }
        flat |= {f"missed_tokens_{cause}": count for cause, count in self.cache.misses.items()}
        flat |= {f"resident_bytes_{name}": size for name, size in self.resident_bytes.items()}
        return flat


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """KV bytes, counted two ways that must agree.

    `allocated_bytes`: storage of the arenas' tensors; `predicted_allocated_bytes`: spec's block bytes
    times the pools' sizes. `referenced_bytes`: rows of the arenas that the block tables of live requests
    name, each once; `predicted_referenced_bytes`: spec's block bytes times referenced blocks.
    `idle_bytes`: cached blocks nobody uses now. resident = referenced + idle.
    """

    allocated_bytes: int
    predicted_allocated_bytes: int
    referenced_bytes: int
    predicted_referenced_bytes: int
    idle_bytes: int

    @property
    def resident_bytes(self) -> int:
        return self.referenced_bytes + self.idle_bytes
