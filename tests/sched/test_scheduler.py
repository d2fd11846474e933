"""Scheduler, one behaviour at a time."""

from dataclasses import replace

import numpy as np
import pytest

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.errors import InvariantError, UsageError
from kvtune.sched import Scheduler
from kvtune.sched.preemption import choose_victims, victim_order
from kvtune.sched.sequence import Sequence
from kvtune.sched.step import StepPlan
from kvtune.spec import KVGroup, LayerKind
from kvtune.types import BlockCopy, FinishReason, MissCause, Request, RunnerOutput, Sampled, SamplingParams

FULL = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8)
EOS = 99


class Bench:
    """A scheduler on a clock that counts steps, with a runner that says what it is told."""

    def __init__(self, blocks=64, *, block_size=2, group=FULL, max_model_len=1000, **config):
        config = {"watermark": 0.0, "reserved": 0.0} | config
        self.now = 0.0
        self.manager = KVCacheManager([group], [blocks], block_size=block_size)
        self.scheduler = Scheduler(
            self.manager,
            SchedulerConfig(**config),
            max_model_len=max_model_len,
            eos_token_ids=frozenset([EOS]),
            clock=lambda: self.now,
        )
        self.outputs = []

    def add(self, request_id, prompt, max_tokens=4, **kwargs):
        return self.scheduler.add(self.request(request_id, prompt, max_tokens, **kwargs))

    def request(self, request_id, prompt, max_tokens=4, *, priority=0, arrival_s=0.0, **sampling):
        return Request(
            request_id=request_id,
            prompt_token_ids=np.array(prompt, dtype=np.int32),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
            priority=priority,
            arrival_s=arrival_s,
        )

    def step(self, say=5):
        output = self.scheduler.schedule()
        self.outputs.append(output)
        self.now += 1.0
        sampled = tuple(Sampled(request_id=c.request_id, token_id=say) for c in output.chunks if c.samples)
        updates = self.scheduler.update(output, RunnerOutput(sampled=sampled))
        self.manager.check()
        return output, updates

    def run(self, limit=500):
        while self.scheduler.has_unfinished:
            output, _ = self.step()
            assert output.chunks
            assert len(self.outputs) < limit

    def chunks(self, output):
        return [(c.request_id, c.start, c.num_tokens) for c in output.chunks]


def test_eight_equal_prompts_at_once_cost_one_prefill():
    bench = Bench(block_size=4)
    for i in range(8):
        bench.add(f"r{i}", range(42), max_tokens=1)
    bench.run()
    computed = {f"r{i}": 0 for i in range(8)}
    for output in bench.outputs:
        for chunk in output.chunks:
            computed[chunk.request_id] += chunk.num_tokens
    assert computed == {"r0": 42} | {f"r{i}": 2 for i in range(1, 8)}
    assert bench.scheduler.stats().waited_for_leader == 7


def test_followers_wait_without_blocking_others():
    bench = Bench(max_num_batched_tokens=8)
    bench.add("leader", range(20))
    bench.add("follower", range(20))
    bench.add("other", [50, 51])
    output, _ = bench.step()
    assert bench.chunks(output) == [("leader", 0, 8)]
    bench.scheduler.configure(SchedulerConfig(max_num_batched_tokens=16, watermark=0, reserved=0))
    output, _ = bench.step()
    assert bench.chunks(output) == [("leader", 8, 12), ("other", 0, 2)]
    output, _ = bench.step()
    assert ("follower", 18, 2) in bench.chunks(output)


def test_when_a_leader_is_aborted_the_next_one_takes_over():
    bench = Bench(max_num_batched_tokens=8)
    for name in ("a", "b", "c"):
        bench.add(name, range(20))
    bench.step()
    bench.scheduler.abort("a")
    output, _ = bench.step()
    assert bench.chunks(output) == [("b", 8, 8)]
    assert bench.scheduler.num_waiting == 1


def test_decodes_come_first_and_prefill_fills_the_rest_of_the_budget():
    bench = Bench(max_num_batched_tokens=6)
    bench.add("a", [1, 2, 3])
    bench.step()
    bench.add("b", range(10, 20), priority=1)
    output, _ = bench.step()
    assert bench.chunks(output) == [("a", 3, 1), ("b", 0, 5)]
    assert [c.samples for c in output.chunks] == [True, False]
    output, _ = bench.step()
    assert bench.chunks(output) == [("a", 4, 1), ("b", 5, 5)]
    assert [c.samples for c in output.chunks] == [True, True]


