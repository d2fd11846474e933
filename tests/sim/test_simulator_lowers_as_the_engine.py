"""One brain under memory pressure: planes leave and come back in the simulator as they do in the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sim_case import random_requests, step_clock

from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig
from kvtune.engine import Engine, load_model
from kvtune.sim import Simulation
from kvtune.testing.models import write_model_folder
from kvtune.types import SamplingParams

SCHEDULER = SchedulerConfig(max_num_seqs=12, max_num_batched_tokens=64, restore_blocks_per_step=4)
PARAMS = SamplingParams(temperature=0.0, ignore_eos=True)


def decided(output):
    chunks = tuple((c.request_id, c.start, c.num_tokens, c.num_lowered_blocks) for c in output.chunks)
    return chunks, output.plane_moves, tuple(output.preempted), tuple(a.request_id for a in output.admitted)


def test_planes_move_step_by_step_alike(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loaded = load_model(write_model_folder(tmp_path, "llama", vocab_size=211))
    layers = dict.fromkeys(range(len(loaded.spec.layers)), (1, 1))
    cache = CacheConfig(
        kv_budget="110KiB", k_codec="n8_rh", v_codec="n8_rh", key_centring="off", eviction_policy="lru",
        squeeze_planes=layers, plane_arena="40KiB",
    )  # fmt: skip
    requests = random_requests(np.random.default_rng(4), 60, rate=0.3)
    config = EngineConfig(kernel="torch", max_model_len=256)
    with Engine(loaded, cache=cache, scheduler=SCHEDULER, config=config) as engine:
        found, expected, answers = [], [], {}
        engine.on_step = lambda output: found.append(decided(output))
        now, at = 0, 0
        while at < len(requests) or engine.has_unfinished:
            while at < len(requests) and requests[at].arrival_s <= now:
                one = requests[at]
                params = replace(PARAMS, max_tokens=one.num_output_tokens)
                engine.add_request(
                    one.request_id, one.prompt_token_ids.tolist(), params, arrival_s=one.arrival_s,
                    priority=one.priority,
                )  # fmt: skip
                at += 1
            if not engine.has_unfinished:
                now = int(np.ceil(requests[at].arrival_s))
                continue
            before = len(found)
            answers |= {o.request_id: o.token_ids for o in engine.step(finished_only=True)}
            now += len(found) - before
        stats = engine.stats().cache
        simulation = Simulation(
            loaded.spec, cache=cache, scheduler=SCHEDULER, max_model_len=256, cost=step_clock(),
            fingerprint=engine.fingerprint,
        )  # fmt: skip
        simulation.on_step = lambda output: expected.append(decided(output))
        known = [
            replace(
                r, arrival_s=float(np.ceil(r.arrival_s)), output_token_ids=np.array(answers[r.request_id])
            )
            for r in requests
        ]
        simulation.run(known)
    assert found == expected
    assert min(stats.dropped_planes, stats.restored_planes, stats.lost_planes, stats.lowered_tokens) > 0
