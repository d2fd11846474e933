"""Other engines' storage and paging, against figures read from their logs and sources."""

from __future__ import annotations

import pytest

from kvtune.errors import UsageError
from kvtune.plan import bundled_models, find_model
from kvtune.spec import (
    ENGINES,
    KVFormat,
    ModelSpec,
    Paging,
    allocator_bytes,
    growth_bytes_per_token,
    kv_format,
    layer_state_bytes,
    logical_bytes,
)
from kvtune.spec.engines import vllm_pages

BF16 = KVFormat.of("bf16")


def spec_of(model: str) -> ModelSpec:
    return ModelSpec.from_config(find_model(model).config)


def nemotron_super() -> ModelSpec:
    return ModelSpec.from_config({
        "model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "M*EM",
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 4096,
        "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
    })  # fmt: skip


def qwen35_397b() -> ModelSpec:
    return ModelSpec.from_config({
        "model_type": "qwen3_5_moe_text", "num_hidden_layers": 60, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 4096, "linear_num_value_heads": 64,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    })  # fmt: skip


def test_vllms_block_of_a_hybrid_grows_to_hold_the_state_and_fp8_doubles_it() -> None:
    spec = nemotron_super()
    fp8 = vllm_pages(spec, 1000, kv_format("vllm", "fp8", spec), Paging())
    bf16 = vllm_pages(spec, 1000, BF16, Paging())
    assert fp8[0].block_size == 8_320  # as that vLLM logged
    assert bf16[0].block_size == 4_160
    assert vllm_pages(qwen35_397b(), 1000, BF16, Paging(tp=2))[0].block_size == 2_096


def test_a_short_prompt_on_a_hybrid_pays_a_whole_inflated_block() -> None:
    spec = nemotron_super()
    kv = kv_format("vllm", "fp8", spec)
    page = 8_320 * 2 * 128 * 2
    assert allocator_bytes(spec, 12, kv, "vllm", Paging()) == 3 * page  # 1 attention + 2 state pages