def test_urgent_requests_start_first_and_equals_in_order_of_arrival():
    bench = Bench(max_num_seqs=1)
    bench.add("late", [1], max_tokens=1, arrival_s=2.0)
    bench.add("early", [2], max_tokens=1, arrival_s=1.0)
    bench.add("twin", [3], max_tokens=1, arrival_s=1.0)
    bench.add("urgent", [4], max_tokens=1, arrival_s=3.0, priority=5)
    bench.run()
    order = [chunk.request_id for output in bench.outputs for chunk in output.chunks]
    assert order == ["urgent", "early", "twin", "late"]


def test_only_priority_above_zero_may_use_the_reserved_headroom():
    bench = Bench(blocks=8, reserved=0.5)
    bench.add("first", [1, 2, 3, 4], max_tokens=2)
    bench.step()
    bench.add("plain", [5, 6, 7, 8, 9], max_tokens=2)
    output, _ = bench.step()
    assert [c.request_id for c in output.chunks] == ["first"]
    bench2 = Bench(blocks=8, reserved=0.5)
    bench2.add("first", [1, 2, 3, 4], max_tokens=2)
    bench2.step()
    bench2.add("urgent", [5, 6, 7, 8, 9], max_tokens=2, priority=1)
    output, _ = bench2.step()
    assert {c.request_id for c in output.chunks} == {"first", "urgent"}


def test_admission_is_gated_on_the_whole_prompt_not_on_the_first_chunk():
    bench = Bench(blocks=10, max_num_batched_tokens=4)
    bench.add("a", range(12), max_tokens=1)
    bench.add("b", range(20, 32), max_tokens=1)
    for _ in range(3):
        output, _ = bench.step()
        assert [c.request_id for c in output.chunks] == ["a"]
    bench.run()
    assert bench.scheduler.stats().preemptions == 0


def test_whoever_lacks_room_is_not_overtaken_by_a_smaller_request():
    bench = Bench(blocks=10)
    bench.add("running", range(10), max_tokens=3)
    bench.step()
    bench.add("large", range(20, 34), max_tokens=1)
    bench.add("small", [50], max_tokens=1)
    output, _ = bench.step()
    assert [c.request_id for c in output.chunks] == ["running"]
    bench.run()
    order = [a.request_id for o in bench.outputs for a in o.admitted]
    assert order == ["running", "large", "small"]


def test_the_watermark_keeps_blocks_for_growth():
    bench = Bench(blocks=10, watermark=0.5)
    bench.add("a", [1, 2], max_tokens=3)
    bench.add("b", range(10, 20), max_tokens=3)
    output, _ = bench.step()
    assert [c.request_id for c in output.chunks] == ["a"]
    bench.run()
    assert bench.scheduler.stats().finished == 2


def test_the_least_computed_request_is_preempted_and_continues_where_it_stopped():
    bench = Bench(blocks=10)
    head = bench.add("head", [1, 2], max_tokens=9)
    long = bench.add("long", [3, 4, 5, 6], max_tokens=6)
    short = bench.add("short", [7, 8], max_tokens=6)
    while not any(o.preempted for o in bench.outputs):
        bench.step()
    assert bench.outputs[-1].preempted == ("short",)
    assert short.num_computed_tokens == 0
    kept = short.output_token_ids.tolist()
    assert kept
    bench.run()
    assert [v.num_preemptions for v in (head, long)] == [0, 0]
    assert short.num_output_tokens == 6
    assert short.output_token_ids.tolist()[: len(kept)] == kept
    resumed = [a for o in bench.outputs for a in o.admitted if a.is_resumed]
    assert [a.request_id for a in resumed][:1] == ["short"]


def test_what_preemption_lost_is_counted_as_recomputed():
    bench = Bench(blocks=4)
    bench.add("head", [1, 2], max_tokens=6)
    bench.add("other", [7, 8, 9], max_tokens=4)
    bench.run()
    stats = bench.scheduler.stats()
    resumed = [a for o in bench.outputs for a in o.admitted if a.is_resumed]
    assert stats.preemptions == stats.resumed == len(resumed) >= 1
    lost = sum(a.misses.get(MissCause.PREEMPTED, 0) for a in resumed)
    assert stats.recomputed_tokens == lost > 0
    for admission in resumed:
        assert admission.num_cached_tokens + sum(admission.misses.values()) >= 4


