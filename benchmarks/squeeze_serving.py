"""What bench_squeeze.py serves: its chats, the SLO and the rate fixed beforehand, and one run in which half
of the KV budget may go away."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clocks import Clock

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.adapters.prompt_encoder import prompt_encoder
from kvtune.engine import LoadedModel
from kvtune.engine.target import RunningEngine
from kvtune.errors import KVTuneError
from kvtune.types import RequestOutput
from kvtune.workload import TokenRequest, demo_chat, materialise

HELD = 0.95
"""Share of requests within the SLO that a budget or a batch must reach."""
IN_FLIGHT = (4, 6, 8, 10, 12, 16, 24, 32)
SPARE = "256MiB"
SAMPLE_STEPS = 16
"""Steps between two looks at what is held."""
ASKED_AGAIN = 16
"""Requests sent once more when a run is over."""
NESTED = {"k_codec": "n8_rh", "v_codec": "n8_rh"}


@dataclass(frozen=True)
class Slo:
    """Limits in seconds, and what they are twice of."""

    ttft_s: float
    tpot_s: float
    unloaded_ttft_p95_s: float
    unloaded_tpot_p95_s: float


@dataclass(frozen=True)
class Arrival:
    """One request of a run and when it comes [s from the start]."""

    prompt: list[int]
    max_tokens: int
    at_s: float


@dataclass
class Run:
    """One arm's run. `held`: requests within the SLO; `squeezed`: those that came while half was gone.
    `mean_held_bytes`: what running requests held then, over time. `lowered_at_end`: cached blocks whose low
    plane has not come back, as nobody asks for them and other cached blocks have the room.
    `lowered_again`: of the last requests, sent once more when all is over, those that read a token below
    nominal precision."""

    goodput: float
    held: int
    finished: int
    num_requests: int
    squeezed_held: int
    squeezed: int
    duration_s: float
    ttft_p95_s: float
    tpot_p95_s: float
    mean_held_bytes: float
    mean_running: float
    preemptions: int
    recomputed_tokens: int
    lowered_requests: int
    dropped_planes: int
    restored_planes: int
    lost_planes: int
    lowered_at_end: int
    lowered_again: int
    bytes_moved: int
    peak_arena_bytes: int
    peak_over_budget_bytes: int


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


def arrivals(requests: Sequence[TokenRequest], per_s: float, output: int, *, seed: int) -> list[Arrival]:
    """A Poisson stream; outputs of half to one and a half of `output` tokens."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(1 / per_s, len(requests)))
    lengths = rng.integers(output - output // 2, output + output // 2 + 1, len(requests))
    return [
        Arrival(list(r.prompt_token_ids), int(n), float(at))
        for r, n, at in zip(requests, lengths, at_s, strict=True)
    ]


# --- engines


def engine_of(loaded: LoadedModel, args: argparse.Namespace, **cache: Any) -> Engine:
    return Engine(
        loaded,
        cache=CacheConfig(**cache),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=args.batched_tokens, watermark=args.watermark, admission=args.admission
        ),
        config=EngineConfig(num_threads=args.threads),
        clock=args.time,
    )


def running(engine: Engine, args: argparse.Namespace) -> RunningEngine:
    return RunningEngine(engine, clock=args.time, sleep=args.time.sleep)


# --- what is fixed beforehand


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def warm(engine: Engine, requests: Sequence[TokenRequest]) -> None:
    """Meet every batch up to the largest once: kernels are compiled for the shapes they see."""
    for i, request in enumerate(requests[: max(IN_FLIGHT)]):
        engine.add_request(f"warm{i}", list(request.prompt_token_ids), sampling(4 + i))
    while engine.has_unfinished:
        engine.step(finished_only=True)


def alone(engine: Engine, requests: Sequence[TokenRequest], args: argparse.Namespace) -> Slo:
    """Each request by itself, nothing cached."""
    ttft, tpot = [], []
    for request in requests:
        engine.reset_prefix_cache()
        metrics = engine.generate([list(request.prompt_token_ids)], sampling(args.output))[0].metrics
        ttft.append(metrics.ttft_s or 0.0)
        tpot.append(metrics.tpot_s or 0.0)
    a, b = float(np.quantile(ttft, 0.95)), float(np.quantile(tpot, 0.95))
    return Slo(2 * a, 2 * b, a, b)


def fastest_rate(
    loaded: LoadedModel, requests: Sequence[TokenRequest], slo: Slo, args: argparse.Namespace
) -> tuple[float, list[dict[str, float]]]:
    """Requests per second of the largest batch that keeps the SLO, and what each batch tried did."""
    tried: list[dict[str, float]] = []
    fastest = 0.0
    for count in IN_FLIGHT:
        with engine_of(loaded, args, kv_budget=SPARE, **NESTED) as engine:
            share, per_s = closed_loop(engine, requests, count, slo, args)
        tried.append({"in_flight": count, "share_held": share, "requests_per_s": per_s})
        if share < HELD:
            break
        fastest = per_s
    if not fastest:
        raise KVTuneError(f"not even {IN_FLIGHT[0]} requests at a time keep the SLO on this machine")
    return fastest, tried