def test_vllm_keeps_recurrent_states_in_the_checkpoints_type_unless_told_otherwise() -> None:
    """What `mamba_ssm_cache_dtype` auto means in its 0.32; float32 for Nemotron-H and Kimi's KDA."""
    elements = {"Qwen3-Next-80B-A3B-Instruct": 2, "Jamba-v0.1": 2, "Falcon-H1-7B-Instruct": 2,
                "granite-4.0-h-small": 2, "Qwen3.5-27B": 4, "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 4,
                "Kimi-Linear-48B-A3B-Instruct": 4}  # fmt: skip
    for model, size in elements.items():
        spec = spec_of(model)
        layer = next(layer for layer in spec.layers if layer.state_bytes)
        kept = layer_state_bytes(layer, kv_format("vllm", "bf16", spec))
        assert kept == layer.state_elements * size + layer.conv_elements * 2, model
        assert layer_state_bytes(layer, kv_format("sglang", "bf16", spec)) == layer.state_bytes
    qwen = spec_of("Qwen3-Next-80B-A3B-Instruct")
    state = 32 * 128 * 128 * 2 + (2 * 16 * 128 + 32 * 128) * 3 * 2
    block = vllm_pages(qwen, 1, kv_format("vllm", "bf16", qwen), Paging())[0].block_size
    assert block == 16 * -(-state // (16 * 2 * 2 * 256 * 2))


def test_vllm_keeps_a_window_plus_one_step_and_one_block() -> None:
    spec = spec_of("gpt-oss-120b")
    layer_token = 2 * 8 * 64 * 2
    blocks = -(-(127 + 8192) // 16) + 1
    expected = 18 * layer_token * (131_072 + 16 * blocks)
    assert allocator_bytes(spec, 131_072, BF16, "vllm", Paging(chunk=8192)) == expected


def test_vllm_pads_the_last_group_of_gemma_3() -> None:
    """52 sliding layers in groups of 10 need 6 groups: 8 layers of padding."""
    spec = spec_of("gemma-3-27b-it")
    page = 16 * 2 * 16 * 128 * 2
    blocks = -(-(1023 + 8192) // 16) + 1
    expected = page * (10 * (131_072 // 16) + 60 * blocks)
    assert allocator_bytes(spec, 131_072, BF16, "vllm", Paging(chunk=8192)) == expected


def test_vllm_gives_gemma_4s_smaller_full_layers_longer_blocks() -> None:
    buckets = {str(b.kind): b for b in vllm_pages(spec_of("gemma-4-26B-A4B-it"), 10_000, BF16, Paging())}
    assert buckets["full_attention"].block_size == 32
    assert buckets["sliding_attention"].block_size == 16
    assert buckets["full_attention"].page_bytes == buckets["sliding_attention"].page_bytes


def test_vllm_counts_blocks_as_it_logs_them() -> None:
    # 1,952 blocks of 16 tokens of Llama-3.1-8B are 3.81 GiB
    assert (
        allocator_bytes(spec_of("Llama-3.1-8B"), 1_952 * 16, BF16, "vllm", Paging()) == 1_952 * 16 * 131_072
    )


# bf16, 131,072 tokens, 8,192 batched tokens, blocks of 16, one rank: get_kv_cache_groups and
# _max_memory_usage_bytes_from_groups of vLLM 0.32 run on specs of the same layers
VLLM_BYTES = {
    "Llama-3.1-8B": 17_179_869_184,
    "gpt-oss-120b": 5_139_136_512,
    "gpt-oss-20b": 3_426_091_008,
    "gemma-3-27b-it": 15_275_130_880,
    "gemma-4-26B-A4B-it": 4_575_068_160,
    "gemma-3n-E4B-it": 1_359_478_784,
    "Qwen3-Next-80B-A3B-Instruct": 3_321_888_768,
    "Qwen3.5-27B": 8_786_018_304,
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 862_814_208,
    "Jamba-v0.1": 2_165_833_728,
    "Mistral-7B-v0.1": 1_612_709_888,
}


@pytest.mark.parametrize("model", VLLM_BYTES)
def test_a_sequence_takes_as_many_bytes_as_vllms_own_planner_says(model: str) -> None:
    assert allocator_bytes(spec_of(model), 131_072, BF16, "vllm", Paging(chunk=8192)) == VLLM_BYTES[model]


# block of the attention layers and bytes of a sequence of 131,072 tokens in bf16, then in fp8, with 16,384
# tokens in flight: the same functions of vLLM 0.32, states in the type it keeps them in
VLLM_DEFAULT = {
    "Llama-3.1-8B": (16, 17_179_869_184, 16, 8_589_934_592),
    "gpt-oss-120b": (16, 5_441_126_400, 16, 2_720_563_200),
    "gemma-2-27b-it": (16, 28_557_836_288, 16, 14_278_918_144),
    "gemma-3-27b-it": (16, 19_301_662_720, 16, 9_650_831_360),
    "gemma-4-26B-A4B-it": (16, 6_252_789_760, 16, 3_126_394_880),
    "Olmo-3-7B-Instruct": (16, 25_239_224_320, 16, 12_619_612_160),
    "EXAONE-4.0-32B": (16, 12_619_612_160, 16, 6_309_806_080),
    "Qwen3-Next-80B-A3B-Instruct": (544, 3_262_119_936, 1_072, 1_659_764_736),
    "Qwen3.5-35B-A3B": (1_056, 2_768_240_640, 2_096, 1_416_560_640),
    "Jamba-v0.1": (80, 2_157_445_120, 160, 1_083_965_440),
    "NVIDIA-Nemotron-3-Super-120B-A12B-BF16": (4_160, 1_260_912_640, 8_320, 715_653_120),
    "Falcon-H1-7B-Instruct": (1_568, 6_005_063_680, 3_120, 3_092_643_840),
    "granite-4.0-h-small": (528, 2_231_894_016, 1_056, 1_159_200_768),
    "Kimi-Linear-48B-A3B-Instruct": (1_888, 1_111_412_736, 3_776, 578_543_616),
    "DeepSeek-V3": (16, 9_210_691_584, 16, 4_605_345_792),
    "GLM-4.7-Flash": (16, 7_096_762_368, 16, 3_548_381_184),
    "phi-4": (16, 26_843_545_600, 16, 13_421_772_800),
}


@pytest.mark.parametrize("model", VLLM_DEFAULT)
def test_both_precisions_take_as_many_bytes_as_vllms_own_planner_says(model: str) -> None:
    spec, paging = spec_of(model), Paging(chunk=16_384)
    found: list[int] = []
    for kv_dtype in ("bf16", "fp8"):
        kv = kv_format("vllm", kv_dtype, spec)
        smallest = min(page.block_size for page in vllm_pages(spec, 1, kv, paging))
        found += [smallest, allocator_bytes(spec, 131_072, kv, "vllm", paging)]
    assert tuple(found) == VLLM_DEFAULT[model]


def test_llama_4s_chunks_take_as_many_bytes_as_vllms_own_planner_says() -> None:
    spec = ModelSpec.from_config({
        "model_type": "llama4_text", "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 5120, "attention_chunk_size": 8192,
    })  # fmt: skip
    assert allocator_bytes(spec, 131_072, BF16, "vllm", Paging(chunk=8192)) == 8_858_370_048


def test_tensor_parallel_ranks_beyond_the_kv_heads_replicate_them() -> None:
    spec = spec_of("Llama-3.1-70B")
    for engine in ENGINES:
        one = allocator_bytes(spec, 4096, BF16, engine, Paging())
        assert allocator_bytes(spec, 4096, BF16, engine, Paging(tp=8)) == one
        assert allocator_bytes(spec, 4096, BF16, engine, Paging(tp=16)) == 2 * one
        assert allocator_bytes(spec, 4096, BF16, engine, Paging(tp=3)) == one * 9 // 8  # 3 heads on each rank


def test_mla_is_replicated_on_every_rank() -> None:
    spec = spec_of("DeepSeek-V3")
    for engine in ENGINES:
        one = allocator_bytes(spec, 4096, BF16, engine, Paging())
        assert allocator_bytes(spec, 4096, BF16, engine, Paging(tp=8)) == 8 * one


@pytest.mark.parametrize(
    ("engine", "kv_dtype", "per_element"),
    [
        ("vllm", "bf16", 2),
        ("vllm", "fp8", 1),
        ("vllm", "int8", (128 + 4) / 128),
        ("vllm", "int4", (64 + 4) / 128),
        ("vllm", "nvfp4", 0.5625),
        ("trtllm", "int8", 1),
        ("sglang", "fp8", 1),
        ("kvtune", "int8", (128 + 2) / 128),
        ("kvtune", "int4", (64 + 4) / 128),
        ("kvtune", "k8v4", (128 + 2 + 64 + 4) / 256),
    ],
)
def test_a_kv_dtype_costs_its_codes_and_its_scales(engine: str, kv_dtype: str, per_element: float) -> None:
    spec = spec_of("Llama-3.1-8B")
    kv = kv_format(engine, kv_dtype, spec)
    assert growth_bytes_per_token(spec, kv) == 32 * 8 * 2 * 128 * per_element


def test_vllms_k8v4_is_sized_where_it_covers_every_attention_layer() -> None:
    spec = spec_of("Qwen3.5-27B")
    assert growth_bytes_per_token(spec, kv_format("vllm", "k8v4", spec)) == 16 * 4 * (256 + 128 + 4)


def test_auto_stores_the_checkpoints_type_and_v32_in_fp8_on_vllm() -> None:
    assert kv_format("kvtune", "auto", spec_of("Llama-3.1-8B")).k.name == "bf16"
    assert kv_format("vllm", "auto", spec_of("DeepSeek-V3.2-Exp")).k.name == "fp8_ds_mla"
    assert kv_format("vllm", "auto", spec_of("DeepSeek-V3")).k.name == "bf16"


@pytest.mark.parametrize(
    ("engine", "kv_dtype", "model"),
    [
        ("kvtune", "nvfp4", "Llama-3.1-8B"),
        ("sglang", "int4", "Llama-3.1-8B"),
        ("vllm", "int8", "DeepSeek-V3"),
        ("vllm", "fp7", "Llama-3.1-8B"),
        ("vllm", "k8v4", "Llama-3.1-8B"),
        ("llamacpp", "bf16", "Llama-3.1-8B"),
    ],
)
def test_a_cache_an_engine_does_not_have_is_a_usage_error(engine: str, kv_dtype: str, model: str) -> None:
    with pytest.raises(UsageError, match="engine"):
        kv_format(engine, kv_dtype, spec_of(model))


@pytest.mark.parametrize("name", bundled_models())
def test_no_engine_allocates_less_than_the_logical_bytes_and_all_grow_with_the_context(name: str) -> None:
    spec = spec_of(name)
    for engine in ENGINES:
        sizes = [allocator_bytes(spec, n, BF16, engine, Paging()) for n in (1, 100, 5000, 200_000)]
        assert sizes == sorted(sizes)
        assert all(
            size >= logical_bytes(spec, n, BF16)
            for n, size in zip((1, 100, 5000, 200_000), sizes, strict=True)
        )


def test_impossible_settings_are_usage_errors() -> None:
    spec = spec_of("Llama-3.1-8B")
    for paging, n in (
        (Paging(block_size=0), 1),
        (Paging(tp=0), 1),
        (Paging(), 0),
        (Paging(block_size=24), 1),
    ):
        with pytest.raises(UsageError):
            allocator_bytes(spec, n, BF16, "kvtune", paging)
