"""What the engine tells about itself: counters, memory, the settings its parts really have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtune.cache import CacheStats, GroupUsage, KVCacheManager
from kvtune.config import CacheConfig, SchedulerConfig
from kvtune.engine.arenas import ArenaPlan
from kvtune.engine.identity import READ_CONTRACT, kv_bytes_per_token
from kvtune.engine.load import LoadedModel
from kvtune.engine.plane_mover import PlaneTraffic
from kvtune.kernels import Backend, LayerCache
from kvtune.sched import Scheduler, SchedulerStats
from kvtune.spec import KVGroup

__all__ = ["EngineStats", "MemoryReport", "cache_settings", "engine_stats", "memory_report", "run_settings"]

Arenas = Mapping[int, LayerCache]
"""Model layer index -> that layer's arenas."""


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
    planes: PlaneTraffic

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
            "blocks_lowered": sum(usage.body.lowered + usage.body.lowered_idle for usage in self.blocks),
            "dropped_planes": self.cache.dropped_planes,
            "restored_planes": self.cache.restored_planes,
            "lost_planes": self.cache.lost_planes,
            "lowered_tokens": self.cache.lowered_tokens,
            "lowered_reads": self.cache.lowered_reads,
            "plane_bytes_dropped": self.planes.bytes_dropped,
            "plane_bytes_restored": self.planes.bytes_restored,
            "plane_arena_used_bytes": self.planes.resting_bytes,
        }
        flat |= {f"moved_planes_{cause}": count for cause, count in self.cache.moved_planes.items()}
        flat |= {f"missed_tokens_{cause}": count for cause, count in self.cache.misses.items()}
        flat |= {f"resident_bytes_{name}": size for name, size in self.resident_bytes.items()}
        return flat


