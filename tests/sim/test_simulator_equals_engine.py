"""One brain: the same trace through the engine and through the simulator, arrivals in step numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sim_case import step_clock

from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig
from kvtune.engine import Engine, LoadedModel, load_model
from kvtune.sim import SimRequest, Simulation, of_trace
from kvtune.testing.models import write_model_folder
from kvtune.types import SamplingParams, SchedulerOutput
from kvtune.workload import Workload, WorkloadRequest, materialise

VOCAB = 211
MAX_LEN = 256
NUM_REQUESTS = 300
SCHEDULER = SchedulerConfig(max_num_seqs=12, max_num_batched_tokens=64)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, family: str) -> LoadedModel:
    return load_model(write_model_folder(folder, family, vocab_size=VOCAB, window=40))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Sliding and full layers: two KV groups."""
    return load(tmp_path_factory.mktemp("gemma2"), "gemma2")


def engine_of(loaded: LoadedModel, cache: CacheConfig) -> Engine:
    config = EngineConfig(kernel="torch", max_model_len=MAX_LEN)
    return Engine(loaded, cache=cache, scheduler=SCHEDULER, config=config)


def simulation_of(loaded: LoadedModel, cache: CacheConfig, fingerprint: bytes) -> Simulation:
    return Simulation(
        loaded.spec, cache=cache, scheduler=SCHEDULER, max_model_len=MAX_LEN, cost=step_clock(),
        fingerprint=fingerprint,
    )  # fmt: skip


def decided(output: SchedulerOutput) -> tuple[Any, ...]:
    """A step's decision as plain values: batches with their block ids, hits, miss causes, preemptions."""
    chunks = tuple(
        (c.request_id, c.start, c.num_tokens, c.samples, tuple(tuple(t.tolist()) for t in c.block_tables))
        for c in output.chunks
    )
    admitted = tuple(
        (a.request_id, a.num_cached_tokens, tuple(sorted(a.misses.items())), a.is_resumed)
        for a in output.admitted
    )
    return output.step, chunks, admitted, tuple(output.preempted), tuple(output.copies)


def serve_by_steps(
    engine: Engine, requests: Sequence[SimRequest], params: SamplingParams
) -> tuple[list[Any], dict[str, tuple[int, ...]]]:
    """What the engine decided in each step, with its cache counters after it, and every request's answer."""
    log: list[Any] = []
    answers: dict[str, tuple[int, ...]] = {}
    engine.on_step = lambda output: log.append((decided(output), engine.stats().cache))
    now, at = 0, 0
    while at < len(requests) or engine.has_unfinished:
        while at < len(requests) and requests[at].arrival_s <= now:
            request = requests[at]
            assert request.prompt_token_ids is not None
            engine.add_request(
                request.request_id, request.prompt_token_ids.tolist(),
                replace(params, max_tokens=request.num_output_tokens), arrival_s=request.arrival_s,
                priority=request.priority,
            )  # fmt: skip
            at += 1
        if not engine.has_unfinished:
            now = int(requests[at].arrival_s)
            continue
        before = len(log)
        for output in engine.step(finished_only=True):
            answers[output.request_id] = tuple(output.token_ids)
        now += len(log) - before
    return log, answers


def simulate_by_steps(simulation: Simulation, requests: Sequence[SimRequest]) -> list[Any]:
    log: list[Any] = []
    simulation.on_step = lambda output: log.append((decided(output), simulation.manager.stats()))
    simulation.run(requests)
    return log


def chat_trace(loaded: LoadedModel, seed: int) -> list[SimRequest]:
    """150 sessions of two turns: the second prompt holds the first one, its answer and more."""
    rng = np.random.default_rng(seed)
    num_sessions = NUM_REQUESTS // 2
    system = rng.integers(3, VOCAB, 24)
    firsts = [
        np.concatenate([system, rng.integers(3, VOCAB, rng.integers(2, 60))]) for _ in range(num_sessions)
    ]
    lengths = rng.integers(1, 20, num_sessions)
    greedy = [SamplingParams(max_tokens=int(n), temperature=0.0, ignore_eos=True) for n in lengths]
    with engine_of(loaded, CacheConfig(kv_budget="4MiB")) as engine:
        answers = [o.token_ids for o in engine.generate([p.tolist() for p in firsts], greedy)]
    seconds = [
        np.concatenate([p, a, rng.integers(3, VOCAB, rng.integers(2, 40))])
        for p, a in zip(firsts, answers, strict=True)
    ]
    starts = np.sort(rng.integers(0, 400, num_sessions))
    returns = starts + rng.integers(5, 120, num_sessions)
    rows = [*zip(starts, firsts, lengths, strict=True)]
    rows += [*zip(returns, seconds, rng.integers(1, 20, num_sessions), strict=True)]
    rows.sort(key=lambda row: row[0])
    return [
        SimRequest(
            request_id=f"r{i}", arrival_s=float(arrival), num_prompt_tokens=len(prompt),
            num_output_tokens=int(output), prompt_token_ids=prompt.astype(np.int32),
            priority=int(rng.random() < 0.1),
        )
        for i, (arrival, prompt, output) in enumerate(rows)
    ]  # fmt: skip


