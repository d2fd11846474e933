"""How close the simulator comes to the engine, and how fast it is.

    python benchmarks/bench_simulate.py --json OUT [--only chat] [--clock awake|cpu|steady]

For chat, long documents and agents: the capacity is measured, then the engine runs five times at 50 % and
at 80 % of it, beside one simulation of the same requests. A slice of calibration lies before every run, so
that fit and runs see the same machine.
fidelity: a figure (p50 and p95 of TTFT, TPOT and E2E) passes when it is within max(10 %, 1.5 x the spread of
the engine runs) of their median.
fit: step times are predicted within 8 % (mean absolute error) on batch shapes that the fit has not seen.
Their steps are made ten times, once beside every run, and the median of each counts: single steps of
a millisecond say more of the machine's neighbours than of the engine. `fit_error` (shapes kept out of the fit
itself, most of them measured once) and `as_served` (the steps of the runs) are with that noise.
speed: 10,000 requests simulated, with --trace by a public trace's lengths; a roofline's step times serve
where no workload was measured in the same call.

Results are kept in OUT after every workload; a later call measures only what is missing or named by --only.
`--clock awake` counts wall time and skips what the engine would sleep until the next arrival.
`--clock cpu` counts this process's CPU time instead: for machines that others use as well.
`--clock steady` counts wall time at the machine's speed of the moment, which a probe between steps tells: for
machines whose neighbours come and go, and slow runs and calibration by turns; the probe disagrees with steps
of calibration and of service by up to 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clocks import Clock, SteadyClock, clock_named

from kvtune import CacheConfig, EngineConfig, SchedulerConfig
from kvtune.engine.calibrate import Calibration, StepTimer, calibrate
from kvtune.engine.engine import Engine
from kvtune.engine.load import LoadedModel, load_model
from kvtune.engine.target import RunningEngine
from kvtune.errors import InvariantError, KVTuneError
from kvtune.host import read_host
from kvtune.sched.shape import SHAPE_COLUMNS
from kvtune.sim import (
    CostModel,
    FitError,
    FittedCost,
    RooflineCost,
    SimRequest,
    Simulation,
    SimulationRun,
    median_by_shape,
    of_trace,
    run_report,
    shape_cells,
)
from kvtune.target import LoadReport, LoadRequest
from kvtune.testing.reference import reference_model_path
from kvtune.workload import Workload, WorkloadRequest, load_workload

CACHE = CacheConfig(kv_budget="64MiB")
SCHEDULER = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512)
METRICS = ("ttft", "tpot", "e2e")
QUANTILES = (50, 95)
LOADS = (0.5, 0.8)
UNSEEN_ROUNDS, UNSEEN_SEED = 60, 1_000_000


# -- workloads: requests without arrival times


def chat(rng: np.random.Generator, vocab: int, count: int) -> list[LoadRequest]:
    """Turns of conversations under a shared system prompt: short messages, medium answers."""
    system = rng.integers(4, vocab, 160).tolist()
    histories: list[list[int]] = []
    rows: list[tuple[list[int], int]] = []
    for _ in range(count):
        is_new = not histories or rng.random() < 0.4
        history = (
            list(system)
            if is_new
            else histories[int(rng.integers(max(0, len(histories) - 12), len(histories)))]
        )
        prompt = history + rng.integers(4, vocab, int(np.clip(rng.lognormal(3.7, 0.7), 8, 300))).tolist()
        prompt = prompt[:1500]
        answer = int(np.clip(rng.lognormal(4.0, 0.6), 8, 200))
        histories.append(prompt + rng.integers(4, vocab, answer).tolist())
        rows.append((prompt, answer))
    return named("chat", rows)


def documents(rng: np.random.Generator, vocab: int, count: int) -> list[LoadRequest]:
    """Questions on long documents, a third of them on a document asked about before."""
    texts: list[list[int]] = []
    rows: list[tuple[list[int], int]] = []
    for _ in range(count):
        if not texts or rng.random() < 0.67:
            texts.append(rng.integers(4, vocab, int(rng.uniform(1200, 3400))).tolist())
        text = texts[int(rng.integers(max(0, len(texts) - 6), len(texts)))]
        rows.append(
            (text + rng.integers(4, vocab, int(rng.integers(20, 60))).tolist(), int(rng.integers(24, 97)))
        )
    return named("documents", rows)


def agents(rng: np.random.Generator, vocab: int, count: int) -> list[LoadRequest]:
    """Agents that append tool results to one growing context; answers are short."""
    tools = rng.integers(4, vocab, 700).tolist()
    contexts = [list(tools) for _ in range(5)]
    rows: list[tuple[list[int], int]] = []
    for _ in range(count):
        agent = int(rng.integers(0, len(contexts)))
        if len(contexts[agent]) > 3200:
            contexts[agent] = list(tools)
        contexts[agent] = contexts[agent] + rng.integers(4, vocab, int(rng.integers(30, 260))).tolist()
        answer = int(np.clip(rng.lognormal(3.2, 0.6), 6, 120))
        rows.append((list(contexts[agent]), answer))
        contexts[agent] = contexts[agent] + rng.integers(4, vocab, answer).tolist()
    return named("agents", rows)


def named(workload: str, rows: list[tuple[list[int], int]]) -> list[LoadRequest]:
    return [
        LoadRequest(request_id=f"{workload}-{i}", prompt_token_ids=tuple(prompt), max_tokens=answer)
        for i, (prompt, answer) in enumerate(rows)
    ]


Maker = Callable[[np.random.Generator, int, int], list[LoadRequest]]
WORKLOADS: dict[str, Maker] = {"chat": chat, "documents": documents, "agents": agents}
SEEDS = {"chat": 1, "documents": 2, "agents": 3}


def arriving(requests: list[LoadRequest], rate: float, seed: int) -> list[LoadRequest]:
    """Poisson arrivals at `rate` [1/s]."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, len(requests))
    times = np.concatenate(([0.0], np.cumsum(gaps)[:-1]))
    return [replace(r, arrival_s=float(t)) for r, t in zip(requests, times, strict=True)]


