"""`kvtune tune` on real request files ends in a recipe that a new process reproduces token for token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtune.testing.reference import reference_model_path
from kvtune.workload import generate_chat, write_workload

pytestmark = pytest.mark.proof

REPRODUCE = """
import json, sys
import torch
from kvtune import Engine, SamplingParams

torch.set_num_threads(1)
engine = Engine.from_recipe(sys.argv[1])
engine.reset_prefix_cache()
lines = [json.loads(line) for line in open(sys.argv[2])]
wrong = {"miss": 0, "hit": 0}
hits = 0
for kind in wrong:
    for line in lines:
        params = SamplingParams(max_tokens=line["max_tokens"], temperature=0.0, ignore_eos=line["ignore_eos"])
        if kind == "miss":
            engine.reset_prefix_cache()
            outputs = [engine.generate([line["prompt_token_ids"]], params)[0]]
        else:
            outputs = [engine.generate([line["prompt_token_ids"]], params)[0] for _ in range(2)]
            hits += outputs[-1].num_cached_tokens
        wrong[kind] += list(outputs[-1].token_ids) != list(line["token_ids"])
print(json.dumps({"requests": len(lines), "wrong": wrong, "hit_tokens": hits,
                  "codecs": [engine.cache_config.k_codec, engine.cache_config.v_codec]}))
"""


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=1200, check=False, cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def tune(tmp_path: Path, workload: Path, *extra: str) -> tuple[dict, Path]:
    out = tmp_path / "out"
    result = run(
        "-m", "kvtune", "tune", str(reference_model_path()), "--workload", str(workload), "--out", str(out),
        "--budget", "4m", "--dtype", "float32", "--num-requests", "200", "--json", *extra, cwd=tmp_path,
    )  # fmt: skip
    return json.loads(result.stdout), out


def reproduce(tmp_path: Path, out: Path) -> dict:
    result = run("-c", REPRODUCE, str(out / "recipe.json"), str(out / "confirmation.jsonl"), cwd=tmp_path)
    return json.loads(result.stdout.splitlines()[-1])


def assert_reproduced(tmp_path: Path, out: Path) -> None:
    found = reproduce(tmp_path, out)
    assert found["requests"] >= 8
    assert found["wrong"] == {"miss": 0, "hit": 0}, found
    assert found["hit_tokens"] > 0


def sharegpt_file(path: Path) -> Path:
    """A ShareGPT export: conversations with recorded answers."""
    chat = generate_chat(num_requests=220, seed=5)
    last = {request.session_id: request for request in chat.requests}
    conversations = []
    for session, request in last.items():
        turns = [
            {"from": {"user": "human", "assistant": "gpt"}.get(m.role, m.role), "value": m.content}
            for m in request.messages
        ]
        conversations.append(
            {"id": session, "conversations": [*turns, {"from": "gpt", "value": "It joins paths."}]}
        )
    path.write_text(json.dumps(conversations))
    return path


def openai_file(path: Path) -> Path:
    lines = [
        json.dumps(
            {"messages": [{"role": m.role, "content": m.content} for m in r.messages], "max_tokens": 32}
        )
        for r in generate_chat(num_requests=200, seed=6).requests
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_sharegpt_file_ends_in_a_recipe_that_a_new_process_reproduces(tmp_path: Path) -> None:
    result, out = tune(tmp_path, sharegpt_file(tmp_path / "sharegpt.json"))
    assert result["quality"]["verdict"] == "PASS"
    assert_reproduced(tmp_path, out)


def test_an_openai_chat_file_ends_in_a_recipe_that_a_new_process_reproduces(tmp_path: Path) -> None:
    result, out = tune(tmp_path, openai_file(tmp_path / "chat.jsonl"))
    assert result["quality"]["verdict"] == "PASS"
    assert_reproduced(tmp_path, out)


def test_a_canonical_file_written_by_kvtune_is_tuned_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "canonical.jsonl"
    write_workload(generate_chat(num_requests=200, seed=7), path)
    result, out = tune(tmp_path, path)
    assert Path(result["recipe"]).exists()
    assert_reproduced(tmp_path, out)


@pytest.mark.skipif(
    "KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES=DIR names the folder of real traces"
)
def test_a_real_trace_ends_in_a_recipe_that_says_its_text_is_synthetic(tmp_path: Path) -> None:
    trace = Path(os.environ["KVTUNE_TRACES"]) / "mooncake_conversation.jsonl.gz"
    result, out = tune(tmp_path, trace, "--scale", "0.03125")
    assert "synthetic" in json.dumps(result["quality"])
    assert result["quality"].get("proven") is not True or result["quality"].get("lossless")
    if (out / "confirmation.jsonl").read_text():
        assert_reproduced(tmp_path, out)
