"""Random traffic over the scheduler with tiny pools: right tokens, no lost request, no livelock.

The runner is fake and honest: it reads every visible slot through the block tables (a wrong slot is
an assertion), and samples a token that is a function of the whole prefix and the output index, so
that a preempted, resumed or forked request must end with exactly the tokens of an undisturbed one.
"""

import zlib

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.errors import UsageError
from kvtune.sched import Scheduler
from kvtune.spec import KVGroup, LayerKind
from kvtune.testing.memory import PrefixMemory
from kvtune.types import FinishReason, Request, RunnerOutput, Sampled, SamplingParams

BLOCK, WINDOW, MAX_LEN, EOS = 2, 5, 14, 7
FULL = KVGroup(index=0, kind=LayerKind.FULL, layers=(0,), num_kv_heads=1, k_head_dim=8, v_head_dim=8)
SLIDING = KVGroup(
    index=1, kind=LayerKind.SLIDING, layers=(1,), num_kv_heads=1, k_head_dim=8, v_head_dim=8, window=WINDOW
)
FAMILIES = ([0] * 11, [0, 1] * 6, [1] * 5 + [0] * 6)
CONFIGS = st.builds(
    SchedulerConfig,
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.sampled_from([1, 3, 8, 32]),
    watermark=st.sampled_from([0.0, 0.2]),
    reserved=st.sampled_from([0.0, 0.2]),
    max_preemptions=st.integers(0, 2),
)


