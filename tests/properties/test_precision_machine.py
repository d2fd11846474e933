"""Random traffic under a budget that comes and goes: who reads what, how precisely, and what is published.

The memory is fake and honest: a slot holds the prefix it stands for, who wrote it, and whether everything
it was computed from was read at full precision; a low plane holds the same in its row or in the host arena.
"""

import zlib
from collections import Counter
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtune.cache import KVCacheManager
from kvtune.config import SchedulerConfig
from kvtune.errors import UsageError
from kvtune.sched import Scheduler
from kvtune.spec import KVGroup, LayerKind, PoolBudget
from kvtune.types import MissCause, PlaneCause, PlaneVerb, Request, RunnerOutput, Sampled, SamplingParams

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
    restore_blocks_per_step=st.sampled_from([1, 3, 64]),
)


@dataclass(frozen=True)
class Slot:
    prefix: tuple
    writer: str
    is_nominal: bool


class PlaneMemory:
    """High planes by block, low planes by row, and what rests in the host arena."""

    def __init__(self, manager):
        self.manager = manager
        self.high, self.low, self.host = {}, {}, {}

    def rows(self, g):
        return self.manager.precision.rows_of(g)

    def perform(self, moves):
        for move in moves:
            g, key = move.group, (move.group, move.block)
            if move.verb is PlaneVerb.DROP:
                assert key not in self.host
                self.host[key] = [self.low.get((g, move.row, o)) for o in range(BLOCK)]
                assert None not in self.host[key], "a plane was dropped before its block was full"
            elif move.verb is PlaneVerb.RESTORE:
                for o, slot in enumerate(self.host.pop(key)):
                    self.low[g, move.row, o] = slot
            else:
                del self.host[key]

    def copy(self, copies):
        for item in copies:
            for o in range(BLOCK):
                slot = self.high.get((item.group, item.src, o))
                if slot is None:
                    continue
                self.high[item.group, item.dst, o] = slot
                if item.dst_row >= 0:
                    self.low[item.group, item.dst_row, o] = self.low[item.group, item.src_row, o]

    def read(self, chunk, tokens, salt, family):
        """Whether everything the chunk's first query sees is nominal; right content, or an assertion."""
        is_nominal, lowered = True, 0
        for g, table in enumerate(chunk.block_tables):
            window = (None, WINDOW)[g]
            first = 0 if window is None else max(0, chunk.start - window + 1)
            rows = self.rows(g)
            lowered += sum(rows is not None and 0 <= b < len(rows) and rows[b] < 0 for b in table.tolist())
            for position in range(first, chunk.start):
                block, o = int(table[position // BLOCK]), position % BLOCK
                slot = self.high[g, block, o]
                assert slot.prefix == (salt, *tokens[: position + 1])
                assert slot.is_nominal or slot.writer in family, "what one request computed leaked"
                has_row = rows is None or block >= len(rows) or rows[block] >= 0
                if has_row and rows is not None and block < len(rows):
                    assert self.low[g, int(rows[block]), o] == slot, "a low plane is not its block's"
                is_nominal &= slot.is_nominal and has_row
        assert lowered == chunk.num_lowered_blocks
        return is_nominal and not lowered

    def write(self, chunk, tokens, salt, is_nominal):
        for g, table in enumerate(chunk.block_tables):
            rows = self.rows(g)
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                block, o = int(table[position // BLOCK]), position % BLOCK
                slot = Slot((salt, *tokens[: position + 1]), chunk.request_id, is_nominal)
                self.high[g, block, o] = slot
                if rows is not None and block < len(rows):
                    assert rows[block] >= 0, "a block is written without its low plane"
                    self.low[g, int(rows[block]), o] = slot

    def check_published(self):
        for g, group in enumerate(self.manager._groups):
            rows = self.rows(g)
            for _, block in group.index.items():
                high = [self.high[g, block, o] for o in range(BLOCK)]
                assert all(slot.is_nominal for slot in high), "below full precision, yet published"
                if rows is None or block >= len(rows):
                    continue
                row = int(rows[block])
                low = [self.low[g, row, o] for o in range(BLOCK)] if row >= 0 else self.host[g, block]
                assert low == high


class PrecisionMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(5, 9),
        first=st.sampled_from([0, 0, 2]),
        resting=st.sampled_from([0, 2, 100]),
        prices=st.sampled_from([(5, 4), (10, 1), (3, 3)]),
        both=st.booleans(),
        config=CONFIGS,
    )
    def build(self, blocks, first, resting, prices, both, config):
        self.now = 0.0
        block, plane = prices
        nested = PoolBudget(total=blocks * (block + plane), block=block, plane=plane)
        self.most = (nested, nested if both else PoolBudget(total=blocks))
        self.budgets = self.most
        self.manager = KVCacheManager(
            [FULL, SLIDING],
            [b.num_ids for b in self.most],
            block_size=BLOCK,
            num_first_blocks=[first, first],
            budgets=self.most,
            num_resting=[resting, resting],
        )
        self.memory = PlaneMemory(self.manager)
        self.scheduler = Scheduler(
            self.manager,
            config,
            max_model_len=MAX_LEN,
            eos_token_ids=frozenset([EOS]),
            clock=lambda: self.now,
        )
        self.count = 0
        self.live, self.families = {}, {}

    def request(self, prompt, max_tokens, priority=0, salt=""):
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
        try:
            self.live[request.request_id] = self.scheduler.add(request)
        except UsageError:
            assert not self.manager.fits(min(length + max_tokens, MAX_LEN) - 1)
        else:
            self.families[request.request_id] = {request.request_id}

    @precondition(lambda self: self.live)
    @rule(data=st.data(), max_tokens=st.integers(1, 6))
    def fork(self, data, max_tokens):
        parent = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        child = self.request([], max_tokens, parent.request.priority, parent.request.cache_salt)
        try:
            self.live[child.request_id] = self.scheduler.fork(parent.request_id, child)
        except UsageError:
            return
        self.families[child.request_id] = {child.request_id, *self.families[parent.request_id]}

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(request_id)
        del self.live[request_id]

    @rule(config=CONFIGS)
    def configure(self, config):
        self.scheduler.configure(config)

    @rule(share=st.sampled_from([0.2, 0.4, 0.5, 0.6, 0.8, 1.0, 1.0]))
    def squeeze(self, share):
        budgets = tuple(replace(b, total=max(b.whole, int(share * b.total))) for b in self.most)
        before = (self.manager.usage(), self.manager.stats(), self.scheduler.num_running)
        try:
            output = self.scheduler.set_budgets(budgets)
        except UsageError:
            assert (self.manager.usage(), self.manager.stats(), self.scheduler.num_running) == before
            return
        self.budgets = budgets
        assert not output.chunks and not output.copies
        self.memory.perform(output.plane_moves)
        for request_id in output.preempted:
            assert self.live[request_id].num_computed_tokens == 0

    @rule(num_aborts=st.sampled_from([0, 0, 0, 1]))
    def step(self, num_aborts):
        self.run(num_aborts)

    def run(self, num_aborts=0):
        output = self.scheduler.schedule()
        self.now += 1.0
        self.memory.perform(output.plane_moves)
        self.memory.copy(output.copies)
        sampled = []
        verdicts = {}
        for chunk in output.chunks:  # everybody reads and writes in one step: reads first
            view = self.live[chunk.request_id]
            tokens, salt = view.token_ids.tolist(), view.request.cache_salt
            family = self.families[chunk.request_id]
            verdicts[chunk.request_id] = self.memory.read(chunk, tokens, salt, family)
        for chunk in output.chunks:
            view = self.live[chunk.request_id]
            tokens = view.token_ids.tolist()
            self.memory.write(chunk, tokens, view.request.cache_salt, verdicts[chunk.request_id])
            if chunk.samples:
                seed = repr((chunk.request_id, tuple(tokens), view.num_output_tokens))
                value = zlib.crc32(seed.encode())
                token_id = EOS if value % 11 == 0 else value % 2
                sampled.append(Sampled(request_id=chunk.request_id, token_id=token_id))
        for request_id in sorted(self.live)[:num_aborts]:
            self.scheduler.abort(request_id)
            del self.live[request_id]
        for update in self.scheduler.update(output, RunnerOutput(sampled=tuple(sampled))):
            if update.finish_reason is not None:
                del self.live[update.request_id]
        return output

    @invariant()
    def holds(self):
        if not hasattr(self, "scheduler"):
            return
        self.manager.check()
        self.memory.check_published()
        for group, budget in zip(self.manager._groups, self.budgets, strict=True):
            assert group.pool.spent <= budget.total
        stats = self.manager.stats()
        assert stats.restored_planes <= stats.dropped_planes
        assert sum(stats.moved_planes.values()) >= stats.dropped_planes + stats.restored_planes

    def teardown(self):
        """Whoever is left is served in bounded time; relieved, everything is at full precision again."""
        if not hasattr(self, "scheduler"):
            return
        bound = 8 + sum(8 * MAX_LEN * MAX_LEN for _ in self.live)
        for _ in range(bound):
            if not self.live:
                break
            self.run()
            self.holds()
        assert not self.live, f"livelock: {sorted(self.live)} not served after {bound} steps"
        self.memory.perform(self.scheduler.set_budgets(self.most).plane_moves)
        self.scheduler.configure(SchedulerConfig(watermark=0.0, reserved=0.0))
        self.run()
        for group in self.manager._groups:
            planes = group.pool.planes
            room = group.pool.budget.total - group.pool.spent
            assert planes is None or not planes.resting or room < group.pool.budget.plane
        assert all(usage.referenced == 0 for usage in self.manager.usage())


PrecisionMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestPrecisionMachine = PrecisionMachine.TestCase


def test_a_long_random_life_drops_restores_loses_and_preempts():
    rng = np.random.default_rng(5)
    total = Counter()
    for resting in (100, 100, 2, 0):
        machine = PrecisionMachine()
        config = SchedulerConfig(watermark=0.0, reserved=0.0, max_num_batched_tokens=8, max_num_seqs=5)
        machine.build(
            blocks=7, first=0, resting=resting, prices=(5, 4), both=True,
            config=replace(config, restore_blocks_per_step=1),
        )  # fmt: skip
        for _ in range(600):
            if rng.random() < 0.4 and len(machine.live) < 6:
                family = FAMILIES[rng.integers(3)][: rng.integers(4, 11)]
                machine.add(family, len(family), int(rng.integers(1, 6)), 0, "")
            if rng.random() < 0.1:
                machine.squeeze(float(rng.choice([0.4, 0.6, 1.0, 1.0])))
            output = machine.run()
            total["lowered chunks"] += sum(c.num_lowered_blocks > 0 for c in output.chunks)
            total["waits for planes"] += sum(s.awaits_planes for s in machine.scheduler._running)
            machine.holds()
        stats = machine.manager.stats()
        total += Counter({
            **{cause: stats.moved_planes.get(cause, 0) for cause in PlaneCause},
            "dropped": stats.dropped_planes, "restored": stats.restored_planes, "lost": stats.lost_planes,
            "missed": stats.misses.get(MissCause.LOWERED, 0),
            "preempted": machine.scheduler.stats().preemptions,
        })  # fmt: skip
        machine.teardown()
    wanted = {*PlaneCause, "lowered chunks", "waits for planes", "dropped", "restored", "lost", "missed"}
    wanted |= {"preempted"}
    assert {name for name in wanted if not total[name]} == {PlaneCause.FAULT}
