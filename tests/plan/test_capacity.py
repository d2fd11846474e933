"""Engines' own memory rules, what binds first, and which cards to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.errors import InputFileError, UsageError
from kvtune.plan import GPU, GPUS, Plan, PlanRequest, find_model, kv_budget, plan_model, read_prices
from kvtune.plan.budget import sglang_fraction

GIB = 1 << 30
H100 = GPUS["H100-80GB"]


def plan_of(model: str, **request: Any) -> Plan:
    return plan_model(find_model(model), PlanRequest(**request))


def budget(engine: str, **request: Any) -> int:
    return kv_budget(H100, 1, 16 * GIB, PlanRequest(engine=engine, **request)).kv_bytes


def test_vllm_and_kvtune_take_a_fraction_of_the_whole_card() -> None:
    assert budget("vllm") == int(H100.memory_bytes * 0.92) - 18 * GIB
    assert budget("kvtune") == int(H100.memory_bytes * 0.9) - 18 * GIB
    assert budget("vllm", memory_fraction=0.5) == int(H100.memory_bytes * 0.5) - 18 * GIB
    assert budget("vllm", overhead=5 * GIB) == int(H100.memory_bytes * 0.92) - 21 * GIB


def test_tensorrt_takes_its_fraction_of_what_is_left() -> None:
    assert budget("trtllm") == int((H100.memory_bytes - 18 * GIB) * 0.9)


def test_sglang_reserves_by_prefill_chunk_and_captured_batches() -> None:
    # 81,559 MiB: 512 + 8,192 x 1.5 + 256 x 2 + 1/8 x 1,024 = 13,440 MiB reserved
    assert sglang_fraction(H100, 1) == round((81_559 - 13_440) / 81_559, 3)
    small = GPU(name="small", memory_bytes=24 * GIB)
    assert sglang_fraction(small, 1) == round((24_576 - 512 - 3_072 - 48 - 128) / 24_576, 3)
    assert sglang_fraction(small, 8) < sglang_fraction(small, 1)
    large = GPU(name="large", memory_bytes=192 * GIB)
    assert sglang_fraction(large, 1) == round((196_608 - 512 - 24_576 - 1_024 - 128) / 196_608, 3)
    assert budget("sglang") == int(H100.memory_bytes * sglang_fraction(H100, 1)) - 16 * GIB


def test_the_formula_names_every_number() -> None:
    row = kv_budget(H100, 2, 16 * GIB, PlanRequest(engine="vllm", tp=2))
    assert row.formula.startswith("2 x 79.65 GiB x 0.92 - 16.00 GiB weights - 4.00 GiB overhead = ")
    left = kv_budget(H100, 1, 16 * GIB, PlanRequest(engine="trtllm")).formula
    assert left.startswith("(1 x 79.65 GiB - 16.00 GiB weights - 2.00 GiB overhead) x 0.9 = ")


def test_what_binds_first_is_named_per_context() -> None:
    (row,) = plan_of("Llama-3.1-8B", gpu="h200", engine="vllm", contexts=(16, 8192, 131072, 262144)).capacity
    assert row.binds == {
        "16": "max_num_seqs",
        "8192": "kv_memory",
        "131072": "kv_memory",
        "262144": "model_length",
    }
    assert row.running["16"] == 1024 < row.max_concurrency["16"]
    (none,) = plan_of("Llama-3.1-70B", gpu="t4").capacity
    assert set(none.binds.values()) == {"weights"}
    assert none.step_floor_s == {"8192": None, "131072": None}


def test_limits_of_sequences_are_the_engines_own_or_as_given() -> None:
    def running(engine: str, gpu: str, **request: Any) -> int:
        plan = plan_of("gemma-3n-E4B-it", gpu=gpu, engine=engine, contexts=(16,), **request)
        return plan.capacity[0].running["16"]

    assert running("vllm", "h100") == 1024
    assert running("vllm", "a100-80gb", max_num_batched_tokens=16) == 256
    assert running("kvtune", "h100") == 64
    assert running("vllm", "h100", max_num_seqs=7) == 7
    unlimited = plan_of("gemma-3n-E4B-it", gpu="h100", engine="sglang", contexts=(16,)).capacity[0]
    assert unlimited.running == unlimited.max_concurrency


def test_a_step_is_at_least_as_long_as_reading_weights_and_visible_keys() -> None:
    weights = 16 * GIB
    (row,) = plan_of("Llama-3.1-8B", gpu="h100", weights_bytes=weights, contexts=(8192,)).capacity
    read = weights + row.running["8192"] * 8192 * 131_072
    assert row.step_floor_s["8192"] == pytest.approx(read / 3.35e12)


def test_a_card_or_a_budget_that_no_table_knows_can_be_given() -> None:
    (row,) = plan_of("Llama-3.1-8B", gpu_memory=48 * GIB, contexts=(8192,)).capacity
    assert row.kv_budget_bytes == int(48 * GIB * 0.9) - 16_060_522_496 - 2 * GIB
    (given,) = plan_of("Llama-3.1-8B", kv_budget=10 * GIB, contexts=(8192,)).capacity
    assert given.kv_budget_bytes == 10 * GIB
    assert given.max_concurrency == {"8192": 10}


def test_the_fewest_cards_of_each_kind_are_picked_least_memory_first() -> None:
    plan = plan_of("Llama-3.1-70B", engine="vllm", concurrency=8, contexts=(8192, 32_768))
    assert plan.picks
    assert [p.memory_bytes for p in plan.picks] == sorted(p.memory_bytes for p in plan.picks)
    assert all(pick.held >= 8 and pick.price is None for pick in plan.picks)
    h200 = next(pick for pick in plan.picks if pick.gpu == "H200")
    fewer = plan_of("Llama-3.1-70B", engine="vllm", gpu="h200", tp=h200.num_gpus // 2, contexts=(32_768,))
    assert fewer.capacity[0].max_concurrency["32768"] < 8
    same = plan_of("Llama-3.1-70B", engine="vllm", gpu="h200", tp=h200.num_gpus, contexts=(32_768,))
    assert same.capacity[0].max_concurrency["32768"] == h200.held


def test_only_ranks_that_the_heads_allow_are_picked() -> None:
    picks = plan_of("Qwen2.5-7B-Instruct", concurrency=60, contexts=(32_768,)).picks
    assert {pick.num_gpus for pick in picks} <= {1, 2, 4}


def test_with_prices_the_cheapest_set_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"
    path.write_text("gpu, price\nH100, 2.5\nL40S, 0.8\nT4, 0.2\n")
    prices = read_prices(path)
    request = PlanRequest(contexts=(8192,), concurrency=16, engine="vllm")
    picks = plan_model(find_model("Llama-3.1-8B"), request, prices=prices).picks
    assert [pick.price for pick in picks] == sorted(pick.price or 0.0 for pick in picks)
    by_name = {pick.gpu: pick for pick in picks}
    assert by_name["H100-80GB"].price == 2.5 * by_name["H100-80GB"].num_gpus
    cheapest = by_name["H100-80GB"]
    assert cheapest.price_per_sequence == pytest.approx((cheapest.price or 0) / cheapest.held)
    assert set(by_name) <= {"H100-80GB", "L40S", "T4"}


def test_prices_are_read_from_json_and_for_cards_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"H200": 3, "rtx 4090": 0.4}))
    assert [(gpu.name, price) for gpu, price in read_prices(tmp_path / "p.json")] == [
        ("H200", 3.0),
        ("RTX-4090", 0.4),
    ]
    (tmp_path / "p.csv").write_text("price,GPU,memory\n1.5,Abacus-9,96GiB\n")
    ((gpu, price),) = read_prices(tmp_path / "p.csv")
    assert (gpu.name, gpu.memory_bytes, price) == ("Abacus-9", 96 * GIB, 1.5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "gpu,price"),
        ("card,cost\nH100,1\n", "gpu,price"),
        ("gpu,price\n", "no prices"),
        ("gpu,price\nH100,cheap\n", "line 2"),
        ("gpu,price\nH100,nan\n", "above 0"),
        ("gpu,price\nH100,-1\n", "above 0"),
        ("gpu,price\nH100\n", "above 0"),
        ("gpu,price\nAbacus-9,1\n", "Abacus-9"),
        ("gpu,price,memory\nAbacus-9,1,lots\n", "lots"),
        ("{", "not JSON"),
        ('{"H100": [1]}', "above 0"),
        ("gpu,price\n" + '"' + "x" * 200_000, "line"),
    ],
)
def test_a_price_file_that_is_none_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "prices"
    path.write_text(content)
    with pytest.raises(InputFileError) as error:
        read_prices(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_missing_binary_or_huge_price_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)
    for name in ("missing", "binary", "huge"):
        with pytest.raises(InputFileError):
            read_prices(tmp_path / name)


def test_picking_needs_the_weights() -> None:
    source = find_model("gpt-oss-20b")
    bare = type(source)(name="mine", config=source.config)
    with pytest.raises(UsageError, match="--weights-bytes"):
        plan_model(bare, PlanRequest(concurrency=4))