def next_token(request_id, prefix, index):
    """What the fake model says after `prefix`, for the request's own random stream."""
    value = zlib.crc32(repr((request_id, tuple(prefix), index)).encode())
    return EOS if value % 11 == 0 else value % 2


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.tuples(st.integers(4, 8), st.integers(4, 8)), first=st.sampled_from([0, 2]), config=CONFIGS
    )
    def build(self, blocks, first, config):
        self.now = 0.0
        self.manager = KVCacheManager(
            [FULL, SLIDING], blocks, block_size=BLOCK, num_first_blocks=[first, first]
        )
        self.memory = PrefixMemory([None, WINDOW], BLOCK)
        self.scheduler = Scheduler(
            self.manager,
            config,
            max_model_len=MAX_LEN,
            eos_token_ids=frozenset([EOS]),
            clock=lambda: self.now,
        )
        self.count = 0
        self.live = {}  # id -> view
        self.finished = {}

    def request(self, prompt, max_tokens, priority, salt):
        self.count += 1
        return Request(
            request_id=f"r{self.count}",
            prompt_token_ids=np.array(prompt, dtype=np.int32),
            sampling=SamplingParams(max_tokens=max_tokens),
            arrival_s=self.now,
            priority=priority,
            cache_salt=salt,
        )

    @rule(
        family=st.sampled_from(FAMILIES),
        length=st.integers(1, 11),
        max_tokens=st.integers(1, 6),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from(["", "", "", "tenant"]),
    )
    def add(self, family, length, max_tokens, priority, salt):
        request = self.request(family[:length], max_tokens, priority, salt)
        longest = min(length + max_tokens, MAX_LEN) - 1
        try:
            self.live[request.request_id] = self.scheduler.add(request)
        except UsageError:
            assert not self.manager.fits(longest)
        else:
            assert self.manager.fits(longest)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), max_tokens=st.integers(1, 6))
    def fork(self, data, max_tokens):
        self.fork_from(data.draw(st.sampled_from(sorted(self.live))), max_tokens)

    def fork_from(self, parent_id, max_tokens):
        parent = self.live[parent_id]
        child = self.request([], max_tokens, parent.request.priority, parent.request.cache_salt)
        try:
            view = self.scheduler.fork(parent.request_id, child)
        except UsageError:
            return
        assert view.token_ids.tolist() == parent.token_ids.tolist()
        self.live[child.request_id] = view
        self.forked_at = getattr(self, "forked_at", {}) | {child.request_id: parent.num_output_tokens}

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(request_id)
        assert not self.scheduler.abort(request_id)
        assert self.live.pop(request_id).finish_reason is FinishReason.ABORT

    @rule(config=CONFIGS)
    def configure(self, config):
        self.scheduler.configure(config)

    @rule(
        data=st.data(), num_aborts=st.sampled_from([0, 0, 0, 1]), forks=st.sampled_from([False, False, True])
    )
    def step(self, data, num_aborts, forks):
        output = self.scheduler.schedule()
        assert output.chunks or not self.live
        self.check_output(output)
        sampled = self.run(output)
        if forks and self.live:
            self.fork_from(data.draw(st.sampled_from(sorted(self.live))), 6)
        for _ in range(min(num_aborts, len(self.live))):
            self.abort_between(data.draw(st.sampled_from(sorted(self.live))))
        self.take(self.scheduler.update(output, RunnerOutput(sampled=tuple(sampled))))

    def abort_between(self, request_id):
        assert self.scheduler.abort(request_id)
        del self.live[request_id]

    def check_output(self, output):
        ids = [chunk.request_id for chunk in output.chunks]
        assert len(ids) == len(set(ids))
        assert not set(ids) & set(output.preempted)
        assert not (output.preempted and output.admitted)
        for item in output.copies:
            assert any(item.dst in chunk.block_tables[item.group] for chunk in output.chunks)
        for admission in output.admitted:
            view = self.live[admission.request_id]
            assert admission.num_cached_tokens + sum(admission.misses.values()) == view.num_tokens
            assert admission.is_resumed == (view.num_preemptions > 0)

    def run(self, output):
        """Copies first, then write and read every scheduled position."""
        self.now += 1.0
        self.memory.copy(output.copies)
        sampled = []
        for chunk in output.chunks:
            view = self.live[chunk.request_id]
            tokens, end = view.token_ids.tolist(), chunk.start + chunk.num_tokens
            assert chunk.token_ids.tolist() == tokens[chunk.start : end]
            assert chunk.samples == (end == len(tokens))
            self.memory.write(chunk.block_tables, tokens, chunk.start, end, salt=view.request.cache_salt)
            if chunk.samples:
                token_id = next_token(chunk.request_id, tokens, view.num_output_tokens)
                sampled.append(Sampled(request_id=chunk.request_id, token_id=token_id))
        return sampled

    def take(self, updates):
        for update in updates:
            assert update.sequence.output_token_ids[-1] == update.new_token_ids[0]
            if update.finish_reason is not None:
                view = self.live.pop(update.request_id)
                assert self.scheduler.sequence(update.request_id) is view
                self.check_finished(view)

    def check_finished(self, view):
        """The output is the one an undisturbed run gives, and it ended for the right reason."""
        tokens = view.prompt_token_ids.tolist()
        inherited = getattr(self, "forked_at", {}).get(view.request_id, 0)
        output = view.output_token_ids.tolist()
        tokens += output[:inherited]
        for index, token in enumerate(output[inherited:], start=inherited):
            assert token == next_token(view.request_id, tokens, index)
            tokens.append(token)
        is_stop = output[-1] == EOS
        assert view.finish_reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH)
        assert is_stop or len(output) == view.sampling.max_tokens or view.num_tokens == MAX_LEN
        metrics = view.metrics
        assert len(metrics.token_times_s) == len(output) - inherited
        assert metrics.arrival_s <= metrics.first_scheduled_s <= metrics.first_token_s <= metrics.finished_s

    @invariant()
    def holds(self):
        if hasattr(self, "scheduler"):
            self.manager.check()
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
            assert self.scheduler.has_unfinished == bool(self.live)

    def teardown(self):
        """Whatever is left is served in bounded time, and then no block is referenced."""
        if not hasattr(self, "scheduler"):
            return
        bound = 4 + sum(4 * MAX_LEN * MAX_LEN for _ in self.live)
        for _ in range(bound):
            if not self.live:
                break
            output = self.scheduler.schedule()
            assert output.chunks, "requests are left, yet nothing runs"
            self.check_output(output)
            self.take(self.scheduler.update(output, RunnerOutput(sampled=tuple(self.run(output)))))
            self.holds()
        assert not self.live, f"livelock: {sorted(self.live)} not served after {bound} steps"
        assert all(usage.referenced == 0 for usage in self.manager.usage())


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
