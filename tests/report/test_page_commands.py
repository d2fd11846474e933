"""`--html` of plan and simulate: the page that the command writes says what the command prints."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000,
    "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Forty conversations of up to five turns, in Mooncake's schema."""
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        for number in range(200):
            turn, talk = number // 40 + 1, number % 40
            ids = [0, *(1 + 100 * talk + block for block in range(2 * turn))]
            row = {
                "timestamp": 250 * number,
                "input_length": 512 * len(ids) - (511 * number) % 512,
                "output_length": 20 + talk,
            }
            file.write(json.dumps({**row, "hash_ids": ids}) + "\n")
    return path


def kvtune(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvtune", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def record_in(page: Path) -> dict[str, Any]:
    found = re.search(r'data-testid="record"><code>(.*?)</code>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(html.unescape(found[1]))


def printed_and_shown(page: Path, *args: object) -> tuple[dict[str, Any], dict[str, Any]]:
    result = kvtune(*args, "--html", page, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), record_in(page)


def test_the_page_of_a_replay_holds_what_json_prints(trace: Path, tmp_path: Path) -> None:
    printed, shown = printed_and_shown(
        tmp_path / "p.html", "simulate", trace, "--policy", "lru,fifo", "--capacity", "50,120"
    )
    assert {key: shown[key] for key in printed} == printed
    assert shown["statistics"]["num_requests"] == 200
    text = (tmp_path / "p.html").read_text()
    assert "Blocks hit by cache size" in text
    assert "fifo between lru and the best possible" in text


def test_the_page_of_a_plan_holds_what_json_prints(config: Path, trace: Path, tmp_path: Path) -> None:
    printed, shown = printed_and_shown(
        tmp_path / "p.html", "plan", config, "--trace", trace, "--kv-budget", "64MiB", "--context", "4096"
    )
    assert shown == printed
    assert printed["trace"]["cache"]["curve"]["knee"]
    text = (tmp_path / "p.html").read_text()
    for figure in ("Requests held on average", "Blocks hit by cache size", "Prompt lengths"):
        assert figure in text


def test_a_plan_without_a_trace_has_a_page_too(config: Path, tmp_path: Path) -> None:
    printed, shown = printed_and_shown(tmp_path / "p.html", "plan", config)
    assert shown == printed


def test_the_page_of_a_simulated_server_holds_what_json_prints(trace: Path, tmp_path: Path) -> None:
    printed, shown = printed_and_shown(
        tmp_path / "p.html",
        "simulate",
        trace,
        "--mode",
        "serve",
        "--model",
        "meta-llama/Llama-3.1-8B",
        "--gpu",
        "H100",
        "--num-prompts",
        40,
    )
    assert {key: shown[key] for key in printed} == printed
    assert shown["statistics"]["num_requests"] == 40
    assert "Requests in the server" in (tmp_path / "p.html").read_text()


def test_a_page_that_cannot_be_written_is_one_line_and_exit_2(config: Path, tmp_path: Path) -> None:
    result = kvtune("plan", config, "--html", tmp_path / "nowhere" / "p.html")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "nowhere" in result.stderr


def test_the_terminal_draws_the_curve_and_names_the_knee(trace: Path) -> None:
    result = kvtune("simulate", trace, "--capacity", "50")
    assert result.returncode == 0, result.stderr
    assert "knee:" in result.stdout
    assert any("\u2800" <= letter <= "\u28ff" for letter in result.stdout)