def test_a_request_preempted_too_often_is_preempted_last():
    def sequence(name, computed, preemptions=0, priority=0):
        request = Bench().request(name, [1], priority=priority)
        made = Sequence(request, request.prompt_token_ids, order=computed)
        made.computed(computed)
        made.num_preemptions = preemptions
        return made

    head, tired, fresh = sequence("head", 1), sequence("tired", 2, 3), sequence("fresh", 9)
    leader, low, urgent = sequence("leader", 3), sequence("low", 50, 9, -1), sequence("urgent", 0, 0, 1)
    ordered = victim_order(
        [head, tired, fresh, leader, low, urgent],
        head=head,
        priority=0,
        max_preemptions=3,
        leaders={"leader"},
    )
    assert [s.request_id for s in ordered] == ["low", "fresh", "leader", "tired"]


def test_nobody_is_preempted_for_a_request_that_then_waits():
    a, b, c = "abc"

    class Named:
        def __init__(self, request_id):
            self.request_id = request_id

    first, second, asker = Named(a), Named(b), Named(c)
    assert choose_victims(asker, [first, asker, second], lambda ids: len(ids) == 2) == []
    assert choose_victims(asker, [first, second, asker], lambda ids: len(ids) == 2) == [first, second]
    assert choose_victims(asker, [first, second], lambda ids: False) == []


@pytest.mark.parametrize(
    ("sampling", "says", "reason", "num_output"),
    [
        ({}, EOS, FinishReason.STOP, 1),
        ({"ignore_eos": True}, EOS, FinishReason.LENGTH, 3),
        ({"stop_token_ids": (7,)}, 7, FinishReason.STOP, 1),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS, FinishReason.STOP, 1),
        ({}, 5, FinishReason.LENGTH, 3),
    ],
)
def test_stop_conditions(sampling, says, reason, num_output):
    bench = Bench()
    view = bench.add("a", [1, 2], max_tokens=3, **sampling)
    while bench.scheduler.has_unfinished:
        _, updates = bench.step(says)
    assert (view.finish_reason, view.num_output_tokens) == (reason, num_output)
    assert updates[0].finish_reason is reason


def test_a_sequence_ends_at_the_model_length():
    bench = Bench(max_model_len=5)
    view = bench.add("a", [1, 2, 3], max_tokens=50)
    bench.run()
    assert (view.num_tokens, view.finish_reason) == (5, FinishReason.LENGTH)


def test_abort_works_while_waiting_running_and_between_schedule_and_update():
    bench = Bench(max_num_seqs=2)
    for i, name in enumerate(("a", "b", "waiting")):
        bench.add(name, [i, i])
    output = bench.scheduler.schedule()
    assert bench.scheduler.abort("waiting")
    assert bench.scheduler.abort("a")
    assert not bench.scheduler.abort("a")
    again = bench.add("a", [9, 9])
    sampled = tuple(Sampled(request_id=c.request_id, token_id=1) for c in output.chunks)
    updates = bench.scheduler.update(output, RunnerOutput(sampled=sampled))
    assert [u.request_id for u in updates] == ["b"]
    assert again.num_output_tokens == 0
    bench.run()
    assert bench.scheduler.stats().aborted == 2
    assert bench.manager.usage()[0].referenced == 0


def test_the_caller_may_end_a_request_it_found_a_stop_string_in():
    bench = Bench()
    view = bench.add("a", [1, 2], max_tokens=9)
    bench.step()
    bench.scheduler.finish("a", FinishReason.STOP)
    assert view.finish_reason is FinishReason.STOP
    assert bench.scheduler.sequence("a") is view
    assert not bench.scheduler.has_unfinished


def test_a_fork_continues_from_its_parents_tokens_and_copies_on_write():
    bench = Bench()
    parent = bench.add("parent", [1, 2, 3, 4, 5], max_tokens=4)
    bench.step()
    child = bench.scheduler.fork("parent", bench.request("child", [], max_tokens=3))
    assert child.token_ids.tolist() == parent.token_ids.tolist()
    output, _ = bench.step()
    assert bench.chunks(output) == [("parent", 5, 1), ("child", 5, 1)]
    assert len(output.copies) == 1
    bench.run()
    assert (parent.num_output_tokens, child.num_output_tokens) == (4, 3)


def test_a_fork_without_a_free_seat_waits_and_finds_its_prefix_cached():
    bench = Bench(max_num_seqs=1)
    bench.add("parent", [1, 2, 3, 4, 5], max_tokens=2)
    bench.step()
    child = bench.scheduler.fork("parent", bench.request("child", [], max_tokens=3))
    assert bench.scheduler.num_waiting == 1
    bench.run()
    assert child.num_cached_tokens == 4
    assert child.num_output_tokens == 3