def assert_same_steps(found: list[Any], expected: list[Any]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        assert ours == theirs, f"step {step}"
    assert len(found) == len(expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_chat_trace_gives_the_same_batches_hits_evictions_and_preemptions_in_every_step(
    family: str, request: pytest.FixtureRequest
) -> None:
    loaded: LoadedModel = request.getfixturevalue(family)
    trace = chat_trace(loaded, seed=0)
    assert len(trace) == NUM_REQUESTS
    cache = CacheConfig(kv_budget="160KiB", k_codec="fp32", v_codec="fp32")
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    with engine_of(loaded, cache) as engine:
        expected, answers = serve_by_steps(engine, trace, greedy)
        simulation = simulation_of(loaded, cache, engine.fingerprint)
    known = [replace(r, output_token_ids=np.array(answers[r.request_id], dtype=np.int32)) for r in trace]
    assert_same_steps(simulate_by_steps(simulation, known), expected)
    stats, scheduler = simulation.manager.stats(), simulation.scheduler.stats()
    assert min(stats.hit_tokens, stats.evicted_blocks, scheduler.preemptions, scheduler.resumed) > 0


def test_answers_that_end_early_are_simulated_by_their_recorded_lengths(llama: LoadedModel) -> None:
    trace = chat_trace(llama, seed=1)
    cache = CacheConfig(kv_budget="192KiB", k_codec="fp32", v_codec="fp32")
    common = tuple(range(3, VOCAB, 9))  # end tokens are frequent, so that many answers are cut
    params = SamplingParams(temperature=1.0, ignore_eos=True, stop_token_ids=common)
    with engine_of(llama, cache) as engine:
        expected, answers = serve_by_steps(engine, trace, params)
        simulation = simulation_of(llama, cache, engine.fingerprint)
    known = [
        replace(
            r, num_output_tokens=len(answers[r.request_id]),
            output_token_ids=np.array(answers[r.request_id], dtype=np.int32),
        )
        for r in trace
    ]  # fmt: skip
    assert sum(len(answers[r.request_id]) < r.num_output_tokens for r in trace) > NUM_REQUESTS // 4
    assert_same_steps(simulate_by_steps(simulation, known), expected)


def test_a_trace_of_block_hashes_needs_no_tokens(llama: LoadedModel) -> None:
    rng = np.random.default_rng(2)
    paths = [[0]]
    next_id = 1
    requests: list[WorkloadRequest] = []
    for i, arrival in enumerate(np.sort(rng.integers(0, 500, NUM_REQUESTS))):
        path = list(paths[int(rng.integers(0, len(paths)))])[:8]
        for _ in range(int(rng.integers(1, 3))):
            path.append(next_id)
            next_id += 1
        paths.append(path)
        requests.append(
            WorkloadRequest(
                request_id=f"r{i}",
                arrival_s=float(arrival),
                hash_ids=tuple(path),
                input_length=16 * len(path) - int(rng.integers(0, 16)),
                output_length=int(rng.integers(1, 20)),
            )
        )
    workload = Workload(requests=tuple(requests), format="test", is_synthetic_text=True, block_size=16)
    made = materialise(workload, vocab_size=VOCAB, max_model_len=MAX_LEN)
    sampled = SamplingParams(temperature=1.0, ignore_eos=True)  # greedy answers to equal prompts are equal
    cache = CacheConfig(kv_budget="256KiB", k_codec="fp32", v_codec="fp32")
    tokens = [
        SimRequest(
            request_id=r.request_id, arrival_s=r.arrival_s, num_prompt_tokens=len(r.prompt_token_ids),
            num_output_tokens=r.max_tokens, prompt_token_ids=np.array(r.prompt_token_ids, dtype=np.int32),
        )
        for r in made.requests
    ]  # fmt: skip
    with engine_of(llama, cache) as engine:
        expected, _ = serve_by_steps(engine, tokens, sampled)
    named = of_trace(workload, block_size=16, max_model_len=MAX_LEN)
    simulation = simulation_of(llama, cache, b"")
    assert_same_steps(simulate_by_steps(simulation, named.requests), expected)
    assert simulation.manager.stats().hit_tokens > 0
    assert simulation.manager.stats().evicted_blocks > 0