# -- the engine, and the simulation of it


def run_engine(
    loaded: LoadedModel, requests: list[LoadRequest], clock: Clock, steps: Calibration | None = None
) -> LoadReport:
    """Serve the requests at their times; `steps` takes shape and time of every step."""
    engine = Engine(loaded, cache=CACHE, scheduler=SCHEDULER, config=EngineConfig(), clock=clock)
    with RunningEngine(engine, clock=clock, sleep=clock.sleep) as running:
        if steps is None:
            return running.load(requests)
        timer = StepTimer(engine, clock=clock)
        step = engine.step

        def timed(**options: Any) -> Any:
            begin = clock()
            outputs = step(**options)
            timer.took(clock() - begin)
            return outputs

        engine.step = timed  # type: ignore[method-assign]
        report = running.load(requests)
        timer.flush()
        steps.shapes += timer.calibration.shapes
        steps.seconds += timer.calibration.seconds
        return report


def simulate(
    loaded: LoadedModel, requests: list[LoadRequest], cost: FittedCost, length: int
) -> SimulationRun:
    simulation = Simulation(
        loaded.spec, cache=CACHE, scheduler=SCHEDULER, max_model_len=length, cost=cost,
    )  # fmt: skip
    return simulation.run([
        SimRequest(
            request_id=r.request_id, arrival_s=r.arrival_s, num_prompt_tokens=len(r.prompt_token_ids),
            num_output_tokens=r.max_tokens, prompt_token_ids=np.array(r.prompt_token_ids, dtype=np.int32),
        )
        for r in requests
    ])  # fmt: skip


def figures(results: Any) -> dict[str, float]:
    """p50 and p95 of each metric over the completed requests, in ms."""
    done = [r for r in results if r.error is None]
    found: dict[str, float] = {}
    for metric in METRICS:
        values = [getattr(r, f"{metric}_s") for r in done]
        known = np.array([v for v in values if v is not None])
        found |= {f"{metric}_p{q}_ms": float(np.percentile(known, q)) * 1e3 for q in QUANTILES}
    return found


