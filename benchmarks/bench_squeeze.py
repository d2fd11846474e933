"""Half of the KV budget goes away during a run: preempting against reversible precision.

    python benchmarks/bench_squeeze.py [--margin balanced] [--load 0.65] [--repetitions 5] [--json OUT]

Both arms serve the same generated chats from the bundled model with keys and values in `n8_rh`, at the same
arrivals; only one may drop low planes, and only of layers and sides whose 4-bit reading, all of it at once,
passed the gate's replay on other chats. The SLO is fixed before: twice the p95 TTFT and TPOT of requests
that run alone. `load` is the share of the full budget that requests under way hold on average, shared
prefixes once, as measured in a closed loop (arrivals that leave gaps hold less); the budget is halved after a
quarter of the requests have come and given back after three quarters. Goodput: requests within the SLO per
second of the whole run. Seconds are those of this process's CPU (one thread) unless `--clock wall`.

Bits are checked apart, in float32 with padded rows: blocks written before the squeeze, and answers of
requests admitted after it, against an engine that saw none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.adapters.prompt_encoder import prompt_encoder
from kvtune.config import format_bytes
from kvtune.engine import LoadedModel, load_model
from kvtune.engine.target import RunningEngine
from kvtune.errors import KVTuneError
from kvtune.quality import (
    QualityVerdict,
    Reference,
    ReplaySettings,
    Verdict,
    isolated_kl,
    judge,
    margin_named,
    record_reference,
    replay,
)
from kvtune.spec import KVFormat, growth_bytes_per_token
from kvtune.testing.reference import reference_model_path
from kvtune.types import RequestOutput
from kvtune.workload import TokenRequest, demo_chat, materialise

ARMS = ("preempting", "reversible")
WANTED = 1.3
Planes = dict[int, tuple[int, int]]
NESTED = {"k_codec": "n8_rh", "v_codec": "n8_rh"}


@dataclass(frozen=True)
class Slo:
    """Limits in seconds, and what they are twice of."""

    ttft_s: float
    tpot_s: float
    unloaded_ttft_p95_s: float
    unloaded_tpot_p95_s: float


@dataclass
class Run:
    """One arm's run. `held`: requests within the SLO; `squeezed`: those that came while half was gone."""

    goodput: float
    held: int
    finished: int
    num_requests: int
    squeezed_held: int
    squeezed: int
    duration_s: float
    ttft_p95_s: float
    tpot_p95_s: float
    preemptions: int
    recomputed_tokens: int
    lowered_requests: int
    dropped_planes: int
    restored_planes: int
    lost_planes: int
    bytes_moved: int
    peak_arena_bytes: int
    peak_over_budget_bytes: int


class Clock:
    """Seconds of this run: of the wall, or of this process's CPU, where sleeping only turns the hands. The
    latter is not disturbed by who else is on the machine; with one thread both agree on a quiet one."""

    def __init__(self, kind: str) -> None:
        self._read = time.process_time if kind == "cpu" else time.monotonic
        self._is_wall = kind == "wall"
        self._skipped = 0.0

    def now(self) -> float:
        return self._read() + self._skipped

    def sleep(self, seconds: float) -> None:
        if self._is_wall:
            time.sleep(seconds)
        else:
            self._skipped += seconds


# --- requests


def chats(loaded: LoadedModel, model: Path, count: int, *, seed: int, shortest: int, longest: int):
    """Chat requests of `shortest` to `longest` prompt tokens, in order of arrival."""
    workload = demo_chat(4 * count, seed=seed, max_chars=4 * longest)
    found = materialise(
        workload, vocab_size=loaded.vocab_size, max_model_len=loaded.max_model_len,
        encode=prompt_encoder(model), seed=seed,
    )  # fmt: skip
    fitting = [r for r in found.requests if shortest <= len(r.prompt_token_ids) <= longest]
    return fitting[:count]


# --- what may be read


def engine_of(loaded: LoadedModel, args: argparse.Namespace, **cache: Any) -> Engine:
    return Engine(
        loaded,
        cache=CacheConfig(**cache),
        scheduler=SchedulerConfig(max_num_batched_tokens=args.batched_tokens, watermark=args.watermark),
        config=EngineConfig(num_threads=args.threads),
        clock=args.time.now,
    )


