"""What a simulated run tells: the keys of `kvtune bench`, and what only a simulator can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtune.latency import BenchRecord, latency_statistics, summarise
from kvtune.sim.cost_model import CostModel
from kvtune.sim.simulator import STEP_COLUMNS, SimulationRun

__all__ = ["ServeTargets", "run_report"]

Floats = npt.NDArray[np.float64]
MAX_BINS: Final = 240


@dataclass(frozen=True, slots=True)
class ServeTargets:
    """Latency targets of one request in seconds; None is no target."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def is_met(self, record: BenchRecord) -> bool:
        """A failed request meets none; one token has no TPOT to miss."""
        if record.error is not None:
            return False
        pairs = ((self.ttft_s, record.ttft_s), (self.tpot_s, record.tpot_s), (self.e2e_s, record.e2e_s))
        return all(target is None or seen is None or seen <= target for target, seen in pairs)

    @property
    def is_any(self) -> bool:
        return any(target is not None for target in (self.ttft_s, self.tpot_s, self.e2e_s))


def run_report(
    run: SimulationRun, cost: CostModel, *, targets: ServeTargets | None = None, details: bool = False
) -> dict[str, Any]:
    """One plain JSON object: bench's keys, then hits, preemptions, utilisation, SLO, timeline, overload.

    `details` adds every request's figures, as `kvtune bench --save` does.
    """
    duration_s = max(run.duration_s, 1e-9)
    steps = {name: run.steps[:, i] for i, name in enumerate(STEP_COLUMNS)}
    cache, scheduler = run.cache, run.scheduler
    return {
        **summarise(run.records, duration_s, details=details),
        "hits_by_tier": {"device": cache.hit_tokens},
        "token_hit_rate": cache.hit_tokens / cache.queried_tokens if cache.queried_tokens else 0.0,
        "missed_tokens": {str(cause): count for cause, count in cache.misses.items()},
        "evicted_blocks": cache.evicted_blocks,
        "preemptions": scheduler.preemptions,
        "preempted_requests": run.preempted_requests,
        "recomputed_tokens": scheduler.recomputed_tokens,
        "steps": scheduler.steps,
        **latency_statistics("queue", run.queue_s),
        "utilisation": _utilisation(run, steps, duration_s),
        "slo": _slo(run.records, targets, duration_s),
        "overload": _overload(run, steps),
        "timeline": _timeline(run, steps, duration_s),
        "cost_model": cost.to_dict(),
    }


def _utilisation(run: SimulationRun, steps: dict[str, Floats], duration_s: float) -> dict[str, float]:
    """Shares in [0, 1]; means over steps are weighted by how long each took."""
    seconds = steps["seconds"]
    total = max(float(seconds.sum()), 1e-12)

    def mean(values: Floats) -> float:
        return float((values * seconds).sum() / total)

    referenced, resident = steps["referenced"], steps["referenced"] + steps["idle"]
    return {
        "busy": min(1.0, run.busy_s / duration_s),
        "kv_referenced_mean": mean(referenced) / run.num_blocks,
        "kv_referenced_peak": float(referenced.max(initial=0.0)) / run.num_blocks,
        "kv_resident_mean": mean(resident) / run.num_blocks,
        "running_mean": mean(steps["running"]),
        "running_peak": float(steps["running"].max(initial=0.0)),
        "tokens_per_step_mean": float(steps["tokens"].mean()) if len(seconds) else 0.0,
        "prefill_token_share": _share(steps["tokens"] - steps["decodes"], steps["tokens"]),
    }


def _share(part: Floats, whole: Floats) -> float:
    return float(part.sum() / max(1.0, float(whole.sum())))


def _slo(
    records: Sequence[BenchRecord], targets: ServeTargets | None, duration_s: float
) -> dict[str, Any] | None:
    """Goodput: requests a second that met every target (DistServe's metric); None without targets."""
    if targets is None or not targets.is_any:
        return None
    met = sum(targets.is_met(record) for record in records)
    return {
        "ttft_s": targets.ttft_s,
        "tpot_s": targets.tpot_s,
        "e2e_s": targets.e2e_s,
        "attainment": met / len(records) if records else 0.0,
        "request_goodput": met / duration_s,
    }


