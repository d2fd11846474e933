"""Allocator bytes taken apart, and the tensor-parallel sizes heads allow."""

from __future__ import annotations

import pytest

from kvtune.errors import UsageError
from kvtune.plan import bundled_models, find_model
from kvtune.spec import (
    ENGINES,
    AllocatorModel,
    KVFormat,
    ModelSpec,
    Paging,
    allocator_bytes,
    check_tensor_parallel,
    logical_bytes,
    valid_tensor_parallel,
)

BF16 = KVFormat.of("bf16")


def spec_of(model: str) -> ModelSpec:
    return ModelSpec.from_config(find_model(model).config)


@pytest.mark.parametrize("name", bundled_models())
@pytest.mark.parametrize("engine", ENGINES)
def test_the_parts_add_up_and_none_is_negative(name: str, engine: str) -> None:
    spec = spec_of(name)
    tp = valid_tensor_parallel(spec, 8)[-1]
    paging = Paging(tp=tp, chunk=2048)
    model = AllocatorModel(spec, BF16, engine, paging)
    for n in (1, 17, 5_000, 131_072):
        parts = model.breakdown(n)
        added = (
            parts.replication_bytes, parts.window_slack_bytes, parts.rounding_bytes, parts.padding_bytes,
        )  # fmt: skip
        assert min(added) >= 0
        assert parts.logical_bytes + sum(added) == parts.allocator_bytes
        assert parts.allocator_bytes == allocator_bytes(spec, n, BF16, engine, paging) == model.bytes(n)
        assert sum(group.bytes for group in parts.groups) == parts.allocator_bytes
        assert parts.logical_bytes == logical_bytes(spec, n, BF16)
        assert model.stored_bytes(n) <= parts.allocator_bytes


def test_replication_is_told_apart_from_paging() -> None:
    one, sixteen = (AllocatorModel(spec_of("Llama-3.1-70B"), BF16, "vllm", Paging(tp=tp)) for tp in (8, 16))
    assert one.breakdown(8192).replication_bytes == 0
    assert sixteen.breakdown(8192).replication_bytes == 8192 * 327_680
    latent = AllocatorModel(spec_of("DeepSeek-V3"), BF16, "vllm", Paging(tp=8)).breakdown(8192)
    assert latent.replication_bytes == 7 * latent.logical_bytes


def test_a_window_holds_a_prefill_step_on_top() -> None:
    parts = AllocatorModel(spec_of("gpt-oss-120b"), BF16, "vllm", Paging(chunk=8192)).breakdown(131_072)
    assert parts.window_slack_bytes == 8191 * 18 * 2 * 8 * 64 * 2
    assert parts.logical_bytes == 36_864 * 131_072 + 18 * 128 * 2048


def test_a_vllm_hybrid_shares_prefixes_only_in_whole_enlarged_blocks() -> None:
    spec = spec_of("Qwen3.5-27B")
    assert AllocatorModel(spec, BF16, "kvtune", Paging()).effective_block_size() == 16
    assert AllocatorModel(spec, BF16, "vllm", Paging()).effective_block_size() > 700


@pytest.mark.parametrize(
    ("model", "tp", "said"),
    [
        ("Qwen3-32B", 7, "64 attention heads"),
        ("Qwen2.5-7B-Instruct", 8, "28 attention heads"),
        ("Qwen2.5-7B-Instruct", 7, "4 KV heads"),
        ("Qwen3-Next-80B-A3B-Instruct", 32, "16 attention heads"),
        ("DeepSeek-V3", 3, "128 attention heads"),
    ],
)
def test_heads_that_ranks_cannot_share_are_named_with_the_sizes_that_work(
    model: str, tp: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        check_tensor_parallel(spec_of(model), tp)
    assert "use one of 1, 2" in str(error.value)


def test_state_heads_have_to_divide_as_well() -> None:
    config = {
        "model_type": "falcon_h1", "num_hidden_layers": 1, "num_attention_heads": 16, "hidden_size": 1024,
        "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_d_conv": 4,
    }  # fmt: skip
    with pytest.raises(UsageError, match="24 mamba2 heads"):
        check_tensor_parallel(ModelSpec.from_config(config), 16)


def test_few_kv_heads_are_copied_rather_than_refused() -> None:
    check_tensor_parallel(spec_of("Llama-3.1-70B"), 16)
    check_tensor_parallel(spec_of("DeepSeek-V3"), 16)
    assert valid_tensor_parallel(spec_of("Llama-3.1-8B"), 40) == (1, 2, 4, 8, 16, 32)
