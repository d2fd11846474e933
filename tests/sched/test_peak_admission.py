"""Admission by the expected peak of the batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.errors import UsageError
from kvtune.predict import LengthPredictor
from kvtune.sched import Scheduler
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import Request, RunnerOutput, Sampled, SamplingParams

FULL = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8)
SLIDING = KVGroup(
    index=1, kind=LayerKind.SLIDING, layers=(1,), num_kv_heads=1, k_head_dim=8, v_head_dim=8, window=8
)
EOS = 99


class Service:
    """Requests whose true length only the runner knows; one step takes one unit of time."""

    def __init__(self, blocks, *, block_size=4, groups=(FULL,), lengths=None, **config):
        config = {
            "watermark": 0.0,
            "reserved": 0.0,
            "admission": "peak",
            "max_num_batched_tokens": 4096,
        } | config
        self.manager = KVCacheManager(
            list(groups), [blocks] * len(groups), block_size=block_size, enable_prefix_caching=True
        )
        self.now = 0.0
        self.scheduler = Scheduler(
            self.manager, SchedulerConfig(**config), max_model_len=10_000,
            eos_token_ids=frozenset([EOS]), clock=lambda: self.now, lengths=lengths,
        )  # fmt: skip
        self.left: dict[str, int] = {}
        self.most_running = 0

    def add(self, name, prompt, length, *, max_tokens=None, tenant=""):
        """`max_tokens=None`: the client fixed the length and ignores the end of text."""
        self.left[name] = length
        self.scheduler.add(
            Request(
                request_id=name, prompt_token_ids=np.asarray(prompt, dtype=np.int32), tenant=tenant,
                sampling=SamplingParams(max_tokens=max_tokens or length, ignore_eos=max_tokens is None),
            )
        )  # fmt: skip

    def run(self):
        while self.scheduler.has_unfinished:
            output = self.scheduler.schedule()
            assert output.chunks
            self.now += 1.0
            self.most_running = max(self.most_running, self.scheduler.num_running)
            sampled = []
            for chunk in output.chunks:
                if chunk.samples:
                    self.left[chunk.request_id] -= 1
                    token = EOS if not self.left[chunk.request_id] else 5
                    sampled.append(Sampled(request_id=chunk.request_id, token_id=token))
            self.scheduler.update(output, RunnerOutput(sampled=tuple(sampled)))
        self.manager.check()
        return self.scheduler.stats()


def prompt(index, length):
    """Tokens no other request begins with."""
    return [100 + index, *range(length - 1)]


Requests = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=2, max_size=12)


@settings(max_examples=30, deadline=None)
@given(Requests, st.sampled_from([(FULL,), (FULL, SLIDING)]))
def test_with_known_lengths_nobody_is_ever_preempted(drawn, groups):
    service = Service(30, groups=groups)
    for index, (num_prompt, length) in enumerate(drawn):
        service.add(f"r{index}", prompt(index, num_prompt), length)
    stats = service.run()
    assert stats.preemptions == 0
    assert stats.finished == len(drawn)


def test_without_the_forecast_the_same_load_preempts():
    service = Service(30, admission="watermark")
    for index in range(8):
        service.add(f"r{index}", prompt(index, 12), 60)
    assert service.run().preemptions > 0


def test_short_known_outputs_may_use_the_whole_cache():
    service = Service(32)
    for index in range(8):
        service.add(f"r{index}", prompt(index, 12), 4)  # 12 + 4 - 1 tokens: 4 blocks each
    service.run()
    assert service.most_running == 8


def test_a_prefix_that_many_share_is_counted_once():
    service = Service(24)
    for index in range(6):
        service.add(f"r{index}", [7] * 40 + [index], 6)  # 10 shared blocks and two of its own each
    stats = service.run()
    assert service.most_running == 6
    assert stats.preemptions == 0


def serve_in_turn(service, lengths, *, start=0, prompt_tokens=8, tenants=()):
    for index, length in enumerate(lengths, start=start):
        tenant = tenants[index % len(tenants)] if tenants else ""
        service.add(f"r{index}", prompt(index, prompt_tokens), length, max_tokens=110, tenant=tenant)
    return service.run()


def test_lengths_are_learned_and_keep_the_batch_within_the_cache():
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(20, 60, 250)]

    def preempted(**config):
        service = Service(120, **config)
        serve_in_turn(service, lengths[:100])
        before = service.scheduler.stats().preemptions
        return serve_in_turn(service, lengths[100:], start=100).preemptions - before

    assert preempted(admission_z=2.0) < 0.1 * preempted(admission="watermark")


def test_before_anything_was_learned_the_watermark_alone_decides():
    service, plain = Service(40), Service(40, admission="watermark")
    for each in (service, plain):
        serve_in_turn(each, [30] * 10)
    assert service.most_running == plain.most_running


def test_who_asks_decides_how_many_run_at_once():
    rng = np.random.default_rng(1)

    def most_running(tenant):
        service = Service(100, lengths=LengthPredictor(), admission_z=2.0)
        for index in range(300):
            is_long = rng.random() < 0.5
            service.add(
                f"w{index}", prompt(index, 8), int(rng.integers(90, 110) if is_long else rng.integers(2, 6)),
                max_tokens=110, tenant="long" if is_long else "short",
            )  # fmt: skip
        service.run()
        service.most_running = 0
        for index in range(40):
            service.add(f"t{index}", prompt(1000 + index, 8), 5, max_tokens=110, tenant=tenant)
        service.run()
        return service.most_running

    assert most_running("short") >= 2 * most_running("long")


def test_a_request_alone_always_starts():
    service = Service(30, lengths=LengthPredictor(min_observations=1))
    serve_in_turn(service, [100] * 3)
    assert service.scheduler.stats().finished == 3


def test_an_unknown_admission_is_refused_by_name():
    with pytest.raises(UsageError, match="admission must be watermark or peak, found 'always'"):
        SchedulerConfig(admission="always")


def test_a_client_that_leaves_before_its_first_token_teaches_nothing():
    lengths = LengthPredictor()
    service = Service(30, lengths=lengths)
    service.add("gone", prompt(0, 8), 5, max_tokens=50)
    service.scheduler.abort("gone")
    assert lengths.num_observed == 0


def test_peak_can_be_turned_on_while_requests_run():
    service = Service(30, admission="watermark")
    for index in range(8):
        service.add(f"r{index}", prompt(index, 12), 60)
    service.scheduler.update(service.scheduler.schedule(), RunnerOutput(sampled=sampled_by(service)))
    service.scheduler.configure(
        SchedulerConfig(watermark=0.0, reserved=0.0, admission="peak", max_num_batched_tokens=4096)
    )
    assert service.run().finished == 8


def sampled_by(service):
    """Tokens of the step just scheduled, for every request that samples in it."""
    running = [name for name in service.left if service.scheduler.sequence(name).status == "running"]
    for name in running:
        service.left[name] -= 1
    return tuple(Sampled(request_id=name, token_id=5) for name in running)


def test_a_fork_is_foreseen_like_its_parent():
    service = Service(40)
    service.add("parent", prompt(0, 16), 20)
    service.scheduler.update(service.scheduler.schedule(), RunnerOutput(sampled=sampled_by(service)))
    child = Request(
        request_id="child",
        prompt_token_ids=np.array([1], dtype=np.int32),
        sampling=SamplingParams(max_tokens=20, ignore_eos=True),
    )
    service.scheduler.fork("parent", child)
    service.left["child"] = 19
    for index in range(4):
        service.add(f"r{index}", prompt(1 + index, 12), 30)
    stats = service.run()
    assert stats.finished == 6
    assert stats.preemptions == 0


def test_headroom_is_kept_from_all_but_urgent_requests():
    def starts_beside_another(priority):
        service = Service(20, reserved=0.3)
        service.add("first", prompt(0, 8), 25)  # 32 tokens at its end: 8 blocks
        service.scheduler.update(service.scheduler.schedule(), RunnerOutput(sampled=sampled_by(service)))
        service.left["second"] = 25
        service.scheduler.add(
            Request(
                request_id="second",
                prompt_token_ids=np.array(prompt(1, 8), dtype=np.int32),
                sampling=SamplingParams(max_tokens=25, ignore_eos=True),
                priority=priority,
            )
        )
        service.scheduler.schedule()
        return service.scheduler.num_running == 2

    assert not starts_beside_another(0)  # 16 blocks expected, 14 allowed
    assert starts_beside_another(1)
