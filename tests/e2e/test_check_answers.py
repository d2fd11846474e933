"""`kvtune check` with a user's own requests and rules, on the reference model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.cli.main import main
from kvtune.recipe import Recipe, configuration_of
from kvtune.testing.reference import reference_model_path

BASELINE = {
    "k_codec": "bf16", "v_codec": "bf16", "block_size": 16, "enable_prefix_caching": True,
    "max_num_seqs": 16, "max_num_batched_tokens": 512,
}  # fmt: skip


def recipe(path: Path, codec: str) -> Path:
    knobs = {**BASELINE, "k_codec": codec, "v_codec": codec}
    model = reference_model_path()
    Recipe(
        model={"path": str(model), "weights_sha256": "", "config_sha256": "", "tokenizer_sha256": ""},
        engine={"name": "kvtune"}, hardware={}, workload={}, read_contract="T0", kernel="",
        codec_constants_sha256="", evidence={}, fallback={},
        configuration=configuration_of(knobs, kv_budget_bytes=64 << 20, engine={"num_threads": 1}),
        baseline={"configuration": BASELINE}, quality={"verdict": "PASS"},
        provenance={"margin": {"name": "aggressive", "probes": 0.3}},
    ).save(path)  # fmt: skip
    return path


def chats(path: Path, count: int) -> Path:
    rows = [
        {"messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"My city is number {i}. What is a river?"},
            {"role": "assistant", "content": "A stream of water."},
            {"role": "user", "content": f"What is stone {i}?"}], "max_tokens": 24}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], *extra: str) -> dict[str, Any]:
    words = ["check", "--recipe", str(recipe(tmp_path / "recipe.json", "int8")), "--json"]
    workload = chats(tmp_path / "chats.jsonl", 24)
    main([*words, "--workload", str(workload), "--num-requests", "24", *extra])
    return dict(json.loads(capsys.readouterr().out))


def test_probes_high_value_requests_and_a_checker_are_part_of_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rules.py").write_text(
        "def wordy(request, answer):\n    return bool(request['messages']) and len(answer) >= 0\n"
    )
    monkeypatch.chdir(tmp_path)
    precious = chats(tmp_path / "precious.jsonl", 3)
    record = checked(tmp_path, capsys, "--high-value", str(precious), "--judge", "rules:wordy")
    assert record["probes"]["num_questions"] > 10 and record["metrics"]["probes"]["margin"] == 0.3
    answers = record["answers"]
    assert answers["checker"] == "rules:wordy" and answers["high_value"] and answers["harm"] == ""
    assert answers["num_requests"] == 3 + 24
    assert record["cannot_see"] and record["covered"]["requests"] and record["forward_passes"] <= 2


def test_a_checker_that_does_not_exist_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = checked(tmp_path, capsys, "--judge", "no_such_rules:f")
    assert record["error"]["exit_code"] == 2 and "no_such_rules" in record["error"]["message"]