def compare(runs: list[dict[str, float]], simulated: dict[str, float]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, value in simulated.items():
        seen = [run[name] for run in runs]
        middle = statistics.median(seen)
        spread = (max(seen) - min(seen)) / middle
        error = value / middle - 1
        allowed = max(0.10, 1.5 * spread)
        rows[name] = {
            "engine": seen, "engine_median": middle, "engine_spread": spread, "simulated": value,
            "error": error, "allowed": allowed, "passes": abs(error) <= allowed,
        }  # fmt: skip
    return rows


def measure(
    loaded: LoadedModel, name: str, args: argparse.Namespace
) -> tuple[dict[str, Any], FittedCost, dict[str, Any]]:
    """Everything about one workload, the cost model fitted meanwhile, and the measured steps themselves."""
    clock = clock_named(args.clock)
    plans, capacity = plan(loaded, name, clock, args)
    runs: dict[float, list[LoadReport]] = {load: [] for load in LOADS}
    slices, served = Calibration(), Calibration()
    repeated: list[Calibration] = []
    for number in range(args.runs):
        for turn, (load, requests) in enumerate(plans.items()):
            with Engine(loaded, cache=CACHE, scheduler=SCHEDULER, config=EngineConfig()) as engine:
                seed = args.seed + len(plans) * number + turn
                own = calibrate(engine, seconds=args.calibration_s, seed=seed, clock=clock)
                repeated.append(again(engine, args, clock))
            slices.shapes += own.shapes
            slices.seconds += own.seconds
            slices.submissions += own.submissions
            slices.facts = own.facts
            runs[load].append(run_engine(loaded, requests, clock, served))
    cost = cost_of(slices.to_dict())
    shapes, seconds = np.array(served.shapes), np.array(served.seconds)
    found = {
        "requests": len(plans[LOADS[0]]),
        "capacity_rps": capacity,
        "fit": cost.to_dict(),
        "unseen": FitError.of(*of_unseen(cost, np.array(slices.shapes), repeated)).to_dict(),
        "as_served": FitError.of(*of_equal_shapes(cost, shapes, seconds)).to_dict(),
        "level_as_served": levels_of(cost, shapes, seconds),
        "loads": {
            str(load): fidelity(loaded, load * capacity, plans[load], runs[load], cost) for load in LOADS
        },
    }
    if isinstance(clock, SteadyClock):
        found["machine_speed"] = dict(
            zip(("p5", "p50", "p95"), np.percentile(clock.speeds, [5, 50, 95]).tolist(), strict=True)
        )
    return found, cost, {
        "calibration": slices.to_dict(), "served": served.to_dict(),
        "repeated": [one.to_dict() for one in repeated],
    }  # fmt: skip


def again(engine: Engine, args: argparse.Namespace, clock: Clock) -> Calibration:
    """The same steps whenever it is called, none of a slice that the cost model is fitted to."""
    return calibrate(engine, num_rounds=UNSEEN_ROUNDS, seed=args.seed + UNSEEN_SEED, clock=clock)


def of_unseen(
    cost: FittedCost, seen: np.ndarray, repeated: list[Calibration]
) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, measured) of steps made several times, by shape: the median over the times, the median of
    steps that are alike; shapes that the fit has seen are left out."""
    shapes = np.array(repeated[0].shapes)
    for other in repeated[1:]:
        if not np.array_equal(shapes, np.array(other.shapes)):
            raise InvariantError("rounds of the same seed made other steps")
    medians = np.median([one.seconds for one in repeated], axis=0)
    known = set(map(tuple, shape_cells(seen).tolist()))
    is_new = np.array([tuple(cell) not in known for cell in shape_cells(shapes).tolist()])
    return of_equal_shapes(cost, shapes[is_new], medians[is_new])


def plan(
    loaded: LoadedModel, name: str, clock: Clock, args: argparse.Namespace
) -> tuple[dict[float, list[LoadRequest]], float]:
    """The requests at each load, as many as take about `--run-s` at the lowest; the capacity [1/s]."""

    def draw(count: int) -> list[LoadRequest]:
        rng = np.random.default_rng([args.seed, SEEDS[name]])
        return WORKLOADS[name](rng, loaded.vocab_size, count)

    run_engine(loaded, draw(12), clock)  # warm up
    probe = draw(60)
    capacity = len(probe) / run_engine(loaded, probe, clock).duration_s  # all there at once, drained
    requests = draw(max(20, round(args.run_s * LOADS[0] * capacity)))
    capacity = len(requests) / run_engine(loaded, requests, clock).duration_s
    return {load: arriving(requests, load * capacity, args.seed) for load in LOADS}, capacity


def levels_of(cost: FittedCost, shapes: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """Predicted over measured time, of all steps of the runs and by their kind; stalls count threefold."""
    predicted = cost.seconds(shapes)
    measured = np.minimum(seconds, 3.0 * predicted)
    decodes, prefills = shapes[:, 0], shapes[:, 1]
    kinds = {
        "all": decodes >= 0, "decode_1": (decodes == 1) & (prefills == 0),
        "decode_2_to_4": (decodes > 1) & (decodes < 5) & (prefills == 0),
        "decode_5_up": (decodes > 4) & (prefills == 0), "prefill": (decodes == 0) & (prefills > 0),
        "mixed": (decodes > 0) & (prefills > 0),
    }  # fmt: skip
    return {
        kind: float(predicted[rows].sum() / measured[rows].sum())
        for kind, rows in kinds.items()
        if rows.any()
    }


def of_equal_shapes(
    cost: FittedCost, shapes: np.ndarray, seconds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, measured) by batch shape: medians over steps that are alike."""
    grid, medians = median_by_shape(shapes, seconds)
    return cost.seconds(grid), medians


