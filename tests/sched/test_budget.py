"""How prefills share a step with decodes and with each other."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.sched import Scheduler
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import Request, RunnerOutput, Sampled, SamplingParams, SchedulerOutput

FULL = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=16, v_head_dim=16)


class Bench:
    def __init__(self, **config: int) -> None:
        manager = KVCacheManager([FULL], [512], block_size=4, enable_prefix_caching=False)
        settings = SchedulerConfig.from_dict({"watermark": 0.0, "reserved": 0.0, **config})
        self.scheduler = Scheduler(manager, settings, max_model_len=4096, clock=lambda: 0.0)
        self._now = 0

    def add(self, name: str, num_prompt_tokens: int, *, max_tokens: int = 8) -> None:
        self._now += 1
        self.scheduler.add(
            Request(
                request_id=name,
                prompt_token_ids=np.arange(num_prompt_tokens, dtype=np.int32),
                sampling=SamplingParams(max_tokens=max_tokens),
                arrival_s=float(self._now),
            )
        )

    def step(self) -> list[tuple[str, int]]:
        output: SchedulerOutput = self.scheduler.schedule()
        sampled = tuple(Sampled(request_id=c.request_id, token_id=7) for c in output.chunks if c.samples)
        self.scheduler.update(output, RunnerOutput(sampled=sampled))
        return [(c.request_id, c.num_tokens) for c in output.chunks]


def names(prefix: str, count: int) -> Iterable[str]:
    return (f"{prefix}{i}" for i in range(count))


def test_short_prompts_share_one_step_while_nobody_decodes():
    bench = Bench(max_num_batched_tokens=100, max_prefill_chunk=20)
    for name in names("r", 6):
        bench.add(name, 15)
    assert bench.step() == [(name, 15) for name in names("r", 6)]
    assert bench.step() == [(name, 1) for name in names("r", 6)]


def test_a_long_prompt_goes_by_chunks_and_nobody_behind_it_delays_it():
    bench = Bench(max_num_batched_tokens=100, max_prefill_chunk=20)
    bench.add("long", 50)
    bench.add("behind", 15)
    assert bench.step() == [("long", 20)]
    assert bench.step() == [("long", 20)]
    assert bench.step() == [("long", 10), ("behind", 15)]


def test_a_prompt_that_does_not_fit_fills_a_chunk_at_most():
    bench = Bench(max_num_batched_tokens=100, max_prefill_chunk=20)
    bench.add("a", 15)
    bench.add("long", 50)
    bench.add("behind", 2)
    assert bench.step() == [("a", 15), ("long", 5)]
    bench = Bench(max_num_batched_tokens=100, max_prefill_chunk=20)
    bench.add("a", 15)
    bench.add("b", 15)
    bench.add("long", 50)
    bench.add("behind", 2)
    assert bench.step() == [("a", 15), ("b", 15)], "a chunk is full: the long one begins the next step"


def test_beside_decodes_prefills_share_few_tokens():
    bench = Bench(max_num_batched_tokens=100, max_prefill_chunk=20, max_prefill_beside_decodes=6)
    bench.add("a", 15)
    bench.step()
    bench.add("b", 9)
    bench.add("c", 4)
    assert bench.step() == [("a", 1), ("b", 6)]
    assert bench.step() == [("a", 1), ("b", 3), ("c", 3)]
    assert bench.step() == [("a", 1), ("b", 1), ("c", 1)]


def test_decodes_are_not_limited_by_what_prefills_may_take():
    bench = Bench(max_num_batched_tokens=100, max_prefill_beside_decodes=2)
    for name in names("r", 5):
        bench.add(name, 3)
    bench.step()
    bench.add("late", 4)
    assert bench.step() == [(name, 1) for name in names("r", 5)] + [("late", 2)]


def test_the_budget_of_a_step_holds_decodes_and_prefills():
    bench = Bench(max_num_batched_tokens=6, max_prefill_beside_decodes=5)
    for name in names("r", 2):
        bench.add(name, 3)
    bench.step()
    bench.add("late", 9)
    assert bench.step() == [("r0", 1), ("r1", 1), ("late", 4)]


def test_settings_of_prefill_change_between_steps():
    bench = Bench(max_prefill_beside_decodes=2)
    bench.add("a", 3)
    bench.step()
    bench.add("b", 40)
    assert bench.step() == [("a", 1), ("b", 2)]
    bench.scheduler.configure(SchedulerConfig(max_prefill_beside_decodes=30, watermark=0, reserved=0))
    assert bench.step() == [("a", 1), ("b", 30)]


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_every_prompt_is_computed_whatever_the_limits(tokens: int):
    bench = Bench(max_num_batched_tokens=16, max_prefill_chunk=tokens, max_prefill_beside_decodes=tokens)
    rng = np.random.default_rng(tokens)
    lengths = {name: int(rng.integers(1, 60)) for name in names("r", 12)}
    for name, length in lengths.items():
        bench.add(name, length, max_tokens=3)
    computed = dict.fromkeys(lengths, 0)
    while bench.scheduler.has_unfinished:
        chunks = bench.step()
        assert chunks
        assert sum(n for _, n in chunks) <= 16
        for name, count in chunks:
            assert count <= tokens
            computed[name] += count
    assert computed == {name: length + 2 for name, length in lengths.items()}
