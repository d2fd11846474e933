"""Low planes leave under pressure and come back: who is served below nominal precision, and who never is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvtune import CacheConfig, SamplingParams
from kvtune.engine import reading_planes
from kvtune.errors import UsageError
from kvtune.target import ScoreItem
from kvtune.tiers import HostArena
from kvtune.types import FinishReason, MissCause

NESTED = {"k_codec": "n8_rh", "v_codec": "n8_rh", "key_centring": "off", "eviction_policy": "lru"}
EXACT = {"kernel": "reference", "pad_rows": 16}


def squeezable(loaded, **changes):
    layers = range(len(loaded.spec.layers))
    return {
        **NESTED, "kv_budget": "400KiB", "squeeze_planes": dict.fromkeys(layers, (1, 1)),
        "plane_arena": "4MiB", **changes,
    }  # fmt: skip


def prompt(seed: int, length: int = 64) -> list[int]:
    return np.random.default_rng(seed).integers(8, 200, length).tolist()


def params(max_tokens: int = 24, **changes) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=4, **changes)


def drain(engine, outputs=None):
    outputs = {} if outputs is None else outputs
    steps = 0
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id] = output
        engine._manager.check()
        memory = engine.memory()
        assert memory.referenced_bytes == memory.predicted_referenced_bytes
        assert memory.resident_bytes <= memory.budget_bytes
        steps += 1
        assert steps < 3000
    return outputs


def answer(output):
    return output.token_ids, output.logprobs, output.top_logprobs


def start_many(engine, count, *, length=64, max_tokens=24, steps=6):
    for i in range(count):
        engine.add_request(f"r{i}", prompt(i, length), params(max_tokens))
    outputs = {}
    for _ in range(steps):
        for output in engine.step():
            outputs[output.request_id] = output
    return outputs


def block_bytes(engine, group=0):
    return engine.arena_plan.block_bytes[group]


def test_precision_is_never_lowered_by_default(llama, make_engine):
    engine = make_engine(llama, cache={**NESTED, "kv_budget": "200KiB"})
    start_many(engine, 6)
    engine.set_kv_budget("100KiB")
    outputs = drain(engine)
    assert engine.stats().scheduler.preemptions > 0
    assert engine.stats().cache.lowered_tokens == 0
    assert all(output.num_lowered_tokens == 0 for output in outputs.values())


def test_planes_leave_before_anybody_is_preempted_and_the_answers_are_counted(llama, make_engine):
    engine = make_engine(llama, cache=squeezable(llama), scheduler={"watermark": 0.0, "reserved": 0.0})
    outputs = start_many(engine, 6)
    before = engine.memory()
    engine.set_kv_budget(before.referenced_bytes * 3 // 4)
    after = engine.memory()
    assert after.referenced_bytes <= before.referenced_bytes * 3 // 4
    assert after.arena_used_bytes == before.referenced_bytes - after.referenced_bytes > 0
    assert engine.num_running == 6
    drain(engine, outputs)
    stats = engine.stats()
    assert stats.scheduler.preemptions == 0
    assert stats.cache.lost_planes == 0 < stats.cache.dropped_planes
    assert stats.cache.lowered_tokens == sum(o.num_lowered_tokens for o in outputs.values()) > 0
    assert stats.counters()["plane_bytes_dropped"] > 0


def test_who_comes_after_a_squeeze_gets_the_bits_of_a_run_without_one(llama, make_engine):
    def run(squeeze):
        engine = make_engine(llama, cache=squeezable(llama), config=EXACT)
        outputs = start_many(engine, 6)
        if squeeze:
            engine.set_kv_budget(engine.memory().referenced_bytes * 2 // 3)
        drain(engine, outputs)
        if squeeze:
            assert any(o.num_lowered_tokens for o in outputs.values())
            assert engine.stats().cache.dropped_planes > 0
            engine.set_kv_budget("400KiB")
        for i in range(6):  # the same prompts and more: hits on blocks written before the squeeze
            engine.add_request(f"again{i}", prompt(i) + prompt(50 + i, 9), params())
        drain(engine, outputs)
        return engine, outputs

    squeezed, found = run(squeeze=True)
    _, expected = run(squeeze=False)
    again = [f"again{i}" for i in range(6)]
    assert all(found[name].num_cached_tokens > 0 for name in again)
    assert [answer(found[name]) for name in again] == [answer(expected[name]) for name in again]
    assert all(found[name].num_lowered_tokens == 0 for name in again)
    assert squeezed.stats().cache.restored_planes > 0


def test_a_request_that_was_lowered_publishes_nothing_afterwards(llama, make_engine):
    engine = make_engine(llama, cache=squeezable(llama))
    outputs = start_many(engine, 4, length=60, max_tokens=60)
    engine.set_kv_budget(engine.memory().referenced_bytes * 2 // 3)
    published = engine.stats().cache.published_blocks
    engine.step()
    tainted = [i for i in range(4) if engine._manager.precision.is_private(f"r{i}")]
    assert tainted
    engine.set_kv_budget("400KiB")
    drain(engine, outputs)
    for i in tainted:
        whole = [*prompt(i, 60), *outputs[f"r{i}"].token_ids]
        assert engine._manager.match(whole).num_tokens <= 64  # what it had computed before
    assert engine.stats().cache.published_blocks - published <= (4 - len(tainted)) * 5


def test_a_lowered_run_stays_within_the_reading_that_was_proven(llama, make_engine):
    """All planes gone is the worst there can be: the reading the gate measured."""
    layers = dict.fromkeys(range(len(llama.spec.layers)), (2, 1))
    engine = make_engine(llama, cache=squeezable(llama, squeeze_planes=layers), config=EXACT)
    engine.add_request("a", prompt(0), params())
    engine.step()
    low = [layer.cache.k_low for layer in engine.attention_layers.values()]
    engine.set_kv_budget(engine._plan.budgets[0].block * 6 + engine._plan.budgets[0].plane)
    engine.step()
    assert engine.stats().cache.dropped_planes > 0
    for planes in low:  # keys were not in the proven set
        assert not planes.is_assigned and (planes.row_of >= 0).all()


@pytest.mark.parametrize("arena", [None, "4KiB"])
def test_without_room_in_the_arena_a_plane_comes_back_by_recompute(llama, make_engine, arena):
    engine = make_engine(llama, cache=squeezable(llama, plane_arena=arena), config=EXACT)
    outputs = start_many(engine, 4, max_tokens=40)
    engine.set_kv_budget(engine.memory().referenced_bytes * 2 // 3)
    assert engine.stats().cache.lost_planes > 0
    drain(engine, outputs)
    engine.set_kv_budget("400KiB")
    lost = 0
    for i in range(4):
        engine.add_request(f"again{i}", prompt(i) + prompt(50 + i, 9), params())
        drain(engine, outputs)
        lost += outputs[f"again{i}"].misses.get(MissCause.LOWERED, 0)
    assert lost > 0
    fresh = make_engine(llama, cache=squeezable(llama), config=EXACT)
    for i in range(4):
        fresh.add_request(f"again{i}", prompt(i) + prompt(50 + i, 9), params())
    expected = drain(fresh)
    assert [answer(outputs[n]) for n in expected] == [answer(expected[n]) for n in expected]


class LossyArena(HostArena):
    """Forgets every second plane, and refuses every third."""

    count = 0

    def put(self, key, payload):
        self.count += 1
        return self.count % 3 > 0 and super().put(key, payload)

    def get(self, key):
        self.count += 1
        return None if self.count % 2 else super().get(key)


def test_an_arena_that_fails_costs_recomputing_never_a_wrong_answer(llama, make_engine):
    def run(tier):
        engine = make_engine(llama, cache=squeezable(llama), config=EXACT, plane_tier=tier)
        outputs = start_many(engine, 6)
        engine.set_kv_budget(engine.memory().referenced_bytes * 2 // 3)
        drain(engine, outputs)
        engine.set_kv_budget("400KiB")
        for i in range(6):
            engine.add_request(f"again{i}", prompt(i) + prompt(50 + i, 9), params())
        return engine, drain(engine, outputs)

    engine, outputs = run(LossyArena(1 << 22))
    assert engine.stats().cache.lost_planes > 0
    fresh = make_engine(llama, cache=squeezable(llama), config=EXACT)
    for i in range(6):
        fresh.add_request(f"again{i}", prompt(i) + prompt(50 + i, 9), params())
    expected = drain(fresh)
    for name, output in expected.items():
        if not engine_lost(outputs[name]):
            assert answer(outputs[name]) == answer(output)


def engine_lost(output) -> bool:
    return output.num_lowered_tokens > 0


def test_a_budget_under_which_a_live_request_cannot_end_is_refused_and_changes_nothing(llama, make_engine):
    engine = make_engine(llama, cache=squeezable(llama))
    outputs = start_many(engine, 3)
    before = (engine.memory(), engine.stats().cache)
    with pytest.raises(
        UsageError, match="request 'r0' may grow to 87 tokens, more than that KV budget holds"
    ):
        engine.set_kv_budget(3 * block_bytes(engine))
    with pytest.raises(UsageError, match="cannot hold one block"):
        engine.set_kv_budget(100)
    with pytest.raises(UsageError, match=r"is above the 400\.00 KiB this engine was started with"):
        engine.set_kv_budget("1MiB")
    assert (engine.memory(), engine.stats().cache) == before
    drain(engine, outputs)
    engine.set_kv_budget(3 * block_bytes(engine))  # nobody is there any more
    assert engine.memory().resident_bytes <= 3 * block_bytes(engine)


@pytest.mark.parametrize("arena", [None, "4MiB"])
def test_squeezed_twice_to_the_least_and_back_everybody_is_served(llama, make_engine, arena):
    engine = make_engine(llama, cache=squeezable(llama, plane_arena=arena))
    outputs = start_many(engine, 6, max_tokens=40)
    least = engine._plan.budgets[0]
    for size in (engine.memory().referenced_bytes // 2, 7 * least.block + 2 * least.plane, "400KiB"):
        engine.set_kv_budget(size)
        engine._manager.check()
        for _ in range(4):
            for output in engine.step():
                outputs[output.request_id] = output
            engine._manager.check()
    drain(engine, outputs)
    assert all(o.finish_reason is FinishReason.LENGTH and len(o.token_ids) == 40 for o in outputs.values())
    assert engine.memory().referenced_bytes == 0


def test_relief_in_the_middle_of_a_prefill_and_abort_in_the_middle_of_a_squeeze(llama, make_engine):
    engine = make_engine(llama, cache=squeezable(llama), scheduler={"max_num_batched_tokens": 16})
    outputs = start_many(engine, 3, length=100, max_tokens=20, steps=4)
    engine.set_kv_budget(11 * block_bytes(engine))
    engine.step()
    assert engine.abort("r0")
    outputs |= {output.request_id: output for output in engine.step()}
    engine.set_kv_budget("400KiB")
    drain(engine, outputs)
    assert outputs["r0"].finish_reason is FinishReason.ABORT
    assert len(outputs["r1"].token_ids) == len(outputs["r2"].token_ids) == 20
    for _ in range(3):
        engine.step()
    assert engine._manager.precision.is_nominal  # idle blocks too have their planes again
    assert engine.memory().arena_used_bytes == 0


@pytest.mark.parametrize("first_block_16bit", [False, True])
def test_windows_and_16_bit_first_blocks_are_squeezed_and_come_back(gemma2, make_engine, first_block_16bit):
    """Two groups with a purse each; one of them lets planes of blocks go that leave its window soon."""

    def run(squeeze):
        cache = squeezable(gemma2, kv_budget="1600KiB", first_block_16bit=first_block_16bit)
        engine = make_engine(gemma2, cache=cache, config=EXACT)
        outputs = start_many(engine, 6, length=90, max_tokens=30)
        if squeeze:
            plan, usage = engine.arena_plan, engine.stats().blocks
            used = sum(u.body.referenced * size for u, size in zip(usage, plan.block_bytes, strict=True))
            engine.set_kv_budget(plan.first_bytes + used * 4 // 5)
            drain(engine, outputs)
            assert engine.stats().cache.dropped_planes > 0
            engine.set_kv_budget("1600KiB")
        drain(engine, outputs)
        for i in range(6):
            engine.add_request(f"again{i}", prompt(i, 90) + prompt(50 + i, 9), params())
        drain(engine, outputs)
        return [answer(outputs[f"again{i}"]) for i in range(6)]

    assert run(squeeze=True) == run(squeeze=False)


def test_scoring_in_the_middle_of_a_squeeze_is_at_full_precision_and_leaves_planes_alone(llama, make_engine):
    items = [ScoreItem(item_id="a", prompt_token_ids=tuple(prompt(7, 20)), continuation=tuple(prompt(8, 20)))]
    expected = make_engine(llama, cache=squeezable(llama)).score(items, num_top=8)
    engine = make_engine(llama, cache=squeezable(llama))
    outputs = start_many(engine, 6)
    engine.set_kv_budget(engine.memory().referenced_bytes * 2 // 3)
    engine.step()
    for _ in range(3):
        resting = engine.memory().arena_used_bytes
        try:
            found = engine.score(items, num_top=8)
        except UsageError:  # no room for it now; as without planes
            found = expected
        assert np.array_equal(found[0].logprobs, expected[0].logprobs)
        assert engine.memory().arena_used_bytes == resting > 0
        engine._manager.check()
        for output in engine.step():
            outputs[output.request_id] = output
    drain(engine, outputs)
    assert len(outputs) == 6


def test_requests_of_higher_priority_keep_their_precision(llama, make_engine):
    engine = make_engine(llama, cache=squeezable(llama), scheduler={"watermark": 0.0, "reserved": 0.0})
    for i in range(6):
        engine.add_request(f"r{i}", prompt(i), params(), priority=int(i == 3))
    outputs = {output.request_id: output for _ in range(6) for output in engine.step()}
    engine.set_kv_budget(engine.memory().referenced_bytes * 3 // 4)
    drain(engine, outputs)
    assert outputs["r3"].num_lowered_tokens == 0
    assert sum(o.num_lowered_tokens > 0 for o in outputs.values()) > 0


def test_the_setting_travels_through_json(llama):
    config = CacheConfig(**squeezable(llama, squeeze_planes={1: (2, 1), 0: (1, 1)}))
    found = CacheConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert found == config
    assert (found.droppable_sides(0), found.droppable_sides(1)) == (("k", "v"), ("v",))
    with pytest.raises(UsageError, match="squeeze_planes must map a layer index"):
        CacheConfig.from_dict({"squeeze_planes": {"first": [1, 1]}})


def test_a_lowered_budget_gives_pages_back_to_the_machine(llama, make_engine):
    engine = make_engine(llama, cache=squeezable(llama, kv_budget="8MiB", plane_arena=None))
    for i in range(60):
        engine.add_request(f"r{i}", prompt(i, 400), params(4))
    drain(engine)
    assert engine.memory().resident_bytes > 6 << 20
    before = resident_bytes()
    engine.set_kv_budget("1MiB")
    assert before - resident_bytes() > 4 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_planes_read_by_hand_and_planes_dropped_under_pressure_do_not_meet(llama, make_engine):
    engine = make_engine(llama, cache=squeezable(llama))
    start_many(engine, 2)
    with pytest.raises(UsageError, match="finish or abort"), reading_planes(engine, {0: (1, 2)}):
        pass


def test_a_side_that_is_not_nested_cannot_be_squeezed(llama, make_engine):
    with pytest.raises(UsageError, match="drops a plane of k in layer 0, which is stored as int8"):
        make_engine(llama, cache=squeezable(llama, k_codec="int8"))
    with pytest.raises(UsageError, match="names layer 9; the model has layers"):
        make_engine(llama, cache=squeezable(llama, squeeze_planes={9: (1, 1)}))
    with pytest.raises(UsageError, match="must give 1 or 2 planes"):
        make_engine(llama, cache=squeezable(llama, squeeze_planes={0: (0, 1)}))
