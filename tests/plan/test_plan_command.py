"""`kvtune plan` as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from process_time import assert_starts_within

KEYS = {"schema_version", "model", "kv", "at_context", "capacity"}
UNUSED = ("rich", "kvtune.workload", "kvtune.cache", "kvtune.report")
"""What a plan without a trace, a page or a table of colours has no need of."""
HEAVY = ("torch", "transformers", "triton", "vllm", "optuna", "tokenizers", "safetensors")


def plan(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvtune", "plan", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_json_is_one_object_with_the_promised_keys() -> None:
    result = plan("openai/gpt-oss-120b", "--json", "--context", "8192,131072", "--gpu", "H100")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    body = json.loads(result.stdout)
    assert body.keys() >= KEYS
    assert body["schema_version"] == 1
    assert body["model"] == "openai/gpt-oss-120b"
    assert body["kv"]["growth_bytes_per_token"] == 36_864
    assert body["kv"]["fixed_bytes_per_sequence"] == 4_718_592
    assert {(row["kind"], row["count"]) for row in body["kv"]["layers"]} == {
        ("sliding_attention", 18),
        ("full_attention", 18),
    }
    assert body["at_context"].keys() == {"8192", "131072"}
    assert body["at_context"]["8192"].keys() >= {"logical_bytes", "allocator_bytes"}
    (row,) = body["capacity"]
    assert row.keys() >= {"gpu", "kv_budget_bytes", "max_tokens", "max_concurrency"}
    assert row["max_concurrency"].keys() == {"8192", "131072"}


def test_without_json_a_reader_sees_units_and_assumptions() -> None:
    result = plan("qwen3.5-27b", "--gpu", "h200")
    assert result.returncode == 0, result.stderr
    for said in (
        "65,536 B per token",
        "146.81 MiB",
        "linear_attention",
        "8.14 GiB",
        "H200",
        "recurrent state",
    ):
        assert said in result.stdout


def test_a_config_of_the_users_own_is_planned(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3", "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = plan(str(tmp_path), "--kv-dtype", "k8v4", "--json")
    assert json.loads(result.stdout)["kv"]["growth_bytes_per_token"] == 3 * 2 * (64 + 2 + 32 + 4)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no-such-model"], "no-such-model"),
        (["qwen3-32b", "--kv-dtype", "int7"], "int7"),
        (["qwen3-32b", "--kv-dtype", "nvfp4"], "nvfp4"),
        (["qwen3-32b", "--engine", "abacus"], "abacus"),
        (["qwen3-32b", "--context", "many"], "many"),
        (["qwen3-32b", "--block-size", "24"], "24"),
        (["qwen3-32b", "--tp", "0"], "0"),
        (["qwen3-32b", "--gpu", "abacus"], "abacus"),
        (["qwen3-32b", "--weights-bytes", "heavy"], "heavy"),
        (["qwen3-32b", "--tp", "7"], "64 attention heads"),
        (["qwen3-32b", "--gpu", "h100", "--gpu-memory", "48GiB"], "--gpu-memory"),
        (["qwen3-32b", "--memory-fraction", "1.5"], "1.5"),
        (["qwen3-32b", "--memory-fraction", "nan"], "nan"),
        (["qwen3-32b", "--prices", "/no/such/prices.csv"], "/no/such/prices.csv"),
        (["qwen3-32b", "--host-bandwidth", "25GB/s"], "--host 256GiB"),
        (["qwen3-32b", "--host", "64GiB", "--host-bandwidth", "fast"], "fast"),
        (["qwen3-32b", "--host", "64GiB", "--prefill-rate", "0"], "prefill"),
        (["qwen3-32b", "--what-if", "cap=8192"], "--trace"),
        (["qwen3-32b", "--trace", "/no/such/trace"], "/no/such/trace"),
    ],
)
def test_a_wrong_request_is_exit_2_one_line_and_still_one_json_object(args: list[str], said: str) -> None:
    result = plan(*args, "--json")
    assert result.returncode == 2
    assert said in json.loads(result.stdout)["error"]["message"]
    assert len(result.stderr.strip().splitlines()) == 1
    assert plan(*args).stdout == ""


@pytest.mark.parametrize("heads", [0, 2**40])
def test_a_config_with_impossible_heads_is_exit_2_naming_the_field(tmp_path: Path, heads: int) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": heads, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = plan(str(tmp_path))
    assert result.returncode == 2
    assert "num_attention_heads" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer_types": ["full_attention", "warp_attention"]}, "warp_attention"),
        ({"model_type": "mamba_of_tomorrow"}, "model_type"),
        ({"head_dim": 2**70}, "head_dim"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_what_no_model_can_have_is_exit_2_naming_the_field(
    tmp_path: Path, fields: dict[str, object], named: str
) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    result = plan(str(tmp_path))
    assert result.returncode == 2
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_formulas_hold_the_numbers(tmp_path: Path) -> None:
    result = plan("gpt-oss-20b", "--explain", "--gpu", "h100", "--context", "8192")
    for said in (
        "12 layers x 8 heads x (K 64 in bf16 = 128 B + V 64 in bf16 = 128 B) = 24,576 B per token",
        "ceil(8,192 / 16)",
        "1 x 79.65 GiB x 0.9",
    ):
        assert said in result.stdout
    body = json.loads(plan("gpt-oss-20b", "--explain", "--json").stdout)
    assert "growth = 24,576 B per token; fixed = 3.00 MiB per sequence" in body["explain"]
    assert "explain" not in json.loads(plan("gpt-oss-20b", "--json").stdout)


def test_prices_tiers_and_a_trace_are_part_of_the_one_object(tmp_path: Path) -> None:
    (tmp_path / "prices.csv").write_text("gpu,price\nH100,2.5\nH200,3.1\n")
    rows = [
        {"timestamp": 10 * i, "input_length": 1000, "output_length": 24, "hash_ids": [0, i + 1]}
        for i in range(20)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "qwen3-32b", "--gpu", "h200", "--prices", str(tmp_path / "prices.csv"), "--host", "256GiB",
        "--disk", "2TiB", "--disk-bandwidth", "6GB/s", "--trace", str(tmp_path / "trace.jsonl"),
        "--trace-block-size", "512", "--what-if", "cap=8192,codec=int8",
    ]  # fmt: skip
    result = plan(*args, "--json")
    assert result.returncode == 0, result.stderr
    body = json.loads(result.stdout)
    assert {pick["gpu"] for pick in body["picks"]} == {"H100-80GB", "H200"}
    assert [tier["name"] for tier in body["tiers"]] == ["host", "disk"]
    assert body["tiers"][1]["bandwidth"] == 6e9
    assert [row["change"] for row in body["trace"]["what_ifs"]] == ["cap=8192", "codec=int8"]
    assert body["trace"]["reuse"]["hit_rate"] == pytest.approx(19 * 512 / 20_000)
    assert body["trace"]["kv_budget_bytes"] == body["capacity"][0]["kv_budget_bytes"]
    text = plan(*args).stdout
    for said in ("cards that hold it", "host tier of 256.00 GiB", "disk tier", "changes", "codec=int8"):
        assert said in text


def test_planning_starts_within_three_tenths_of_a_second_of_a_bare_numpy() -> None:
    assert_starts_within(0.3, "-m", "kvtune", "plan", "qwen3-32b", "--json")


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvtune.cli.main import main; "
        "code = main(['plan', 'qwen3-32b', '--json']); "
        f"print([m for m in {(*HEAVY, *UNUSED)!r} if m in sys.modules], code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.splitlines()[-1] == "[] 0", result.stderr