def engine_stats(
    manager: KVCacheManager, scheduler: Scheduler, plan: ArenaPlan, arenas: Arenas, planes: PlaneTraffic
) -> EngineStats:
    usage = manager.usage()
    return EngineStats(
        blocks=usage,
        cache=manager.stats(),
        scheduler=scheduler.stats(),
        resident_bytes=_resident_bytes_by_codec(plan, arenas, usage),
        planes=planes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """KV bytes, counted two ways that must agree.

    `allocated_bytes`: storage of the arenas' tensors; `predicted_allocated_bytes`: spec's block bytes
    times the pools' sizes. `referenced_bytes`: rows of the arenas that the block tables of live requests
    name, each once; `predicted_referenced_bytes`: spec's block bytes times referenced blocks.
    `idle_bytes`: cached blocks nobody uses now. resident = referenced + idle.
    `budget_bytes`: the KV budget in force, which resident bytes keep. Where low planes trade for blocks the
    arenas are address space (`reserved_bytes`), backed as it is written: then `allocated_bytes` is the part
    the budget lets them fill. `arena_used_bytes` of `arena_bytes`: low planes at rest in host memory.
    """

    allocated_bytes: int
    predicted_allocated_bytes: int
    referenced_bytes: int
    predicted_referenced_bytes: int
    idle_bytes: int
    budget_bytes: int
    reserved_bytes: int
    arena_used_bytes: int = 0
    arena_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        return self.referenced_bytes + self.idle_bytes


def memory_report(
    manager: KVCacheManager,
    plan: ArenaPlan,
    arenas: Arenas,
    *,
    planes: PlaneTraffic | None = None,
    budget_bytes: int | None = None,
) -> MemoryReport:
    """`planes`: what rests on the host, nothing if None; `budget_bytes`: allowed now, all that was planned
    if None."""
    usage = manager.usage()
    referenced, predicted, idle = 0, 0, 0
    for group, blocks in zip(plan.groups, _live_blocks(manager, len(plan.groups)), strict=True):
        used, plane = usage[group.index], plan.plane_bytes[group.index]
        body, first = plan.block_bytes[group.index], plan.first_block_bytes[group.index]
        referenced += _stored_bytes(group, arenas, blocks)
        predicted += used.body.referenced * body + used.first.referenced * first - used.body.lowered * plane
        idle += used.body.idle * body + used.first.idle * first - used.body.lowered_idle * plane
    reserved = sum(
        storage.untyped_storage().nbytes()
        for cache in arenas.values()
        for storage in (
            *(arena for arena, _, _ in cache.parts()),
            *(low.arena for low in cache.low_planes.values()),
        )
    )
    return MemoryReport(
        allocated_bytes=plan.total_bytes if manager.precision.can_lower else reserved,
        predicted_allocated_bytes=plan.total_bytes,
        referenced_bytes=referenced,
        predicted_referenced_bytes=predicted,
        idle_bytes=idle,
        budget_bytes=plan.total_bytes if budget_bytes is None else budget_bytes,
        reserved_bytes=reserved,
        arena_used_bytes=planes.resting_bytes if planes else 0,
        arena_bytes=planes.arena_bytes if planes else 0,
    )


def _live_blocks(manager: KVCacheManager, num_groups: int) -> list[set[int]]:
    """Per group, the ids of blocks that some live request's block table names."""
    live: list[set[int]] = [set() for _ in range(num_groups)]
    for request_id in manager.request_ids():
        for blocks, table in zip(live, manager.block_tables(request_id), strict=True):
            blocks.update(table[table >= 0].tolist())
    return live


def _stored_bytes(group: KVGroup, arenas: Arenas, block_ids: set[int]) -> int:
    """Bytes the rows of these blocks take in the arenas' real storage, over the group's layers."""
    total = 0
    for layer in group.layers:
        for arena, _, base in arenas[layer].parts():
            inside = [block - base for block in block_ids if base <= block < base + len(arena)]
            total += sum(arena[row].nbytes for row in inside)
            for low in arenas[layer].low_planes.values() if base == 0 else ():
                total += int(low.is_resident(inside).sum()) * low.plane_bytes
    return total


def _resident_bytes_by_codec(plan: ArenaPlan, arenas: Arenas, usage: Sequence[GroupUsage]) -> dict[str, int]:
    """Bytes of referenced and idle blocks: "k:<codec>", "v:<codec>" with their scales, and "padding"."""
    total: Counter[str] = Counter()
    for group, used in zip(plan.groups, usage, strict=True):
        counts = (used.body.total - used.body.free, used.first.total - used.first.free)
        for layer in group.layers:
            for (_, layout, _), count in zip(arenas[layer].parts(), counts, strict=False):
                k, v = layout.side_bytes
                total[f"k:{layout.k_codec}"] += count * k
                total[f"v:{layout.v_codec}"] += count * v
                total["padding"] += count * (layout.block_bytes - k - v)
    return dict(total)


def cache_settings(plan: ArenaPlan, arenas: Arenas, manager: KVCacheManager) -> dict[str, Any]:
    """Settings as arenas and manager have them; where layers differ, a codec is "mixed" and `layer_codecs`
    tells each layer's."""
    layouts = [cache.layout for cache in arenas.values()]
    by_layer = {str(layer): [c.layout.k_codec, c.layout.v_codec] for layer, c in sorted(arenas.items())}
    is_mixed = len({tuple(pair) for pair in by_layer.values()}) > 1
    return {
        **({"layer_codecs": by_layer} if is_mixed else {}),
        "k_codec": _one_or_mixed({layout.k_codec for layout in layouts}),
        "v_codec": _one_or_mixed({layout.v_codec for layout in layouts}),
        "num_blocks": sum(usage.total for usage in manager.usage()),
        "kv_capacity_tokens": plan.capacity_tokens,
        "block_size": manager.block_size,
        "enable_prefix_caching": manager.enable_prefix_caching,
    }


def run_settings(
    loaded: LoadedModel, cache: CacheConfig, scheduler: SchedulerConfig, backend: Backend, *, context: int
) -> dict[str, Any]:
    """How the model runs, and what a sequence of `context` tokens costs [bytes per token]."""
    return {
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "kv_bytes_per_token": kv_bytes_per_token(loaded.spec, cache, scheduler, context=context),
        "reference_context": context,
        "read_contract": READ_CONTRACT,
        "kernel": backend.name,
        "kernel_reason": backend.reason,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


def _one_or_mixed(names: set[str]) -> str:
    return next(iter(names)) if len(names) == 1 else "mixed"
