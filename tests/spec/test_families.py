"""How configs of different families are read, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from kvtune.errors import UnsupportedModelError
from kvtune.plan import find_model
from kvtune.spec import (
    KVFormat,
    LayerKind,
    ModelSpec,
    fixed_bytes_per_sequence,
    growth_bytes_per_token,
    logical_bytes,
)

BF16 = KVFormat.of("bf16")
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
}


def read(**fields: Any) -> ModelSpec:
    return ModelSpec.from_config({**LLAMA, **fields})


def kinds(spec: ModelSpec) -> list[str]:
    return [str(layer.kind) for layer in spec.layers]


def test_missing_kv_heads_mean_as_many_as_query_heads_and_head_dim_is_derived() -> None:
    spec = read(num_key_value_heads=None)
    assert spec.layers[0].num_kv_heads == 8
    assert spec.layers[0].k_head_dim == 64
    assert read(head_dim=80).layers[0].v_head_dim == 80


def test_mistral_slides_in_every_layer_or_in_none() -> None:
    sliding = find_model("Mistral-7B-v0.1").config
    assert kinds(ModelSpec.from_config(sliding)) == ["sliding_attention"] * 32
    assert kinds(ModelSpec.from_config({**sliding, "sliding_window": None})) == ["full_attention"] * 32


def test_a_llama_config_with_a_stray_window_stays_full() -> None:
    assert set(kinds(read(sliding_window=128))) == {"full_attention"}


def test_phi_3_mini_slides_with_its_own_window() -> None:
    spec = read(model_type="phi3", sliding_window=2047)
    assert spec.layers[0].window == 2047


def test_qwen2_slides_above_max_window_layers_only_when_switched_on() -> None:
    fields = {"model_type": "qwen2", "sliding_window": 256, "max_window_layers": 3}
    assert set(kinds(read(**fields, use_sliding_window=False))) == {"full_attention"}
    assert kinds(read(**fields, use_sliding_window=True)) == ["full_attention"] * 3 + ["sliding_attention"]


def test_llama_4_is_chunked_three_layers_of_four() -> None:
    text = {**LLAMA, "model_type": "llama4_text", "head_dim": 128, "attention_chunk_size": 8192}
    spec = ModelSpec.from_config({"model_type": "llama4", "text_config": text})
    assert kinds(spec) == ["chunked_attention"] * 3 + ["full_attention"]
    assert spec.layers[0].window == 8192
    assert growth_bytes_per_token(spec, BF16) == 2 * 2 * 128 * 2


def test_llama_4_takes_its_list_of_layers_without_rope_first() -> None:
    spec = read(model_type="llama4_text", head_dim=128, no_rope_layers=[0, 1, 1, 0])
    assert kinds(spec) == ["full_attention", "chunked_attention", "chunked_attention", "full_attention"]


def test_falcon_7b_has_one_kv_head_and_falcon_40b_eight() -> None:
    falcon = {"model_type": "falcon", "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71}
    assert ModelSpec.from_config({**falcon, "multi_query": True}).layers[0].num_kv_heads == 1
    grouped = {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8}
    newer = ModelSpec.from_config({**falcon, **grouped, "new_decoder_architecture": True})
    assert newer.layers[0].num_kv_heads == 8


def test_gpt_j_is_read_under_its_own_field_names() -> None:
    spec = ModelSpec.from_config({"model_type": "gptj", "n_layer": 28, "n_head": 16, "n_embd": 4096})
    assert growth_bytes_per_token(spec, BF16) == 28 * 2 * 4096 * 2


def test_kimi_k2_costs_what_deepseek_v3_costs() -> None:
    config = {**find_model("DeepSeek-V3").config, "model_type": "kimi_k2", "num_attention_heads": 64}
    assert growth_bytes_per_token(ModelSpec.from_config(config), BF16) == 70_272


def test_shared_layers_name_the_layer_whose_kv_they_read() -> None:
    spec = ModelSpec.from_config(find_model("gemma-3n-E4B-it").config)
    shared = [layer for layer in spec.layers if layer.kind is LayerKind.SHARED]
    assert {layer.shared_with for layer in shared} == {18, 19}
    assert spec.layers[34].shared_with == 19  # the last full layer that stores
    assert all(layer.index not in group.layers for layer in shared for group in spec.kv_groups())


def test_gemma_4_keeps_its_global_geometry_in_a_saved_per_layer_config() -> None:
    config = find_model("gemma-4-26B-A4B-it").config
    text = dict(config["text_config"])
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    del text["num_global_key_value_heads"], text["global_head_dim"]
    text["per_layer_config"] = {str(i): {"head_dim": 512, "num_key_value_heads": 2} for i in full}
    assert ModelSpec.from_config(text).layers == ModelSpec.from_config(config).layers


def test_the_listed_layer_kinds_win_over_the_pattern() -> None:
    spec = read(model_type="gemma2", layer_types=["full_attention"] * 4)
    assert set(kinds(spec)) == {"full_attention"}


def test_nemotron_reads_letters_and_a_list_of_blocks_alike() -> None:
    config = dict(find_model("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16").config)
    words = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    listed = {**config, "layers_block_type": [words[c] for c in config.pop("hybrid_override_pattern")]}
    letters = ModelSpec.from_config(find_model("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16").config)
    assert ModelSpec.from_config(listed).layers == letters.layers


def test_layers_of_one_kind_window_and_geometry_form_one_group_in_layer_order() -> None:
    spec = ModelSpec.from_config(find_model("gemma-3-27b-it").config)
    sliding, full = spec.kv_groups()
    assert (sliding.index, sliding.window, len(sliding.layers)) == (0, 1024, 52)
    assert (full.index, full.window, full.layers) == (1, None, tuple(range(5, 62, 6)))


def test_the_checkpoint_type_is_found_in_the_outer_config_too() -> None:
    assert ModelSpec.from_config(find_model("gemma-3-27b-it").config).dtype == "bf16"
    assert read(torch_dtype="float16").dtype == "fp16"
    assert ModelSpec.from_config({"torch_dtype": "float32", "text_config": LLAMA}).dtype == "fp32"


def test_kimi_linear_counts_its_listed_layers_from_one() -> None:
    linear = {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "num_heads": 32, "head_dim": 128,
              "short_conv_kernel_size": 4}  # fmt: skip
    spec = read(model_type="kimi_linear", kv_lora_rank=512, qk_rope_head_dim=64, linear_attn_config=linear)
    assert kinds(spec) == ["linear_attention"] * 3 + ["mla"]
    assert spec.layers[0].state_bytes == 32 * 128 * 128 * 4 + 3 * 32 * 128 * 3 * 2
    assert growth_bytes_per_token(spec, BF16) == (512 + 64) * 2


def test_falcon_h1_keeps_attention_and_state_in_every_layer() -> None:
    spec = read(model_type="falcon_h1", mamba_n_heads=24, mamba_d_head=128, mamba_d_state=256,
                mamba_n_groups=1, mamba_d_conv=4)  # fmt: skip
    assert kinds(spec) == ["full_attention"] * 4
    assert {layer.state_kind for layer in spec.layers} == {LayerKind.MAMBA2}
    assert growth_bytes_per_token(spec, BF16) == 4 * 2 * 2 * 64 * 2
    state = 24 * 128 * 256 * 4 + (24 * 128 + 2 * 256) * 3 * 2
    assert fixed_bytes_per_sequence(spec, BF16) == 4 * state


def test_lfm2_keeps_two_past_inputs_per_channel_beside_its_attention_layers() -> None:
    spec = read(model_type="lfm2", conv_L_cache=3, full_attn_idxs=[1])
    assert kinds(spec) == ["conv", "full_attention", "conv", "conv"]
    assert fixed_bytes_per_sequence(spec, BF16) == 3 * 512 * 2 * 2


def test_layers_that_borrow_an_index_store_none() -> None:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    borrowing = read(model_type="glm_moe_dsa", indexer_types=["full", "full", "shared", "shared"], **latent)
    assert [layer.index_bytes for layer in borrowing.layers] == [132, 132, 0, 0]
    assert growth_bytes_per_token(borrowing, BF16) == 4 * 1152 + 2 * 132


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba_of_tomorrow"}, "'mamba_of_tomorrow'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "gemma2", "layer_types": ["warp_attention"] * 4}, "'warp_attention'"),
        ({"layer_types": ["linear_attention"] * 4}, "recurrent"),
        ({"layer_types": ["indexed_attention"] * 4}, "index"),
        ({"layer_types": ["full_attention"] * 3}, "'layer_types' lists 3"),
        ({"model_type": "gemma2", "layer_types": [{"a": 1}] * 4}, "a dict"),
        ({"layer_types": "full_attention"}, "expected a list"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*X-"}, "'X'"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*"}, "expected 4 letters"),
        ({"model_type": "nemotron_h"}, "hybrid_override_pattern"),
        ({"model_type": "qwen3_moe", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 4}, "no layer of that kind stores any"),
        ({"model_type": "jamba", "mamba_ssm_dtype": "int3"}, "'int3'"),
        ({"model_type": "deepseek_v3"}, "kv_lora_rank"),
        ({"model_type": "lfm2", "full_attn_idxs": [9], "conv_L_cache": 3}, "'full_attn_idxs'"),
        ({"model_type": "lfm2", "full_attn_idxs": [0]}, "conv_L_cache"),
        ({"model_type": "kimi_linear", "linear_attn_config": {"full_attn_layers": [4]}}, "'kda_layers'"),
        ({"model_type": "falcon_h1", "mamba_n_heads": 4, "mamba_d_head": "auto"}, "mamba_d_head"),
        (
            {
                "model_type": "glm_moe_dsa",
                "indexer_types": ["full"],
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 8,
            },
            "'indexer_types'",
        ),
        ({"per_layer_config": {"9": {"head_dim": 8}}}, "per_layer_config"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_key_value_heads": 2**40}, "num_key_value_heads"),
        ({"num_key_value_heads": -8}, "num_key_value_heads"),
        ({"num_key_value_heads": True}, "num_key_value_heads"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads"),
        ({"num_key_value_heads": 8.0}, "num_key_value_heads"),
        ({"num_attention_heads": 10**5000}, "an integer of"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        ({"hidden_size": 4}, "hidden_size"),
        ({"head_dim": 2**40}, "head_dim"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"torch_dtype": 16}, "torch_dtype"),
    ],
)
def test_what_cannot_be_sized_is_refused_by_field_and_value(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        logical_bytes(read(**fields), 1, BF16)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


def test_a_cyclic_text_config_is_refused() -> None:
    config: dict[str, Any] = {"model_type": "gemma3"}
    config["text_config"] = config
    with pytest.raises(UnsupportedModelError, match="cyclic"):
        ModelSpec.from_config(config)
