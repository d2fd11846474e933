"""`kvtune plan` as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {"schema_version", "model", "kv", "at_context", "capacity"}
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
        (["qwen3-32b", "--kv-dtype", "fp8"], "fp8"),
        (["qwen3-32b", "--engine", "abacus"], "abacus"),
        (["qwen3-32b", "--context", "many"], "many"),
        (["qwen3-32b", "--block-size", "24"], "24"),
        (["qwen3-32b", "--tp", "0"], "0"),
        (["qwen3-32b", "--gpu", "abacus"], "abacus"),
        (["qwen3-32b", "--weights-bytes", "heavy"], "heavy"),
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


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvtune.cli.main import main; "
        "code = main(['plan', 'qwen3-32b', '--json']); "
        f"print([m for m in {HEAVY!r} if m in sys.modules], 'rich' in sys.modules, code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.splitlines()[-1] == "[] False 0", result.stderr
