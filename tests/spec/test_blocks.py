"""Blocks of our own pool: bytes per block, blocks per sequence, and the split of a budget over groups."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.plan import bundled_models, find_model
from kvtune.spec import (
    CODEC_STORAGE,
    KVFormat,
    KVGroup,
    LayerKind,
    ModelSpec,
    PackedLayout,
    Paging,
    allocator_bytes,
    blocks_per_sequence,
    first_block_bytes,
    fixed_bytes_per_sequence,
    group_block_bytes,
    growth_bytes_per_token,
    layer_token_bytes,
    logical_bytes,
    split_budget,
)


def group(
    index: int = 0, *, layers: int = 2, heads: int = 2, dim: int = 64, window: int | None = None
) -> KVGroup:
    return KVGroup(
        index=index,
        kind=LayerKind.FULL if window is None else LayerKind.SLIDING,
        layers=tuple(range(layers)),
        num_kv_heads=heads,
        k_head_dim=dim,
        v_head_dim=dim,
        window=window,
    )


def packed_layout_of(g: KVGroup, k: str, v: str, block_size: int = 16) -> PackedLayout:
    return PackedLayout(
        block_size=block_size, num_kv_heads=g.num_kv_heads, k_head_dim=g.k_head_dim,
        v_head_dim=g.v_head_dim, k_codec=k, v_codec=v,
    )  # fmt: skip


@pytest.mark.parametrize(("k", "v"), itertools.product(CODEC_STORAGE, CODEC_STORAGE))
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_a_block_is_its_codes_and_strips_padded_to_a_cache_line(k: str, v: str, dim: int) -> None:
    g = group(layers=1, heads=3, dim=dim)
    layout = packed_layout_of(g, k, v)
    tokens = 16 * 3 * (CODEC_STORAGE[k].head_bytes(dim) + CODEC_STORAGE[v].head_bytes(dim))
    in_arena = layout.v_strip_offset + layout.v_strip_bytes
    assert in_arena + layout.k_low_bytes + layout.v_low_bytes == tokens
    assert layout.k_low_bytes == (16 * 3 * dim // 2 if k == "n8_rh" else 0)
    assert 0 <= layout.block_bytes - tokens < 64
    assert layout.block_bytes % 64 == 0


def test_layers_of_a_group_may_have_their_own_codecs() -> None:
    g = group(layers=3)
    codecs = [("bf16", "bf16"), ("int8", "int4"), ("int4", "int4")]
    expected = sum(packed_layout_of(g, k, v).block_bytes for k, v in codecs)
    assert group_block_bytes(g, lambda layer: codecs[layer], 16) == expected


def test_the_first_block_arena_is_16_bit_by_default() -> None:
    g = group()
    assert first_block_bytes(g, 32) == 2 * 32 * 2 * (64 + 64) * 2


@pytest.mark.parametrize("bad", ["int3", "nvfp4", ""])
def test_a_codec_the_pool_cannot_store_is_a_usage_error(bad: str) -> None:
    with pytest.raises(UsageError, match="unknown KV codec"):
        group_block_bytes(group(), lambda _layer: (bad, "bf16"), 16)


PACKED = [
    name
    for name in bundled_models()
    if all(g.kind is not LayerKind.MLA for g in ModelSpec.from_config(find_model(name).config).kv_groups())
]
"""Models without a latent, which the packed layout does not hold."""


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("k", "v"), [("bf16", "bf16"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4")])
def test_allocator_bytes_are_the_sum_over_groups_of_blocks_times_packed_blocks(
    name: str, k: str, v: str
) -> None:
    spec = ModelSpec.from_config(find_model(name).config)
    n, chunk = 5_000, 512
    total = sum(-(-layer.state_bytes // 64) * 64 for layer in spec.layers)
    for g in spec.kv_groups():
        block = packed_layout_of(g, k, v).block_bytes * len(g.layers)
        held = -(-n // 16)
        if g.window is not None:
            held = min(held, -(-min(n, g.window - 1 + chunk) // 16) + 1)
        total += held * block
    got = allocator_bytes(spec, n, KVFormat.of(k, v), "kvtune", Paging(chunk=chunk))
    assert got == total
    assert got >= logical_bytes(spec, n, KVFormat.of(k, v))


def test_keeping_block_0_in_16_bit_costs_the_difference_of_one_block_per_group() -> None:
    spec = ModelSpec.from_config(find_model("gpt-oss-20b").config)
    kv = KVFormat.of("int8")
    plain = allocator_bytes(spec, 4_096, kv, "kvtune", Paging())
    wide = allocator_bytes(spec, 4_096, kv, "kvtune", Paging(first_block_codec="bf16"))
    extra = sum(first_block_bytes(g, 16) - group_block_bytes(g, kv.names, 16) for g in spec.kv_groups())
    assert wide - plain == extra > 0


def test_int8_with_its_fp16_scales_is_516_thousandths_of_bf16_at_head_dim_64() -> None:
    spec = ModelSpec.from_config(find_model("gpt-oss-20b").config)
    ratio = growth_bytes_per_token(spec, KVFormat.of("int8")) / growth_bytes_per_token(
        spec, KVFormat.of("bf16")
    )
    assert ratio == pytest.approx(0.515625)


def test_single_layers_may_be_stored_otherwise() -> None:
    spec = ModelSpec.from_config(find_model("Llama-3.1-8B").config)
    bf16, int8 = CODEC_STORAGE["bf16"], CODEC_STORAGE["int8"]
    mixed = KVFormat(k=int8, v=int8, overrides={0: (bf16, bf16)})
    extra = layer_token_bytes(spec.layers[0], mixed) - layer_token_bytes(spec.layers[1], mixed)
    assert growth_bytes_per_token(spec, mixed) == growth_bytes_per_token(spec, KVFormat.of("int8")) + extra
    assert mixed.names(0) == ("bf16", "bf16")
    assert mixed.names(1) == ("int8", "int8")


@pytest.mark.parametrize(
    ("num_tokens", "window", "chunk", "blocks"),
    [
        (1, None, 512, 1),
        (16, None, 512, 1),
        (17, None, 512, 2),
        (10_000, 128, 512, 41),  # 127 + 512 = 639 tokens in 40 blocks, one more for the offset
        (20, 128, 512, 2),  # never more than the sequence itself
        (10_000, 1, 1, 2),
    ],
)
def test_a_window_holds_itself_one_step_and_one_block_more(
    num_tokens: int, window: int | None, chunk: int, blocks: int
) -> None:
    assert blocks_per_sequence(group(window=window), num_tokens, chunk=chunk, block_size=16) == blocks


@given(
    window=st.integers(1, 300), chunk=st.integers(1, 100), block_size=st.sampled_from([1, 2, 16]),
    length=st.integers(1, 600),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_no_step_of_a_chunked_run_ever_needs_more_blocks_than_the_bound(
    window: int, chunk: int, block_size: int, length: int
) -> None:
    bound = blocks_per_sequence(group(window=window), length, chunk=chunk, block_size=block_size)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        oldest = max(0, start - window + 1)  # the first query of the step sees positions > start - window
        assert (end - 1) // block_size - oldest // block_size + 1 <= bound


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.none() | st.integers(1, 4000)), min_size=1, max_size=4),
    budget=st.integers(0, 10**7), length=st.integers(1, 20_000),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_budget_is_never_exceeded_and_the_rest_is_less_than_the_dearest_block(
    sizes: list[tuple[int, int | None]], budget: int, length: int
) -> None:
    groups = [group(i, window=window) for i, (_, window) in enumerate(sizes)]
    bytes_of = [size for size, _ in sizes]
    if budget < sum(bytes_of):
        with pytest.raises(UsageError, match="cannot hold one block"):
            split_budget(groups, bytes_of, budget, max_model_len=length, chunk=64, block_size=16)
        return
    counts = split_budget(groups, bytes_of, budget, max_model_len=length, chunk=64, block_size=16)
    used = sum(n * size for n, size in zip(counts, bytes_of, strict=True))
    assert min(counts) >= 1
    assert 0 <= budget - used < max(bytes_of)


def test_groups_hold_about_equally_many_long_sequences() -> None:
    spec = ModelSpec.from_config(find_model("gemma-3-27b-it").config)
    groups = spec.kv_groups()
    sizes = [group_block_bytes(g, lambda _layer: ("int8", "int8"), 16) for g in groups]
    counts = split_budget(groups, sizes, 40 << 30, max_model_len=32_768, chunk=512, block_size=16)
    held = [
        count / blocks_per_sequence(g, 32_768, chunk=512, block_size=16)
        for g, count in zip(groups, counts, strict=True)
    ]
    assert held[0] == pytest.approx(held[1], rel=0.01)


def test_fixed_and_growth_add_up_beyond_every_window() -> None:
    kv = KVFormat.of("int4")
    for name in bundled_models():
        spec = ModelSpec.from_config(find_model(name).config)
        n = 50_000
        assert logical_bytes(spec, n, kv) == growth_bytes_per_token(spec, kv) * n + fixed_bytes_per_sequence(
            spec, kv
        )