def closed_loop(
    engine: Engine, requests: Sequence[TokenRequest], count: int, slo: Slo, args: argparse.Namespace
) -> tuple[float, float]:
    """`count` requests run at any time: the share within the SLO, and requests per second, of those that
    came while others ran, until no more come."""
    left = list(requests[: 4 * count])[::-1]
    rng = np.random.default_rng(args.seed)
    live, sent, start = 0, 0, 0.0
    held: list[bool] = []
    while left:
        while left and live < count:
            tokens = int(rng.integers(args.output // 2, args.output + args.output // 2 + 1))
            engine.add_request(str(sent), list(left.pop().prompt_token_ids), sampling(tokens))
            live, sent = live + 1, sent + 1
        for output in engine.step(finished_only=True):
            live -= 1
            if int(output.request_id) >= count:  # not of the first, which all come at once
                held.append(within(output, slo))
            else:
                start = start or args.time()
    return statistics.mean(held), (len(held) + count) / (args.time() - start)


# --- one run


class Watch:
    """Looks at the memory of a run now and then: means over time while half is gone, and peaks."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine, self._clock = engine, clock
        self._at_s = clock()
        self._held: list[tuple[float, float, float]] = []  # seconds, bytes, running requests
        self.peak_arena = self.peak_over = 0

    def look(self, *, counts: bool) -> None:
        memory, now = self._engine.memory(), self._clock()
        if counts:
            self._held.append((now - self._at_s, memory.referenced_bytes, self._engine.num_running))
        self._at_s = now
        self.peak_arena = max(self.peak_arena, memory.arena_used_bytes)
        self.peak_over = max(self.peak_over, memory.resident_bytes - memory.budget_bytes)

    def mean(self) -> tuple[float, float]:
        """Bytes held and requests running, over time."""
        seconds, held, running = np.array(self._held or [(1.0, 0.0, 0.0)]).T
        return float(np.average(held, weights=seconds)), float(np.average(running, weights=seconds))


def serve(
    engine: Engine, stream: Sequence[Arrival], slo: Slo, args: argparse.Namespace, *, is_halved: bool
) -> Run:
    """`is_halved`: half of the budget goes away while the middle half of the requests come."""
    full, clock = engine.kv_budget_bytes, args.time
    first, last = len(stream) // 4, 3 * len(stream) // 4
    outputs: dict[str, RequestOutput] = {}
    watch, start, sent, steps = Watch(engine, clock), clock(), 0, 0
    while sent < len(stream) or engine.has_unfinished:
        now = clock() - start
        while sent < len(stream) and stream[sent].at_s <= now:
            if is_halved and sent in (first, last):
                engine.set_kv_budget(full // 2 if sent == first else full)
            one = stream[sent]
            engine.add_request(str(sent), one.prompt, sampling(one.max_tokens), arrival_s=start + one.at_s)
            sent += 1
        if not engine.has_unfinished:
            clock.sleep(max(0.0, stream[sent].at_s - now))
            continue
        outputs |= {output.request_id: output for output in engine.step(finished_only=True)}
        steps += 1
        if not steps % SAMPLE_STEPS:
            watch.look(counts=first <= sent < last)
    duration = clock() - start
    return run_of(engine, outputs, watch, slo, duration, range(first, last), stream)


def run_of(
    engine: Engine, outputs: Mapping[str, RequestOutput], watch: Watch, slo: Slo, duration: float,
    middle: range, stream: Sequence[Arrival],
) -> Run:  # fmt: skip
    settle(engine)
    counters = engine.stats().counters()
    held = {name for name, o in outputs.items() if within(o, slo)}
    mean_held, mean_running = watch.mean()
    return Run(
        goodput=len(held) / duration, held=len(held), finished=len(outputs), num_requests=len(stream),
        squeezed_held=len(held & {str(i) for i in middle}), squeezed=len(middle), duration_s=duration,
        ttft_p95_s=float(np.quantile([o.metrics.ttft_s or np.inf for o in outputs.values()], 0.95)),
        tpot_p95_s=float(np.quantile([o.metrics.tpot_s or 0.0 for o in outputs.values()], 0.95)),
        mean_held_bytes=mean_held, mean_running=mean_running,
        preemptions=int(counters["preemptions"]), recomputed_tokens=int(counters["recomputed_tokens"]),
        lowered_requests=sum(o.num_lowered_tokens > 0 for o in outputs.values()),
        dropped_planes=int(counters["dropped_planes"]), restored_planes=int(counters["restored_planes"]),
        lost_planes=int(counters["lost_planes"]), lowered_at_end=int(counters["blocks_lowered"]),
        lowered_again=lowered_again(engine, stream[-ASKED_AGAIN:]),
        bytes_moved=int(counters["plane_bytes_dropped"] + counters["plane_bytes_restored"]),
        peak_arena_bytes=watch.peak_arena, peak_over_budget_bytes=watch.peak_over,
    )  # fmt: skip


def settle(engine: Engine) -> None:
    """Until no more planes come back to an engine that nobody uses."""
    left = -1
    while left != (left := int(engine.stats().counters()["blocks_lowered"])):
        engine.step()


def lowered_again(engine: Engine, stream: Sequence[Arrival]) -> int:
    """Of these requests, sent once more one by one, those that read a token below nominal precision."""
    outputs = [engine.generate([one.prompt], sampling(16))[0] for one in stream]
    return sum(output.num_lowered_tokens > 0 for output in outputs)


def within(output: RequestOutput, slo: Slo) -> bool:
    metrics = output.metrics
    is_timely = metrics.ttft_s is not None and metrics.ttft_s <= slo.ttft_s
    return is_timely and (metrics.tpot_s is None or metrics.tpot_s <= slo.tpot_s)
