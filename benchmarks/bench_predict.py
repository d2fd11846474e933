"""What prediction is worth on public traces, beside its constant baseline and its oracle, losses included.

    python benchmarks/bench_predict.py [--traces DIR] [--part lengths,arrivals,returns,admission] [--json OUT]

lengths: p90 pinball loss, CRPS and coverage over the second half of each trace, everything learned online.
arrivals: mean absolute error of the next window's count. returns: Brier score of "this conversation is
continued within the horizon". admission: a saturated engine (the scheduler and manager of the product, a
clock that charges one unit per step and one per 400 prefill tokens) under watermarks, the learned peak and
known lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.predict import (
    ArrivalPredictor,
    LengthDistribution,
    LengthKey,
    LengthPredictor,
    PrefixSessions,
    ReturnPredictor,
)
from kvtune.sched import Scheduler
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import Request, RequestId, RunnerOutput, Sampled, SamplingParams
from kvtune.workload import Workload, load_workload

TRACES = {
    "conversation": ("mooncake_conversation.jsonl.gz", {}),
    "azure conversation": ("azure2023_conv.csv.gz", {}),
    "ragpulse": ("ragpulse_days0-2.jsonl.gz", {}),
    "agent fleet": ("claude_code_fleet_a.jsonl.gz", {"trace_block_size": 512}),
    "agent sessions": ("claude_code_sessions_a.jsonl.gz", {}),
    "servegen mm-image": ("servegen_mm-image_rates.csv.gz", {"limit": 20_000}),
    "servegen m-mid": ("servegen_m-mid_rates.csv.gz", {"limit": 20_000}),
}
SHARE = 0.9
PREFILL_TOKENS_PER_STEP = 400
EOS = 2
GROUP = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8)


def table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{title}")
    names = list(rows[0])
    shown = [[_text(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(cells[i]) for cells in shown)) for i, name in enumerate(names)]
    for cells in (names, *shown):
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip(), flush=True)


def _text(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


# --- output lengths


def keyed(workload: Workload) -> Iterator[tuple[LengthKey, int]]:
    """(what is known when a request comes, its output length), in order; a session that has no name is known
    by its prefix."""
    sessions, size = PrefixSessions(), workload.block_size or 0
    for request in workload.requests:
        if request.output_length is None:
            continue
        ids = request.hash_ids or ()
        seen = sessions.look(ids)
        sessions.add(ids)
        known = sum((request.hash_lengths or ())[: seen.num_known]) or seen.num_known * size
        prompt = request.input_length or 0
        key = LengthKey(
            client=request.tags.get("client", ""),
            session=request.session_id or (seen.session if seen.session is not None else ""),
            prompt_tokens=prompt,
            new_tokens=max(1, prompt - known) if ids else 0,
        )
        yield key, request.output_length


@dataclass
class Score:
    """Sums over judged requests."""

    pinball: float = 0.0
    crps: float = 0.0
    covered: int = 0
    n: int = 0

    def take(self, shown: LengthDistribution, length: int) -> None:
        at = shown.quantile(SHARE)
        self.pinball += max(SHARE * (length - at), (1 - SHARE) * (at - length))
        self.crps += shown.crps(length)
        self.covered += length <= at
        self.n += 1


def lengths(name: str, workload: Workload) -> dict[str, Any]:
    predictor, constant, ours = LengthPredictor(), Score(), Score()
    pairs = list(keyed(workload))
    begin = time.perf_counter()
    for index, (key, length) in enumerate(pairs):
        if index >= len(pairs) // 2:
            constant.take(predictor.predict_constant(), length)
            ours.take(predictor.predict(key), length)
        predictor.observe(key, length)
    trust = predictor.trust()
    return {
        "trace": name,
        "requests": len(pairs),
        "constant pinball": constant.pinball / constant.n,
        "ours": ours.pinball / ours.n,
        "oracle": 0.0,
        "saved": 1 - ours.pinball / constant.pinball,
        "crps saved": 1 - ours.crps / constant.crps,
        "coverage": ours.covered / ours.n,
        "gate": "on" if predictor.gate.is_on else "off",
        "trusts": max(trust, key=lambda view: trust[view]),
        "us each": 1e6 * (time.perf_counter() - begin) / len(pairs),
    }


# --- arrivals


def arrivals(name: str, workload: Workload, window_s: float) -> dict[str, Any] | None:
    times = np.array([request.arrival_s for request in workload.requests])
    if times[-1] - times[0] < 40 * window_s:
        return None
    counts = np.bincount(((times - times[0]) / window_s).astype(int)).astype(float)
    predictor, ours, last, mean, inside, judged = ArrivalPredictor(), 0.0, 0.0, 0.0, 0, 0
    for index, count in enumerate(counts):
        if index >= len(counts) // 2:
            shown = predictor.predict()
            ours += abs(shown.count - count)
            last += abs(counts[index - 1] - count)
            mean += abs(counts[:index].mean() - count)
            inside += shown.low is not None and shown.low <= count <= (shown.high or 0.0)
            judged += 1
        predictor.observe(float(count))
    level = float(counts[len(counts) // 2 :].mean())
    return {
        "trace": name,
        "window": f"{window_s:g} s",
        "windows": len(counts),
        "constant mean": mean / judged / level,
        "last value": last / judged / level,
        "ours": ours / judged / level,
        "oracle": 0.0,
        "of last": ours / last if last else 1.0,
        "in 80 %": inside / judged,
        "gate": "on" if predictor.gate.is_on else "off",
    }


# --- returns


def returns(name: str, workload: Workload, horizon_s: float) -> dict[str, Any]:
    predictor, sessions = ReturnPredictor(horizon_s=horizon_s), PrefixSessions()
    num_used = 0
    for request in workload.requests:
        seen = sessions.look(request.hash_ids or ())
        sessions.add(request.hash_ids or ())
        session = request.session_id or seen.session
        if session is not None:
            predictor.use(session, request.arrival_s)
            num_used += 1
    share = predictor.baseline()
    constant = share * (1 - share)
    return {
        "trace": name,
        "horizon": f"{horizon_s:g} s",
        "uses": num_used,
        "return": share,
        "constant brier": constant,
        "ours": constant - predictor.gate.mean_gain,
        "oracle": 0.0,
        "saved": predictor.gate.mean_gain / constant,
        "gate": "on" if predictor.gate.is_on else "off",
    }


# --- admission


@dataclass(frozen=True)
class Load:
    """(prompt, output) tokens of requests that all wait from the start, and the cache they share."""

    name: str
    requests: list[tuple[int, int]]
    num_blocks: int
    block_size: int = 16
    max_tokens: int = 2048


@dataclass(frozen=True)
class Arm:
    """One way to admit; `knows`: the client fixes every length beforehand."""

    name: str
    watermark: float
    z: float | None = None
    knows: bool = False
    is_constant: bool = False


class ConstantLengths(LengthPredictor):
    """Only the histogram of everything, whatever the gate says."""

    def predict(self, key: LengthKey, *, max_tokens: int | None = None) -> LengthDistribution:
        return self.predict_constant(max_tokens=max_tokens)


ARMS = (
    Arm("no watermark", 0.0),
    Arm("watermark 5 % (shipped)", 0.05),
    Arm("watermark 10 %", 0.10),
    Arm("peak of a constant, z 1, 5 %", 0.05, 1.0, is_constant=True),
    Arm("peak, z 1, 5 %", 0.05, 1.0),
    Arm("peak, z 1", 0.0, 1.0),
    Arm("peak, z 2", 0.0, 2.0),
    Arm("peak of known lengths", 0.0, 0.0, knows=True),
)


def loads(folder: Path, limit: int) -> list[Load]:
    """Azure's as recorded; the conversation trace's outputs behind short prompts, as they are, with a shift
    half way, and six times as long (a model that thinks aloud)."""
    azure = load_workload(folder / "azure2023_conv.csv.gz").requests[:limit]
    talk = load_workload(folder / "mooncake_conversation.jsonl.gz").requests[:limit]
    outputs = np.array([request.output_length or 1 for request in talk])
    prompts = np.random.default_rng(0).integers(50, 401, len(outputs))
    shifted = np.where(np.arange(len(outputs)) < len(outputs) // 2, outputs, (2.5 * outputs).astype(int))
    pairs = [list(zip(prompts.tolist(), n.tolist(), strict=True)) for n in (outputs, shifted, 6 * outputs)]
    few = max(1, limit // 3)
    return [
        Load("azure", [(r.input_length or 1, r.output_length or 1) for r in azure], 2000),
        Load("conversation outputs", pairs[0], 1250),
        Load("outputs x2.5 half way", pairs[1], 1250, max_tokens=8192),
        Load("outputs x6", pairs[2][:few], 2500, max_tokens=16384),
    ]


def admission(load: Load, arm: Arm) -> dict[str, Any]:
    now = 0.0
    manager = KVCacheManager([GROUP], [load.num_blocks], block_size=load.block_size)
    config = SchedulerConfig(
        max_num_seqs=4096,
        max_num_batched_tokens=4096,
        max_prefill_chunk=4096,
        max_prefill_beside_decodes=4096,
        watermark=arm.watermark,
        reserved=0.0,
        admission="watermark" if arm.z is None else "peak",
        admission_z=arm.z or 0.0,
    )
    scheduler = Scheduler(
        manager,
        config,
        max_model_len=1 << 20,
        eos_token_ids=frozenset([EOS]),
        clock=lambda: now,
        lengths=ConstantLengths() if arm.is_constant else None,
    )
    left = {RequestId(str(index)): output for index, (_, output) in enumerate(load.requests)}
    for index, (prompt, output) in enumerate(load.requests):
        tokens = np.arange(prompt, dtype=np.int32)
        tokens[0] = -1 - index  # nobody shares a prefix
        sampling = SamplingParams(
            max_tokens=output if arm.knows else max(output, load.max_tokens), ignore_eos=arm.knows
        )
        scheduler.add(Request(request_id=RequestId(str(index)), prompt_token_ids=tokens, sampling=sampling))
    in_use, deepest = 0.0, 0
    while scheduler.has_unfinished:
        output = scheduler.schedule()
        prefill = sum(len(c.token_ids) for c in output.chunks if len(c.token_ids) > 1)
        seconds = 1.0 + prefill / PREFILL_TOKENS_PER_STEP
        now += seconds
        usage = manager.usage()[0]
        in_use += seconds * usage.referenced / usage.total
        deepest = max(deepest, len(output.preempted))
        sampled: list[Sampled] = []
        for chunk in output.chunks:
            if chunk.samples:
                left[chunk.request_id] -= 1
                token = 5 if left[chunk.request_id] else EOS
                sampled.append(Sampled(request_id=chunk.request_id, token_id=token))
        scheduler.update(output, RunnerOutput(sampled=tuple(sampled)))
    stats, n = scheduler.stats(), len(load.requests)
    return {
        "load": load.name,
        "admission": arm.name,
        "time": round(now),
        "preempted per 100": 100 * stats.preemptions / n,
        "recomputed tokens": stats.recomputed_tokens,
        "KV in use": in_use / now,
    }


def admission_rows(load: Load) -> list[dict[str, Any]]:
    rows = [admission(load, arm) for arm in ARMS]
    shipped = rows[1]["time"]
    return [{**row, "vs shipped": row["time"] / shipped - 1} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, default=os.environ.get("KVTUNE_TRACES"))
    parser.add_argument("--part", default="lengths,arrivals,returns,admission")
    parser.add_argument("--limit", type=int, default=3000, help="requests of each admission load")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.traces:
        print("give --traces DIR or set KVTUNE_TRACES", file=sys.stderr)
        return 2
    parts, result = args.part.split(","), {}
    folder = Path(args.traces)
    workloads = {
        name: load_workload(folder / file, **options)
        for name, (file, options) in TRACES.items()
        if parts != ["admission"] and (folder / file).exists()
    }
    if "lengths" in parts:
        result["lengths"] = [lengths(name, workload) for name, workload in workloads.items()]
        table("Output lengths, p90 pinball loss in tokens (oracle: 0)", result["lengths"])
    if "arrivals" in parts:
        found = [
            arrivals(n, w, s)
            for n, w in workloads.items()
            if n != "agent sessions"
            for s in (10.0, 60.0, 3600.0)
        ]
        result["arrivals"] = [row for row in found if row is not None]
        table("Arrivals in the next window, mean absolute error / mean", result["arrivals"])
    if "returns" in parts:
        reusing = {n: w for n, w in workloads.items() if n in ("conversation", "ragpulse", "agent fleet")}
        result["returns"] = [returns(n, w, s) for n, w in reusing.items() for s in (60.0, 600.0)]
        table("Will this conversation be continued within the horizon? Brier score", result["returns"])
    if "admission" in parts:
        result["admission"] = []
        for load in loads(folder, args.limit):
            rows = admission_rows(load)
            result["admission"] += rows
            table(f"Admission, {len(load.requests):,} requests at once; time in decode steps", rows)
    if args.json:
        args.json.write_text(json.dumps({"limit": args.limit, **result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