def running(engine: Engine, args: argparse.Namespace) -> RunningEngine:
    return RunningEngine(engine, clock=args.time.now, sleep=args.time.sleep)


def prove(
    loaded: LoadedModel, args: argparse.Namespace, requests: Sequence[TokenRequest]
) -> tuple[Planes, QualityVerdict | None, list[dict[str, Any]]]:
    """The sides whose 4-bit reading passes together, the dearest in KL left out, and the last PASS."""
    rng = np.random.default_rng(args.seed)
    with running(engine_of(loaded, args, kv_budget="256MiB"), args) as baseline:
        reference = record_reference(baseline, requests, ReplaySettings(num_decode=0), num_decode=0)
    with running(engine_of(loaded, args, kv_budget="256MiB", **NESTED), args) as nested:
        before = replay(nested, reference)

        def reading(planes: Planes):
            with nested.reading(planes):
                return replay(nested, reference)

        sides = [(layer.index, side) for layer in loaded.spec.layers for side in "kv"]
        alone = {
            one: isolated_kl(reference, before, reading(planes_of([one])), rng=rng).value for one in sides
        }
        table = [{"layer": layer, "side": side, "isolated_kl": kl} for (layer, side), kl in alone.items()]
        chosen: list[tuple[int, str]] = []
        passed: QualityVerdict | None = None
        for one in sorted(sides, key=lambda side: alone[side]):
            verdict = judge_reading(reference, reading(planes_of([*chosen, one])), args)
            if verdict.verdict is Verdict.PASS:
                chosen.append(one)
                passed = verdict
    return planes_of(chosen), passed, table


def judge_reading(reference: Reference, scores: Any, args: argparse.Namespace) -> QualityVerdict:
    return judge(
        reference, scores, margin=margin_named(args.margin), is_lossy=True, rng=np.random.default_rng(0)
    )


def planes_of(sides: Sequence[tuple[int, str]]) -> Planes:
    return {
        layer: (1 if (layer, "k") in sides else 2, 1 if (layer, "v") in sides else 2)
        for layer in sorted({layer for layer, _ in sides})
    }


# --- one run