def fidelity(
    loaded: LoadedModel, rate: float, requests: list[LoadRequest], runs: list[LoadReport], cost: FittedCost
) -> dict[str, Any]:
    simulated = simulate(loaded, requests, cost, loaded.max_model_len)
    counters = [run.counters for run in runs]
    return {
        "rate_rps": rate,
        "figures": compare([figures(run.results) for run in runs], figures(simulated.records)),
        "steps": {"engine": [c["steps"] for c in counters], "simulated": simulated.scheduler.steps},
        "hit_tokens": {
            "engine": [c["hit_tokens"] for c in counters],
            "simulated": simulated.cache.hit_tokens,
        },
        "preemptions": {
            "engine": [c["preemptions"] for c in counters],
            "simulated": simulated.scheduler.preemptions,
        },
        "busy": simulated.busy_s / simulated.duration_s,
    }


def is_current(found: dict[str, Any]) -> bool:
    """Whether a workload was measured with today's columns of a step's shape."""
    return SHAPE_COLUMNS[-1] in found["fit"]["coefficients"] and "unseen" in found


def cost_of(data: dict[str, Any]) -> FittedCost:
    return FittedCost.fit(
        np.array(data["shapes"]), np.array(data["seconds"]), submissions=np.array(data["submissions"]),
        facts=data["facts"],
    )  # fmt: skip


def speed(loaded: LoadedModel, cost: CostModel | None, trace: Path | None) -> dict[str, Any]:
    """10,000 requests: of a trace's lengths, or drawn like Azure's conversations."""
    if trace is None:
        rng = np.random.default_rng(0)
        arrivals = np.cumsum(rng.exponential(0.19, 10_000))
        rows = [
            WorkloadRequest(
                request_id=f"r{i}", arrival_s=float(t),
                input_length=int(np.clip(rng.lognormal(6.6, 0.9), 8, 3000)),
                output_length=int(np.clip(rng.lognormal(5.0, 0.8), 4, 1000)),
            )
            for i, t in enumerate(arrivals)
        ]  # fmt: skip
        workload = Workload(requests=tuple(rows), format="drawn", is_synthetic_text=True)
    else:
        workload = load_workload(trace)
        workload = replace(workload, requests=workload.requests[:10_000])
    made = of_trace(workload, block_size=CACHE.block_size, max_model_len=1 << 17)
    server = {"cache": CacheConfig(kv_budget="2GiB"), "scheduler": SchedulerConfig(max_num_seqs=128)}
    cost = cost or RooflineCost(
        bandwidth=2e10, flops=1e11, weights_bytes=1e7, num_parameters=5e6, pair_flops=1e3
    )
    simulation = Simulation(loaded.spec, max_model_len=1 << 17, cost=cost, **server)  # type: ignore[arg-type]
    wall, cpu = time.monotonic(), time.process_time()
    run = simulation.run(made.requests)
    report = run_report(run, cost)
    return {
        "source": "drawn lengths" if trace is None else trace.name,
        "requests": len(made.requests),
        "wall_s": time.monotonic() - wall,
        "cpu_s": time.process_time() - cpu,
        "steps": run.scheduler.steps,
        "tokens": report["total_input_tokens"] + report["total_output_tokens"],
        "blocks_published": run.cache.published_blocks,
    }


