"""Bytes by layer and side: they add up to what the allocator takes, mixed codecs and windows included."""

from __future__ import annotations

import pytest

from kvtune.errors import UsageError
from kvtune.spec import KVFormat, ModelSpec, Paging, allocator_bytes, codec_storage, side_bytes

CONFIG = {
    "model_type": "ministral", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "hidden_size": 512, "head_dim": 64, "vocab_size": 100, "max_position_embeddings": 8192,
    "sliding_window": 256, "torch_dtype": "bfloat16", "intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def mixed() -> KVFormat:
    int8, high = codec_storage("int8"), codec_storage("n4_rh")
    return KVFormat(k=int8, v=int8, overrides={2: (codec_storage("n8_rh"), high), 3: (high, int8)})


@pytest.mark.parametrize("first", [None, "bf16"])
@pytest.mark.parametrize("tokens", [16, 300, 2048])
def test_sides_add_up_to_the_allocators_bytes_where_blocks_need_no_padding(
    tokens: int, first: str | None
) -> None:
    spec = ModelSpec.from_config(CONFIG)
    sides = side_bytes(spec, tokens, mixed(), block_size=16, chunk=512, first_block_codec=first)
    paging = Paging(block_size=16, chunk=512, first_block_codec=first)
    assert sum(k + v for k, v in sides.values()) == allocator_bytes(spec, tokens, mixed(), "kvtune", paging)


def test_a_side_that_is_stored_in_fewer_bits_takes_fewer_bytes_and_moves_no_other_side() -> None:
    spec = ModelSpec.from_config(CONFIG)
    int8 = KVFormat.of("int8")
    before = side_bytes(spec, 2048, int8, block_size=16, chunk=512)
    after = side_bytes(spec, 2048, mixed(), block_size=16, chunk=512)
    assert after[0] == before[0] and after[1] == before[1]
    assert after[3][0] < before[3][0] and after[3][1] == before[3][1]
    assert before[1] == (2048 * 2 * 66, 2048 * 2 * 66)


def test_a_latent_has_no_sides() -> None:
    config = {
        "model_type": "deepseek_v2", "num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512,
        "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "vocab_size": 100, "max_position_embeddings": 512, "num_key_value_heads": 8,
    }  # fmt: skip
    with pytest.raises(UsageError, match="MLA"):
        side_bytes(ModelSpec.from_config(config), 128, KVFormat.of("int8"), block_size=16, chunk=512)