def _overload(run: SimulationRun, steps: dict[str, Floats]) -> dict[str, Any]:
    """The longest time requests were queueing, how it hit those that arrived in it, and whether it ended
    before the arrivals did: `is_sustained` says that the server could not keep up."""
    done = [record for record in run.records if record.error is None]
    arrivals = np.array([record.start_s for record in done])
    ttft = np.array([record.ttft_s or 0.0 for record in done])
    is_queueing = steps["waiting"] > 0
    ends = steps["start_s"] + steps["seconds"]
    begin_s, end_s = _longest(is_queueing, steps["start_s"], ends)
    inside = (arrivals >= begin_s) & (arrivals < end_s)
    last_s = float(arrivals.max(initial=0.0))
    peak = int(np.argmax(steps["waiting"])) if len(is_queueing) else 0
    return {
        "waiting_peak": float(steps["waiting"].max(initial=0.0)),
        "waiting_peak_at_s": float(steps["start_s"][peak]) if len(is_queueing) else None,
        "queueing_share_of_time": float(steps["seconds"][is_queueing].sum() / max(run.duration_s, 1e-9)),
        "longest_queueing_s": end_s - begin_s,
        "longest_queueing_begin_s": begin_s if end_s > begin_s else None,
        "requests_in_longest_queueing": int(inside.sum()),
        "p95_ttft_ms_inside": _p95_ms(ttft[inside]),
        "p95_ttft_ms_outside": _p95_ms(ttft[~inside]),
        "drain_s": max(0.0, run.duration_s - last_s),
        "is_sustained": bool(end_s > last_s and end_s - begin_s > 0.5 * max(last_s, 1e-9)),
    }


def _longest(is_on: npt.NDArray[np.bool_], begin: Floats, end: Floats) -> tuple[float, float]:
    """(begin, end) of the longest run of steps that are on; (0, 0) where none is."""
    if not is_on.any():
        return 0.0, 0.0
    edges = np.flatnonzero(np.diff(np.concatenate(([0], is_on.astype(np.int8), [0]))))
    firsts, lasts = edges[::2], edges[1::2] - 1
    longest = int(np.argmax(end[lasts] - begin[firsts]))
    return float(begin[firsts[longest]]), float(end[lasts[longest]])


def _p95_ms(seconds: Floats) -> float | None:
    return float(np.quantile(seconds, 0.95)) * 1e3 if len(seconds) else None


def _timeline(run: SimulationRun, steps: dict[str, Floats], duration_s: float) -> dict[str, Any]:
    """Columns over at most MAX_BINS equal bins of time; a bin in which nothing ran holds None or 0."""
    num_bins = max(1, min(MAX_BINS, len(run.steps)))
    width = duration_s / num_bins
    at = np.minimum((steps["start_s"] / width).astype(np.int64), num_bins - 1)
    seconds = np.bincount(at, steps["seconds"], num_bins)

    def total(values: Floats) -> Floats:
        return np.bincount(at, values, num_bins).astype(np.float64)

    def mean(values: Floats) -> list[float | None]:
        sums = np.bincount(at, values * steps["seconds"], num_bins)
        return [float(s / t) if t > 0 else None for s, t in zip(sums, seconds, strict=True)]

    done = [record for record in run.records if record.error is None]
    arrivals = np.array([record.start_s for record in done])
    ends = arrivals + np.array([record.e2e_s or 0.0 for record in done])
    arrived_in = np.minimum((arrivals / width).astype(np.int64), num_bins - 1)
    prompts = total(steps["prompt_tokens"])
    return {
        "bin_s": width,
        "start_s": (np.arange(num_bins) * width).tolist(),
        "arrivals": np.bincount(arrived_in, minlength=num_bins).tolist(),
        "completed": np.bincount(
            np.minimum((ends / width).astype(np.int64), num_bins - 1), minlength=num_bins
        ).tolist(),
        "busy": np.minimum(1.0, seconds / width).tolist(),
        "running": mean(steps["running"]),
        "waiting": mean(steps["waiting"]),
        "kv_referenced": mean(steps["referenced"] / run.num_blocks),
        "kv_idle": mean(steps["idle"] / run.num_blocks),
        "decode_tokens_per_s": (total(steps["decodes"]) / width).tolist(),
        "prefill_tokens_per_s": (total(steps["tokens"] - steps["decodes"]) / width).tolist(),
        "token_hit_rate": [
            float(hit / asked) if asked else None
            for hit, asked in zip(total(steps["cached_tokens"]), prompts, strict=True)
        ],
        "preemptions": total(steps["preempted"]).tolist(),
        "p95_ttft_ms": _by_arrival(done, arrived_in, num_bins),
    }


def _by_arrival(
    records: Sequence[BenchRecord], at: npt.NDArray[np.int64], num_bins: int
) -> list[float | None]:
    """p95 of TTFT [ms] of the requests that arrived in each bin."""
    groups: list[list[float]] = [[] for _ in range(num_bins)]
    for record, index in zip(records, at.tolist(), strict=True):
        groups[index].append(record.ttft_s or 0.0)
    return [_p95_ms(np.array(group)) for group in groups]
