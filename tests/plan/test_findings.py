"""When a setting makes things worse, the plan says so with numbers; when it does not, it keeps silent."""

from __future__ import annotations

from typing import Any

from kvtune.plan import Finding, PlanRequest, find_model, plan_model


def findings(model: str, **request: Any) -> dict[str, Finding]:
    plan = plan_model(find_model(model), PlanRequest(**request))
    return {finding.code: finding for finding in plan.findings}


def test_a_plain_model_with_plain_settings_has_nothing_to_mind() -> None:
    assert findings("Llama-3.1-8B", engine="vllm", contexts=(8192,)) == {}
    assert findings("Qwen3-32B", kv_dtype="int8", tp=8, contexts=(8192, 32_768)) == {}


def test_fp8_doubles_the_block_of_a_hybrid_and_says_what_that_costs() -> None:
    found = findings("Qwen3.5-27B", engine="vllm", kv_dtype="fp8", contexts=(512, 8192))
    block = found["small-codec-enlarges-blocks"]
    assert block.numbers["block_tokens"] == 2 * block.numbers["block_tokens_16_bit"] == 1568
    assert "784 to 1,568" in block.message
    assert found["prefix-cache-needs-long-prefixes"].numbers["bytes_at_12_tokens"] == 196 * 2**20
    saved = found["codec-saves-nothing"]
    assert (saved.numbers["context"], saved.numbers["ratio"]) == (512, 1.0)
    assert found["prefix-cache-cannot-hit"].numbers == {"context": 512, "block_tokens": 1568}
    assert all(f.severity == "warning" for f in (block, saved, found["prefix-cache-cannot-hit"]))


def test_a_hybrid_in_16_bit_is_warned_of_its_block_but_not_of_a_codec() -> None:
    found = findings("Qwen3.5-27B", engine="vllm", contexts=(8192,))
    assert "prefix-cache-needs-long-prefixes" in found
    assert not {"small-codec-enlarges-blocks", "codec-saves-nothing"} & found.keys()


def test_our_own_blocks_do_not_grow_with_a_hybrids_state() -> None:
    found = findings("Qwen3.5-27B", kv_dtype="int8", contexts=(8192, 131_072))
    assert not {"prefix-cache-needs-long-prefixes", "small-codec-enlarges-blocks"} & found.keys()
    assert "linear_attention" in found["sized-only"].message


def test_an_mla_latent_is_copied_to_every_rank() -> None:
    found = findings("DeepSeek-V3", engine="vllm", tp=8, contexts=(8192,))["kv-copied-across-ranks"]
    assert "8 copies" in found.message
    assert "data-parallel" in found.message
    assert found.numbers["copied_share"] == 7 / 8


def test_few_kv_heads_are_copied_beyond_as_many_ranks() -> None:
    assert "kv-copied-across-ranks" not in findings("Llama-3.1-70B", tp=8)
    found = findings("Llama-3.1-70B", tp=16)["kv-copied-across-ranks"]
    assert "fewer KV heads than ranks" in found.message


def test_a_long_step_over_a_short_window_costs_what_shorter_steps_would_save() -> None:
    found = findings("gpt-oss-120b", engine="vllm", contexts=(8192,))["window-slack"]
    shorter = findings("gpt-oss-120b", engine="vllm", contexts=(8192,), max_num_batched_tokens=128)
    assert found.numbers["saved_bytes"] > 100 * 2**20
    assert "window-slack" not in shorter


def test_a_block_longer_than_a_sequence_cannot_hit() -> None:
    found = findings("Llama-3.1-8B", block_size=1024, contexts=(512, 100_000))
    assert found["prefix-cache-cannot-hit"].numbers["context"] == 512
    assert "smaller --block-size" in found["block-rounding"].message


def test_padding_layers_of_vllm_are_named() -> None:
    found = findings("gemma-3-27b-it", engine="vllm", contexts=(8192,))
    assert "padding" in found


def test_warnings_come_before_notes() -> None:
    plan = plan_model(
        find_model("Qwen3.5-27B"), PlanRequest(engine="vllm", kv_dtype="fp8", contexts=(512, 8192))
    )
    severities = [finding.severity for finding in plan.findings]
    assert severities == sorted(severities, reverse=True)
