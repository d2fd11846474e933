"""Decoding sequences as columns decide, allocate, publish and end exactly as one by one."""

import numpy as np
import pytest

from kvtune.cache import KVCacheManager
from kvtune.cache.native import cache_library
from kvtune.config import SchedulerConfig
from kvtune.sched import Scheduler
from kvtune.sched.running import RunningSequences
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import Request, RunnerOutput, Sampled, SamplingParams

FULL = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8)
SLIDING = KVGroup(
    index=1, kind=LayerKind.SLIDING, layers=(1,), num_kv_heads=1, k_head_dim=8, v_head_dim=8, window=11
)
EOS = 9


class Service:
    """A scheduler, its clock, and a log of all it says."""

    def __init__(self, groups, blocks, *, block_size, policy, native, **config):
        self.now = 0.0
        self.manager = KVCacheManager(
            groups, [blocks] * len(groups), block_size=block_size, policy=policy, native=native
        )
        self.scheduler = Scheduler(
            self.manager, SchedulerConfig(**config), max_model_len=300, eos_token_ids=frozenset([EOS]),
            clock=lambda: self.now,
        )  # fmt: skip
        self.views = {}
        self.log = []
        self.num_lane_steps = 0

    def add(self, name, prompt, **sampling):
        priority = sampling.pop("priority", 0)
        self.views[name] = self.scheduler.add(
            Request(
                request_id=name, prompt_token_ids=np.array(prompt, dtype=np.int32), arrival_s=self.now,
                priority=priority, sampling=SamplingParams(**sampling),
            )
        )  # fmt: skip

    def step(self, say, *, aborted=(), stopped=()):
        output = self.scheduler.schedule()
        self.num_lane_steps += output.decodes is not None
        for name in aborted:
            self.scheduler.abort(name)
        self.now += 1.0
        sampled = [Sampled(request_id=r, token_id=say(r)) for r in output.sampling_ids]
        if len(self.log) % 3 == 0:
            sampled.reverse()  # a runner may answer in any order
        updates = self.scheduler.update(output, RunnerOutput(sampled=tuple(sampled)))
        told = [(u.request_id, u.new_token_ids, u.finish_reason, u.sequence.num_tokens) for u in updates]
        assert [u.request_id for u in updates.ended] == [name for name, _, reason, _ in told if reason]
        for name in stopped:
            self.scheduler.abort(name)
        self.manager.check()
        decided = [
            (c.request_id, c.start, c.token_ids.tolist(), c.samples, [t.tolist() for t in c.block_tables])
            for c in output.chunks
        ]
        assert output.num_chunks == len(decided)
        assert output.num_tokens == sum(len(tokens) for _, _, tokens, _, _ in decided)
        self.log.append(
            (decided, output.preempted, output.admitted, told, self.scheduler.stats(), self.manager.stats(),
             self.manager.usage())
        )  # fmt: skip


def lives(service, seed):
    """Bursts of requests, some of which share prompts, end early, leave in the middle of a step or later."""
    rng = np.random.default_rng(seed)
    families = [rng.integers(10, 50, 120) for _ in range(3)]
    live = service.scheduler
    for step in range(160):
        if step < 110 and step % 9 == 0:
            for i in range(int(rng.integers(1, 6))):
                prompt = families[int(rng.integers(3))][: int(rng.integers(1, 60))]
                service.add(
                    f"{step}-{i}",
                    prompt,
                    max_tokens=int(rng.integers(1, 60)),
                    ignore_eos=bool(rng.integers(2)),
                    stop_token_ids=(17,) if rng.integers(2) else (),
                    priority=int(rng.integers(-1, 2)),
                )
        tokens = rng.integers(0, 60, 4096)
        leaving = rng.random(2) < 0.06
        names = sorted(name for name, view in service.views.items() if view.finish_reason is None)
        chosen = [names[int(rng.integers(len(names)))]] if names else []
        if not live.has_unfinished:
            continue
        service.step(
            lambda name, tokens=tokens: int(tokens[hash_of(name)]),
            aborted=chosen if leaving[0] else (),
            stopped=[n for n in chosen if service.views[n].finish_reason is None] if leaving[1] else (),
        )
        if step % 40 == 39:
            service.manager.reset_prefix_cache()


def hash_of(name):
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 4096


CASES = [
    ([FULL], 400, 4, {}),
    ([FULL], 60, 4, {"watermark": 0.0}),  # preempts
    ([FULL, SLIDING], 120, 4, {"reserved": 0.1}),
    ([FULL], 200, 1, {"max_num_batched_tokens": 64}),
    ([FULL], 100, 3, {"max_num_batched_tokens": 8}),
]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("policy", ["lru", "guarded"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_service_with_a_lane_does_what_one_without_does(case, policy, native, monkeypatch):
    if native and cache_library() is None:
        pytest.skip("the native pools were not built")
    groups, blocks, block_size, config = CASES[case]

    def run():
        service = Service(groups, blocks, block_size=block_size, policy=policy, native=native, **config)
        lives(service, seed=case)
        return service

    with_lane = run()
    monkeypatch.setattr(RunningSequences, "gather", lambda self, max_tokens: None)
    without = run()
    assert without.num_lane_steps == 0 < with_lane.num_lane_steps
    if case == 1:
        assert without.scheduler.stats().preemptions > 0
    assert len(with_lane.log) == len(without.log) > 60
    for ours, theirs in zip(with_lane.log, without.log, strict=True):
        assert ours == theirs
    for name, view in with_lane.views.items():
        other = without.views[name]
        assert view.token_ids.tolist() == other.token_ids.tolist()
        assert (view.metrics, view.finish_reason) == (other.metrics, other.finish_reason)
        assert view.num_computed_tokens == other.num_computed_tokens


def test_a_view_of_a_sequence_in_the_lane_shows_the_state_of_the_moment():
    service = Service([FULL], 64, block_size=4, policy="lru", native=False)
    service.add("a", range(10, 17), max_tokens=20, ignore_eos=True)
    for i in range(6):
        service.step(lambda name, i=i: 20 + i)
        view = service.views["a"]
        assert view.num_tokens == 7 + i + 1
        assert view.num_computed_tokens == 7 + i
        assert view.output_token_ids.tolist() == list(range(20, 21 + i))
        assert view.metrics.token_times_s == tuple(float(n + 1) for n in range(i + 1))
    assert service.num_lane_steps == 5


def test_what_a_step_decided_stays_as_it_was_when_later_steps_change_blocks():
    service = Service([FULL], 64, block_size=2, policy="lru", native=False)
    for name in ("a", "b"):
        service.add(name, [11, 12, 13], max_tokens=9, ignore_eos=True)
        service.step(lambda name: 5)
    outputs = []
    for _ in range(4):  # both generate the same tokens: the second copy of a full block gives way
        output = service.scheduler.schedule()
        outputs.append(
            (output, [t.copy() for t in output.decodes.block_tables], output.decodes.starts.copy())
        )
        sampled = tuple(Sampled(request_id=r, token_id=5) for r in output.sampling_ids)
        service.scheduler.update(output, RunnerOutput(sampled=sampled))
    assert service.manager.stats().duplicate_blocks > 0
    for output, tables, starts in outputs:
        assert output.decodes.starts.tolist() == starts.tolist()
        for own, kept in zip(output.decodes.block_tables, tables, strict=True):
            assert own.tolist() == kept.tolist()
        assert [c.start for c in output.chunks] == starts.tolist()