def test_a_fork_in_the_middle_of_a_step_waits_and_starts_from_what_was_there():
    bench = Bench()
    parent = bench.add("parent", [1, 2, 3], max_tokens=3)
    bench.step()
    output = bench.scheduler.schedule()
    child = bench.scheduler.fork("parent", bench.request("child", [], max_tokens=3))
    bench.scheduler.update(output, RunnerOutput(sampled=(Sampled(request_id="parent", token_id=8),)))
    assert (parent.token_ids.tolist(), child.token_ids.tolist()) == ([1, 2, 3, 5, 8], [1, 2, 3, 5])
    bench.run()
    assert child.num_output_tokens == 3


def test_metrics_come_from_the_injected_clock():
    bench = Bench(max_num_batched_tokens=4)
    view = bench.add("a", [1, 2, 3, 4, 5, 6], max_tokens=2)
    bench.run()
    metrics = view.metrics
    assert (metrics.first_scheduled_s, metrics.first_token_s, metrics.finished_s) == (0.0, 2.0, 3.0)
    assert metrics.token_times_s == (2.0, 3.0)
    assert (metrics.ttft_s, metrics.tpot_s) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "empty prompt"),
        ([1] * 40, 4, "shorten the prompt"),
        ([1, 2], 0, "max_tokens must be >= 1"),
        ([1] * 10, 12, "more than the whole KV cache holds; lower max_tokens or raise kv_budget"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(prompt, max_tokens, message):
    bench = Bench(blocks=8, max_model_len=40)
    with pytest.raises(UsageError, match=message):
        bench.add("a", prompt, max_tokens=max_tokens)
    assert not bench.scheduler.has_unfinished


def test_a_request_that_fills_the_whole_cache_is_served_despite_watermark_and_reserve():
    bench = Bench(blocks=4, watermark=0.5, reserved=0.4, max_num_batched_tokens=64)
    view = bench.add("a", range(7), max_tokens=2)
    bench.run()
    assert bench.chunks(bench.outputs[0]) == [("a", 0, 7)]
    assert view.num_output_tokens == 2


def test_a_prompt_longer_than_its_window_pool_runs_in_chunks_that_fit():
    sliding = replace(FULL, kind=LayerKind.SLIDING, window=4)
    bench = Bench(blocks=6, group=sliding, max_num_batched_tokens=64)
    view = bench.add("a", range(40), max_tokens=1)
    bench.run(limit=16)
    assert view.num_output_tokens == 1


def test_a_sequence_taken_out_of_a_step_leaves_neither_tokens_nor_copies():
    request = Bench().request("a", [1, 2])
    plan = StepPlan(budget=10)
    sequence = Sequence(request, request.prompt_token_ids, order=0)
    plan.add(sequence, 2, (BlockCopy(group=0, src=1, dst=2),))
    plan.drop(sequence)
    assert (plan.budget, plan.chunks, plan.copies) == (10, {}, {})


def test_misuse_is_named():
    bench = Bench()
    bench.add("a", [1, 2])
    with pytest.raises(UsageError, match="in use"):
        bench.add("a", [1, 2])
    with pytest.raises(UsageError, match="not known"):
        bench.scheduler.sequence("ghost")
    with pytest.raises(UsageError, match="not live"):
        bench.scheduler.finish("ghost", FinishReason.STOP)
    with pytest.raises(UsageError, match="raise it"):
        bench.step()
        bench.scheduler.fork("a", bench.request("b", [], max_tokens=1))
    output = bench.scheduler.schedule()
    with pytest.raises(InvariantError, match="again before update"):
        bench.scheduler.schedule()
    with pytest.raises(InvariantError, match="no token for request 'a'"):
        bench.scheduler.update(output, RunnerOutput(sampled=()))


def test_the_view_of_tokens_cannot_be_written():
    view = Bench().add("a", [1, 2])
    with pytest.raises(ValueError, match="read-only"):
        view.token_ids[0] = 7


def test_lowering_limits_lets_running_requests_run_on():
    bench = Bench(max_num_seqs=4)
    for name in "abc":
        bench.add(name, [ord(name)], max_tokens=3)
    bench.step()
    bench.scheduler.configure(SchedulerConfig(max_num_seqs=1))
    bench.add("d", [1], max_tokens=1)
    output, _ = bench.step()
    assert [c.request_id for c in output.chunks] == ["a", "b", "c"]
    bench.run()
    assert bench.scheduler.stats().finished == 4