def sampling(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(max_tokens=args.output, temperature=0.0, ignore_eos=True)


def alone(engine: Engine, requests: Sequence[TokenRequest], args: argparse.Namespace) -> Slo:
    """Each request by itself, nothing cached."""
    ttft, tpot = [], []
    for request in requests:
        engine.reset_prefix_cache()
        metrics = engine.generate([list(request.prompt_token_ids)], sampling(args))[0].metrics
        ttft.append(metrics.ttft_s or 0.0)
        tpot.append(metrics.tpot_s or 0.0)
    a, b = float(np.quantile(ttft, 0.95)), float(np.quantile(tpot, 0.95))
    return Slo(2 * a, 2 * b, a, b)


def closed_loop(
    engine: Engine, requests: Sequence[TokenRequest], count: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Mean seconds a request takes while `count` of them run, and mean bytes they hold together, shared
    prefixes once: from these follow the arrival rate and the budget of a load."""
    engine.reset_prefix_cache()
    left = list(requests[: 4 * count])
    live, seconds, held = 0, list[float](), list[int]()
    while left or engine.has_unfinished:
        while left and live < count:
            request = left.pop()
            engine.add_request(request.request_id, list(request.prompt_token_ids), sampling(args))
            live += 1
        for output in engine.step(finished_only=True):
            live -= 1
            seconds.append(output.metrics.e2e_s or 0.0)
        if left and live == count:
            held.append(engine.memory().referenced_bytes)
    return statistics.mean(seconds), statistics.mean(held)


def arrivals(count: int, interval_s: float, seed: int) -> list[float]:
    """Evenly spaced, each moved by up to a quarter of the interval."""
    jitter = np.random.default_rng(seed).uniform(-0.25, 0.25, count)
    return [max(0.0, (i + j) * interval_s) for i, j in enumerate(jitter)]


def serve(
    engine: Engine,
    requests: Sequence[TokenRequest],
    at_s: Sequence[float],
    slo: Slo,
    args: argparse.Namespace,
) -> Run:
    full = engine.kv_budget_bytes
    first, last = len(requests) // 4, 3 * len(requests) // 4
    outputs: dict[str, RequestOutput] = {}
    clock = args.time
    start, sent, peak_arena, peak_over = clock.now(), 0, 0, 0
    while sent < len(requests) or engine.has_unfinished:
        now = clock.now() - start
        while sent < len(requests) and at_s[sent] <= now:
            if sent == first:
                engine.set_kv_budget(full // 2)
            if sent == last:
                engine.set_kv_budget(full)
            engine.add_request(
                str(sent), list(requests[sent].prompt_token_ids), sampling(args), arrival_s=start + at_s[sent]
            )
            sent += 1
        if not engine.has_unfinished:
            clock.sleep(max(0.0, at_s[sent] - now))
            continue
        finished = engine.step(finished_only=True)
        outputs |= {output.request_id: output for output in finished}
        if finished:
            memory = engine.memory()
            peak_arena = max(peak_arena, memory.arena_used_bytes)
            peak_over = max(peak_over, memory.resident_bytes - memory.budget_bytes)
    duration = clock.now() - start
    counters = engine.stats().counters()
    held = {name for name, o in outputs.items() if within(o, slo)}
    squeezed = {str(i) for i in range(first, last)}
    return Run(
        goodput=float(len(held) / duration), held=len(held), finished=len(outputs),
        num_requests=len(requests),
        squeezed_held=len(held & squeezed), squeezed=len(squeezed), duration_s=duration,
        ttft_p95_s=float(np.quantile([o.metrics.ttft_s or np.inf for o in outputs.values()], 0.95)),
        tpot_p95_s=float(np.quantile([o.metrics.tpot_s or 0.0 for o in outputs.values()], 0.95)),
        preemptions=int(counters["preemptions"]), recomputed_tokens=int(counters["recomputed_tokens"]),
        lowered_requests=sum(o.num_lowered_tokens > 0 for o in outputs.values()),
        dropped_planes=int(counters["dropped_planes"]), restored_planes=int(counters["restored_planes"]),
        lost_planes=int(counters["lost_planes"]),
        bytes_moved=int(counters["plane_bytes_dropped"] + counters["plane_bytes_restored"]),
        peak_arena_bytes=peak_arena, peak_over_budget_bytes=peak_over,
    )  # fmt: skip


def within(output: RequestOutput, slo: Slo) -> bool:
    metrics = output.metrics
    is_timely = metrics.ttft_s is not None and metrics.ttft_s <= slo.ttft_s
    return is_timely and (metrics.tpot_s is None or metrics.tpot_s <= slo.tpot_s)


# --- bits


def check_bits(
    model: Path, planes: Planes, requests: Sequence[TokenRequest], args: argparse.Namespace
) -> dict[str, Any]:
    """Two engines, one squeezed during the first wave of requests; the second wave comes after relief."""
    loaded = load_model(model, EngineConfig(dtype="float32"))
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, logprobs=8)
    size = 2 * sum(needed_bytes(loaded, r, 32) for r in requests)
    prompts = [list(r.prompt_token_ids) for r in requests]
    answers: dict[bool, list[Any]] = {}
    counters: dict[str, float] = {}
    blocks_equal = checked = 0
    for is_squeezed in (True, False):
        engine = Engine.from_pretrained(
            loaded,
            cache=CacheConfig(kv_budget=size, squeeze_planes=planes, plane_arena=size, **NESTED),
            scheduler=SchedulerConfig(max_num_batched_tokens=args.batched_tokens),
            config=EngineConfig(dtype="float32", num_threads=1, pad_rows=16, kernel=args.kernel),
        )
        with engine:
            for i, prompt in enumerate(prompts):
                engine.add_request(f"a{i}", prompt, params)
            while sum(not engine.is_unfinished(f"a{i}") for i in range(len(prompts))) < 1:
                engine.step()
            if is_squeezed:
                written = block_bytes(engine, prompts)
                engine.set_kv_budget(max(size // 8, int(engine.memory().referenced_bytes * args.bits_share)))
            while engine.has_unfinished:
                engine.step()
            engine.set_kv_budget(size)
            for i, prompt in enumerate(prompts):
                engine.add_request(f"b{i}", [*prompt, *prompts[(i + 1) % len(prompts)][:40]], params)
            after: dict[str, RequestOutput] = {}
            while engine.has_unfinished:
                after |= {o.request_id: o for o in engine.step(finished_only=True)}
            answers[is_squeezed] = [
                (o.token_ids, o.logprobs, o.top_logprobs, o.num_lowered_tokens)
                for o in (after[f"b{i}"] for i in range(len(prompts)))
            ]
            if is_squeezed:
                counters = engine.stats().counters()
                now = block_bytes(engine, prompts)
                checked = len(written.keys() & now.keys())
                blocks_equal = sum(written[key] == now[key] for key in written.keys() & now.keys())
    return {
        "requests_after": len(prompts),
        "answers_bit_equal": sum(a == b for a, b in zip(answers[True], answers[False], strict=True)),
        "blocks_before": len(written), "blocks_checked": checked, "blocks_bit_equal": blocks_equal,
        "dropped_planes": counters["dropped_planes"], "restored_planes": counters["restored_planes"],
        "lowered_tokens": counters["lowered_tokens"],
    }  # fmt: skip


def block_bytes(engine: Engine, prompts: Sequence[Sequence[int]]) -> dict[tuple[int, int, int], bytes]:
    """(prompt, block index, layer) -> bytes of a cached block, low planes included, where all are there."""
    found: dict[tuple[int, int, int], bytes] = {}
    for p, prompt in enumerate(prompts):
        for group, blocks in zip(engine.arena_plan.groups, engine.cached_blocks(prompt), strict=True):
            for index, block in enumerate(blocks):
                for layer in group.layers if block >= 0 else ():
                    cache = engine.attention_layers[layer].cache
                    planes = list(cache.low_planes.values())
                    if all(bool(low.is_resident([block])[0]) for low in planes):
                        parts = [cache.arena[block], *(low.read([block])[0] for low in planes)]
                        found[p, index, layer] = torch.cat(parts).numpy().tobytes()
    return found


def needed_bytes(loaded: LoadedModel, request: TokenRequest, output: int) -> int:
    tokens = -(-(len(request.prompt_token_ids) + output) // 16) * 16
    return tokens * growth_bytes_per_token(loaded.spec, KVFormat.of("n8_rh"))


# --- together


def measure(loaded: LoadedModel, args: argparse.Namespace, model: Path, note: Callable[[str], None]):
    span = {"shortest": args.shortest, "longest": args.longest}
    sample = chats(loaded, model, args.samples, seed=args.seed + 1, **span)
    if args.planes is None:
        planes, verdict, table = prove(loaded, args, sample)
    else:
        planes, verdict, table = {int(k): (v[0], v[1]) for k, v in args.planes.items()}, None, []
    note(f"proven at {args.margin}: {planes or 'nothing'}")
    requests = chats(loaded, model, args.requests, seed=args.seed, **span)
    with engine_of(loaded, args, kv_budget="256MiB", **NESTED) as engine:
        engine.generate([list(requests[0].prompt_token_ids)], sampling(args))  # warm
        slo = alone(engine, requests[: args.unloaded], args)
        seconds, held = closed_loop(engine, requests, args.in_flight, args)
    budget, interval = int(held / args.load), seconds / args.in_flight
    cache = {"kv_budget": budget, **NESTED}
    arms: Mapping[str, dict[str, Any]] = {
        "preempting": cache,
        "reversible": {**cache, "squeeze_planes": planes, "plane_arena": args.arena or budget},
    }
    note(f"SLO {asdict(slo)}; a request every {interval:.3f} s; budget {format_bytes(budget)}")
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for repetition in range(args.repetitions):
        order = ARMS if repetition % 2 == 0 else ARMS[::-1]
        at_s = arrivals(len(requests), interval, args.seed + repetition)
        for arm in order:
            with engine_of(loaded, args, **arms[arm]) as engine:
                runs[arm].append(serve(engine, requests, at_s, slo, args))
            note(f"{arm}: {runs[arm][-1]}")
    bits = check_bits(model, planes, requests[: args.bits_requests], args) if planes else None
    return summary(args, slo, planes, verdict, table, runs, bits, budget, interval, loaded)


def summary(
    args: argparse.Namespace, slo: Slo, planes: Planes, verdict: QualityVerdict | None,
    table: list[dict[str, Any]], runs: dict[str, list[Run]], bits: dict[str, Any] | None, budget: int,
    interval: float, loaded: LoadedModel,
) -> dict[str, Any]:  # fmt: skip
    pairs = list(zip(runs["reversible"], runs["preempting"], strict=True))
    ratios = [a.goodput / b.goodput if b.goodput else float("inf") for a, b in pairs]
    plane_share = sum((k == 1) + (v == 1) for k, v in planes.values()) / (2 * len(loaded.spec.layers))
    is_equal = bits is not None and (
        bits["answers_bit_equal"] == bits["requests_after"]
        and bits["blocks_bit_equal"] == bits["blocks_checked"] > 0
        and bits["restored_planes"] > 0
    )
    return {
        "schema_version": 1,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "time"},
        "budget_bytes": budget, "interval_s": interval, "slo": asdict(slo),
        "margin": margin_named(args.margin).to_dict(),
        "planes": {str(layer): list(pair) for layer, pair in planes.items()},
        "share_of_sides": plane_share,
        "verdict": None if verdict is None else verdict.to_dict(),
        "isolated": table,
        "runs": {arm: [asdict(run) for run in found] for arm, found in runs.items()},
        "goodput": {arm: statistics.median(r.goodput for r in found) for arm, found in runs.items()},
        "goodput_ratio": {"median": statistics.median(ratios), "all": ratios, "wanted": WANTED},
        "bits": bits,
        "passed": {
            "all_finished": all(r.finished == r.num_requests for found in runs.values() for r in found),
            "goodput": statistics.median(ratios) >= WANTED,
            "quality": bool(planes) and verdict is not None,
            "bits": is_equal,
            "within_budget": all(r.peak_over_budget_bytes <= 0 for r in runs["reversible"]),
        },
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    budget = format_bytes(report["budget_bytes"])
    print(f"budget {budget}, halved for half of the run; planes that may go: {report['planes'] or 'none'}")
    for arm, runs in report["runs"].items():
        for run in runs:
            print(
                f"  {arm:11} goodput {run['goodput']:.3f}/s  held {run['held']}/{run['num_requests']}"
                f" (squeezed {run['squeezed_held']}/{run['squeezed']})  TTFT p95 {run['ttft_p95_s']:.3f} s"
                f"  TPOT p95 {1000 * run['tpot_p95_s']:.1f} ms  preempted {run['preemptions']}"
                f"  lowered {run['lowered_requests']}"
            )
    print(f"goodput ratio {report['goodput_ratio']['median']:.2f} (wanted {WANTED}); bits {report['bits']}")
    print("passed: " + ", ".join(f"{name} {ok}" for name, ok in report["passed"].items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--margin", default="balanced", help="near-lossless, balanced or aggressive")
    parser.add_argument(
        "--load", type=float, default=0.65, help="share of the full budget in use, on average"
    )
    parser.add_argument(
        "--in-flight", type=int, default=8, help="requests under way at that load, on average"
    )
    parser.add_argument("--planes", type=json.loads, default=None, help='skip the proof, e.g. {"3": [2, 1]}')
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--output", type=int, default=256, help="tokens generated by each request")
    parser.add_argument("--shortest", type=int, default=256)
    parser.add_argument("--longest", type=int, default=768)
    parser.add_argument("--samples", type=int, default=48, help="chats the reading is judged on")
    parser.add_argument("--unloaded", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batched-tokens", type=int, default=256)
    parser.add_argument("--watermark", type=float, default=0.01)
    parser.add_argument("--arena", default=None, help="host arena; default: as large as the budget")
    parser.add_argument("--bits-requests", type=int, default=6)
    parser.add_argument("--bits-share", type=float, default=0.9, help="of what is referenced at the squeeze")
    parser.add_argument("--kernel", default="auto", help="of the bit checks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="whose seconds count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else str(value)


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    args.time = Clock(args.clock)
    model = args.model or reference_model_path()

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        report = measure(load_model(model), args, model, note)
    except KVTuneError as error:
        note(f"bench_squeeze: {error}")
        return error.exit_code
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, default=_plain) + "\n")
    show(report)
    return 0 if all(report["passed"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
