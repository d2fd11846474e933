"""Fourteen published models, their KV bytes as integers (bf16, one copy, no paging)."""

from __future__ import annotations

import pytest

from kvtune.plan import find_model
from kvtune.spec import (
    KVFormat,
    LayerKind,
    ModelSpec,
    fixed_bytes_per_sequence,
    growth_bytes_per_token,
    kv_format,
    layer_token_bytes,
    logical_bytes,
)

BF16 = KVFormat.of("bf16")
MIB = 1 << 20

# id: (layers by kind, growth in B/token, fixed in B/sequence)
ROWS = {
    "meta-llama/Llama-3.1-8B": ({"full_attention": 32}, 131_072, 0),
    "meta-llama/Llama-3.1-70B": ({"full_attention": 80}, 327_680, 0),
    "Qwen/Qwen3-32B": ({"full_attention": 64}, 262_144, 0),
    "deepseek-ai/DeepSeek-V3": ({"mla": 61}, 70_272, 0),
    "moonshotai/Kimi-K2-Instruct": ({"mla": 61}, 70_272, 0),
    "openai/gpt-oss-120b": ({"full_attention": 18, "sliding_attention": 18}, 36_864, 9 * MIB // 2),
    "openai/gpt-oss-20b": ({"full_attention": 12, "sliding_attention": 12}, 24_576, 3 * MIB),
    "google/gemma-3-27b-it": ({"full_attention": 10, "sliding_attention": 52}, 81_920, 416 * MIB),
    "google/gemma-4-26B-A4B-it": ({"full_attention": 5, "sliding_attention": 25}, 20_480, 200 * MIB),
    "google/gemma-3n-E4B-it": (
        {"full_attention": 4, "sliding_attention": 16, "shared": 15},
        8_192,
        16 * MIB,
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        {"full_attention": 12, "linear_attention": 36},
        24_576,
        36 * (32 * 128 * 128 * 4 + (2 * 16 * 128 + 32 * 128) * 3 * 2),
    ),
    "Qwen/Qwen3.5-27B": (
        {"full_attention": 16, "linear_attention": 48},
        65_536,
        48 * (48 * 128 * 128 * 4 + (2 * 16 * 128 + 48 * 128) * 3 * 2),
    ),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (
        {"full_attention": 6, "mamba2": 23, "none": 23},
        6_144,
        23 * (64 * 64 * 128 * 4 + (64 * 64 + 2 * 8 * 128) * 3 * 2),
    ),
    "ai21labs/Jamba-v0.1": (
        {"full_attention": 4, "mamba1": 28},
        16_384,
        28 * 2 * 4096 * (16 * 4 + 3 * 2),
    ),
}

# id: (fixed in MiB, GiB at 131,072 tokens), rounded as published
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": (0, 16.00),
    "meta-llama/Llama-3.1-70B": (0, 40.00),
    "Qwen/Qwen3-32B": (0, 32.00),
    "deepseek-ai/DeepSeek-V3": (0, 8.58),
    "moonshotai/Kimi-K2-Instruct": (0, 8.58),
    "openai/gpt-oss-120b": (4.5, 4.50),
    "openai/gpt-oss-20b": (3, 3.00),
    "google/gemma-3-27b-it": (416, 10.41),
    "google/gemma-4-26B-A4B-it": (200, 2.70),
    "google/gemma-3n-E4B-it": (16, 1.02),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (73.7, 3.07),
    "Qwen/Qwen3.5-27B": (146.8, 8.14),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (46.8, 0.80),
    "ai21labs/Jamba-v0.1": (15.3, 2.01),
}


def spec_of(model: str) -> ModelSpec:
    return ModelSpec.from_config(find_model(model).config)


@pytest.mark.parametrize("model", ROWS)
def test_a_published_model_has_exactly_its_known_bytes(model: str) -> None:
    kinds, growth, fixed = ROWS[model]
    spec = spec_of(model)
    counted = {str(kind): sum(layer.kind is kind for layer in spec.layers) for kind in LayerKind}
    assert {kind: count for kind, count in counted.items() if count} == kinds
    assert growth_bytes_per_token(spec, BF16) == growth
    assert fixed_bytes_per_sequence(spec, BF16) == fixed
    assert logical_bytes(spec, 131_072, BF16) == growth * 131_072 + fixed


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_rounds_to_the_published_figures(model: str) -> None:
    fixed_mib, gib = PUBLISHED[model]
    spec = spec_of(model)
    assert fixed_bytes_per_sequence(spec, BF16) / MIB == pytest.approx(fixed_mib, abs=0.051)
    assert logical_bytes(spec, 131_072, BF16) / 2**30 == pytest.approx(gib, abs=0.0051)


def test_gemma_3n_takes_272_mib_at_32k() -> None:
    assert logical_bytes(spec_of("gemma-3n-e4b-it"), 32_768, BF16) == 272 * MIB


def test_deepseek_in_vllms_packed_fp8_takes_656_bytes_per_layer_and_its_index_132_more() -> None:
    v32 = spec_of("DeepSeek-V3.2-Exp")
    packed = kv_format("vllm", "fp8", v32)
    assert growth_bytes_per_token(spec_of("DeepSeek-V3"), packed) == 40_016
    assert growth_bytes_per_token(v32, packed) == 48_068


def test_a_window_that_is_not_full_yet_holds_only_the_tokens_there_are() -> None:
    spec = spec_of("gpt-oss-20b")
    assert logical_bytes(spec, 100, BF16) == 100 * 24 * 2 * 8 * 64 * 2
    assert logical_bytes(spec, 0, BF16) == 0


def test_recurrent_state_is_there_from_the_first_token() -> None:
    spec = spec_of("Jamba-v0.1")
    assert logical_bytes(spec, 0, BF16) == fixed_bytes_per_sequence(spec, BF16)


# id: B/token if every attention layer kept every token, as calculators that know no windows count
NAIVE = {
    "openai/gpt-oss-120b": 73_728,
    "google/gemma-3-27b-it": 507_904,
    "google/gemma-3n-E4B-it": 71_680,
}


@pytest.mark.parametrize("model", NAIVE)
def test_counting_every_layer_as_full_gives_the_known_overestimate(model: str) -> None:
    spec = spec_of(model)
    every = [next(x for x in spec.layers if x.num_kv_heads) for _ in spec.layers]
    assert sum(layer_token_bytes(layer, BF16) for layer in every) == NAIVE[model]


def test_hybrids_cost_what_their_engines_logged() -> None:
    """LM Studio logged 16,384 MiB at 262,144 tokens and 149.6 MiB of state, convolutions in 32 bit."""
    spec = spec_of("Qwen/Qwen3.5-27B")
    assert growth_bytes_per_token(spec, BF16) * 262_144 == 16_384 * MIB
    wide = sum(layer.state_bytes + 2 * layer.conv_elements for layer in spec.layers)
    assert wide / MIB == pytest.approx(149.6, abs=0.05)


def test_deepseek_at_its_full_length_takes_the_measured_bytes() -> None:
    assert logical_bytes(spec_of("DeepSeek-V3"), 163_840, BF16) / 2**30 == pytest.approx(10.72, abs=0.005)


def test_a_naive_gemma_is_six_times_too_large_at_128k() -> None:
    assert NAIVE["google/gemma-3-27b-it"] * 131_072 / 2**30 == pytest.approx(62.0, abs=0.05)
