"""The numbers of a plan and how they hang together."""

from __future__ import annotations

from typing import Any

import pytest

from kvtune.errors import UsageError
from kvtune.plan import GPUS, ModelSource, PlanRequest, contexts_from_text, find_model, plan_model
from kvtune.spec import KVFormat, ModelSpec, Paging, allocator_bytes


def plan_of(model: str, **request: Any) -> dict[str, Any]:
    return plan_model(find_model(model), PlanRequest(**request)).to_dict()


def sizes(plan: dict[str, Any], context: str) -> tuple[int, int]:
    at = plan["at_context"][context]
    return at["logical_bytes"], at["allocator_bytes"]


def test_bytes_at_a_context_are_specs_own() -> None:
    plan = plan_of("Llama-3.1-8B", contexts=(1, 8192))
    assert plan["kv"]["growth_bytes_per_token"] == 131_072
    assert sizes(plan, "8192") == (2**30, 2**30)
    assert sizes(plan, "1") == (131_072, 16 * 131_072)


def test_layers_are_counted_by_kind_and_geometry() -> None:
    rows = plan_of("google/gemma-4-26B-A4B-it")["kv"]["layers"]
    assert [
        (row["kind"], row["count"], row["num_kv_heads"], row["k_head_dim"], row["window"]) for row in rows
    ] == [
        ("sliding_attention", 25, 8, 256, 1024),
        ("full_attention", 5, 2, 512, None),
    ]
    assert sum(row["count"] for row in rows) == 30


def test_capacity_follows_from_memory_weights_and_allocator_bytes() -> None:
    weights = 16_000_000_000
    plan = plan_of("Llama-3.1-8B", gpu="h100", weights_bytes=weights, contexts=(8192,))
    (row,) = plan["capacity"]
    budget = int(GPUS["H100-80GB"].memory_bytes * 0.9) - weights - (2 << 30)
    assert row["kv_budget_bytes"] == budget
    assert row["max_concurrency"] == {"8192": budget // 2**30}
    assert row["max_tokens"] == budget // (16 * 131_072) * 16


def test_the_longest_sequence_is_the_last_one_that_fits() -> None:
    plan = plan_of("gemma-3-27b-it", gpu="a100-80gb", kv_dtype="int8")
    (row,) = plan["capacity"]
    spec = ModelSpec.from_config(find_model("gemma-3-27b-it").config)

    def size(n: int) -> int:
        return allocator_bytes(spec, n, KVFormat.of("int8"), "kvtune", Paging(chunk=512))

    assert size(row["max_tokens"]) <= row["kv_budget_bytes"] < size(row["max_tokens"] + 1)


def test_more_ranks_bring_more_memory_and_mla_eats_it_again() -> None:
    one = plan_of("DeepSeek-V3", gpu="h200", tp=8, contexts=(8192,))["capacity"][0]
    two = plan_of("DeepSeek-V3", gpu="h200", tp=16, contexts=(8192,))["capacity"][0]
    assert two["kv_budget_bytes"] > 2 * one["kv_budget_bytes"]
    per_sequence = 575_668_224  # 8,192 x 70,272, on every rank
    assert one["max_concurrency"]["8192"] == one["kv_budget_bytes"] // (8 * per_sequence)
    assert two["max_concurrency"]["8192"] == two["kv_budget_bytes"] // (16 * per_sequence)


def test_a_model_that_does_not_fit_has_no_room_rather_than_a_negative_one() -> None:
    (row,) = plan_of("Llama-3.1-70B", gpu="t4")["capacity"]
    assert row["kv_budget_bytes"] == 0
    assert row["max_tokens"] == 0
    assert set(row["max_concurrency"].values()) == {0}


def test_without_a_gpu_every_listed_one_is_shown() -> None:
    assert [row["gpu"] for row in plan_of("Llama-3.1-8B")["capacity"]] == list(GPUS)


def test_a_model_of_windows_only_has_no_longest_sequence() -> None:
    (row,) = plan_of("Mistral-7B-v0.1", gpu="a100-80gb")["capacity"]
    assert row["max_tokens"] is None


def test_unknown_weights_give_no_capacity_and_say_what_to_pass() -> None:
    config = {**find_model("gpt-oss-20b").config}
    plan = plan_model(ModelSource(name="mine", config=config), PlanRequest()).to_dict()
    assert plan["weights_bytes"] is None
    assert not plan["capacity"]
    assert any("--weights-bytes" in note for note in plan["assumptions"])


def test_what_is_assumed_is_said() -> None:
    notes = " ".join(
        plan_of("Qwen3-Next-80B-A3B-Instruct", engine="sglang", contexts=(1 << 20,))["assumptions"]
    )
    for said in (
        "recurrent state",
        "further padding is not modelled",
        "beyond the model's own limit",
        "GPU memory",
    ):
        assert said in notes


@pytest.mark.parametrize(
    "request_",
    [{"kv_dtype": "int7"}, {"contexts": ()}, {"contexts": (0,)}, {"contexts": (1 << 40,)}, {"tp": 0},
     {"block_size": -16}, {"block_size": 1 << 40}, {"weights_bytes": -1}, {"overhead": -1},
     {"memory_fraction": 0.0}, {"memory_fraction": 1.5}, {"engine": "abacus"}, {"max_num_seqs": 0},
     {"max_num_batched_tokens": 0}, {"concurrency": 0}, {"gpu": "h100", "kv_budget": 1 << 30}],
)  # fmt: skip
def test_values_out_of_range_are_usage_errors(request_: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PlanRequest(**request_)


def test_contexts_are_read_from_a_list_sorted_and_once_each() -> None:
    assert contexts_from_text(" 131072, 8192,8192") == (8192, 131072)


@pytest.mark.parametrize("text", ["", "8k", "1,,2", "-5", "1.5", "٣", "9" * 100])
def test_a_bad_list_of_contexts_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--context"):
        contexts_from_text(text)
