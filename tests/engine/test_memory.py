"""KV bytes, counted in storage and by walking block tables, are what spec predicts."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune import SamplingParams
from kvtune.spec import KVFormat, Paging, allocator_bytes, group_block_bytes

POINTS = 10


def _run_to_points(engine, lengths, new_tokens=40):
    """Yields the engine at ten points of a run over prompts that share nothing."""
    rng = np.random.default_rng(2)
    for index, length in enumerate(lengths):
        params = SamplingParams(max_tokens=new_tokens + 3 * index, temperature=0.0, ignore_eos=True)
        engine.add_request(str(index), rng.integers(3, 211, length).tolist(), params)
    for _ in range(POINTS):
        for _ in range(5):
            engine.step()
        yield engine


def _held_lengths(engine) -> list[int]:
    """Computed tokens of each request that holds blocks."""
    holders = set(engine._manager.request_ids())
    return [s.sequence.num_computed_tokens for r, s in engine._states.items() if r in holders]


@pytest.mark.parametrize(("k", "v"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int4"), ("int4", "int8")])
@pytest.mark.parametrize("block_size", [16, 64])
def test_bytes_of_a_full_attention_model_equal_spec_at_ten_points(llama, make_engine, k, v, block_size):
    engine = make_engine(
        llama, cache={"k_codec": k, "v_codec": v, "block_size": block_size},
        scheduler={"max_num_batched_tokens": 24},
    )  # fmt: skip
    kv, paging = KVFormat.of(k, v), Paging(block_size=block_size)
    seen = set()
    for running in _run_to_points(engine, (5, 30, 47, 80)):
        memory = running.memory()
        predicted = sum(allocator_bytes(llama.spec, n, kv, "kvtune", paging) for n in _held_lengths(running))
        assert memory.referenced_bytes == predicted == memory.predicted_referenced_bytes
        assert memory.allocated_bytes == memory.predicted_allocated_bytes
        assert memory.allocated_bytes <= running.cache_config.kv_budget_bytes
        assert memory.resident_bytes == sum(running.stats().resident_bytes.values())
        seen.add(memory.referenced_bytes)
    assert len(seen) >= 3, "the run must pass through different fillings"


@pytest.mark.parametrize("first_block_16bit", [False, True])
def test_bytes_of_a_windowed_model_equal_spec_at_ten_points(gemma2, make_engine, first_block_16bit):
    engine = make_engine(
        gemma2,
        cache={"k_codec": "int8", "v_codec": "int4", "first_block_16bit": first_block_16bit},
        scheduler={"max_num_batched_tokens": 24},
    )
    block = {g.index: group_block_bytes(g, lambda _: ("int8", "int4"), 16) for g in gemma2.spec.kv_groups()}
    first = {g.index: group_block_bytes(g, lambda _: ("bf16", "bf16"), 16) for g in gemma2.spec.kv_groups()}
    for running in _run_to_points(engine, (5, 30, 47, 80)):
        predicted = 0
        for group in gemma2.spec.kv_groups():
            for n in _held_lengths(running):
                # the next query, at position n, sees positions above n - window
                low = 0 if group.window is None else max(0, n - group.window + 1) // 16
                for index in range(low, -(-n // 16)):
                    is_first = first_block_16bit and index == 0
                    predicted += first[group.index] if is_first else block[group.index]
        memory = running.memory()
        assert memory.referenced_bytes == predicted == memory.predicted_referenced_bytes
        assert memory.allocated_bytes == memory.predicted_allocated_bytes
        assert memory.allocated_bytes <= running.cache_config.kv_budget_bytes


def test_shared_prefixes_are_counted_once(llama, make_engine):
    engine = make_engine(llama)
    stem = list(range(3, 67))
    for index in range(4):
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        engine.add_request(str(index), [*stem, 70 + index], params)
    while engine.num_running < 4:
        engine.step()
    block = group_block_bytes(llama.spec.kv_groups()[0], lambda _: ("bf16", "bf16"), 16)
    assert engine.memory().referenced_bytes == (4 + 4) * block


def test_after_a_run_nothing_is_referenced_and_all_content_is_idle(llama, make_engine):
    engine = make_engine(llama)
    engine.generate([[3] * 40, [4] * 20], SamplingParams(max_tokens=4, temperature=0.0))
    memory = engine.memory()
    assert memory.referenced_bytes == 0
    assert memory.idle_bytes == memory.resident_bytes > 0


def test_int8_holds_about_half_of_bf16(llama, make_engine):
    bytes_per_token = {
        codec: make_engine(llama, cache={"k_codec": codec, "v_codec": codec}).effective(context=512)
        for codec in ("bf16", "int8")
    }
    ratio = bytes_per_token["int8"]["kv_bytes_per_token"] / bytes_per_token["bf16"]["kv_bytes_per_token"]
    assert ratio == pytest.approx((32 + 2) / 64)