def show(report: dict[str, Any]) -> None:
    for name, found in report["workloads"].items():
        error, unseen, served = found["fit"]["fit_error"], found["unseen"], found["as_served"]
        print(
            f"{name}: {found['requests']} requests, capacity {found['capacity_rps']:.2f} requests/s; step "
            f"times off by {unseen['mean_absolute']:.1%} on {unseen['num_shapes']} unseen shapes, made ten "
            f"times (limit 8 %), by {error['mean_absolute']:.1%} on {error['num_shapes']} of single "
            f"measurements, by {served['mean_absolute']:.1%} on {served['num_shapes']} shapes of the runs"
        )
        levels = ", ".join(f"{kind} {level:.3f}" for kind, level in found["level_as_served"].items())
        print(f"  predicted over measured time of the runs' steps: {levels}")
        for load, row in found["loads"].items():
            for figure, cell in row["figures"].items():
                verdict = "ok" if cell["passes"] else "MISSES"
                print(
                    f"  {float(load):4.0%} {figure:12} engine {cell['engine_median']:9.1f}  simulated "
                    f"{cell['simulated']:9.1f}  error {cell['error']:+6.1%}  "
                    f"spread {cell['engine_spread']:5.1%}  allowed {cell['allowed']:5.1%}  {verdict}"
                )
    for row in report["speed"]:
        print(
            f"speed: {row['requests']:,} requests ({row['source']}), {row['steps']:,} steps in "
            f"{row['wall_s']:.1f} s, {row['cpu_s']:.1f} s of CPU (limit 30 s)"
        )


def passes(report: dict[str, Any]) -> bool:
    """Whether everything measured so far is within its limit."""
    found = report["workloads"].values()
    cells = [cell for row in found for load in row["loads"].values() for cell in load["figures"].values()]
    fits = [row["unseen"]["mean_absolute"] <= 0.08 for row in found]
    return all(fits) and all(c["passes"] for c in cells) and all(r["wall_s"] < 30 for r in report["speed"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", choices=[*WORKLOADS, "speed"], help="measure this (again), keep the rest")
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--trace", type=Path, help="trace whose first 10,000 requests are simulated for speed"
    )
    parser.add_argument("--clock", choices=["wall", "awake", "cpu", "steady"], default="wall")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--run-s", type=float, default=18.0, help="about how long a run at the lower rate takes"
    )
    parser.add_argument("--calibration-s", type=float, default=9.0, help="of each slice of calibration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", type=Path, help="folder for every measured step, by workload")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(args.model or reference_model_path(), EngineConfig())
    report: dict[str, Any] = {"workloads": {}, "speed": []}
    if args.json.exists():
        report = json.loads(args.json.read_text())
        report["workloads"] = {k: v for k, v in report["workloads"].items() if is_current(v)}
    report |= {"benchmark": "simulate", "clock": args.clock, "runs": args.runs}
    report["hardware"] = read_host().to_dict()

    def keep() -> None:
        report["load_average"] = os.getloadavg()[0]
        args.json.write_text(json.dumps(report) + "\n")

    cost: FittedCost | None = None
    for name in WORKLOADS:
        if args.only == name or (args.only is None and name not in report["workloads"]):
            report["workloads"][name], cost, steps = measure(loaded, name, args)
            keep()
            if args.raw is not None:
                args.raw.mkdir(parents=True, exist_ok=True)
                (args.raw / f"{name}.json").write_text(json.dumps(steps))
    if args.only == "speed" or (args.only is None and not report["speed"]):
        report["speed"] = [speed(loaded, cost, trace) for trace in dict.fromkeys((None, args.trace))]
        keep()
    show(report)
    return 0 if passes(report) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KVTuneError as error:
        sys.exit(f"bench_simulate: {error}")
