"""From `tune --squeeze` on a small Llama to `check` and `verify` of what it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtune import Engine
from kvtune.cli.main import main
from kvtune.config import EngineConfig
from kvtune.engine import EngineTarget
from kvtune.recipe import Recipe
from kvtune.target import Knob
from kvtune.testing.models import write_model_folder
from kvtune.tune import TuneSettings, run
from kvtune.workload import TokenRequest

SESSIONS = 128
VOCAB = 211


class TickingClock:
    """A millisecond per look: every configuration is equally fast, so quality and bytes alone decide."""

    now = 100.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class NestedTarget(EngineTarget):
    """Two codecs and nothing else to search."""

    def knobs(self) -> Sequence[Knob]:
        return tuple(
            Knob(
                name=knob.name, baseline=knob.baseline, is_lossy=knob.is_lossy,
                values=("bf16", "n8_rh") if knob.is_lossy else (knob.baseline,),
            )
            for knob in super().knobs()
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a trace, and what `tune --squeeze` writes for them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("squeeze")
    model = write_model_folder(root / "model", "llama", num_layers=4, vocab_size=VOCAB)
    rows = [
        {"timestamp": 1000 * i, "input_length": 24 + i % 40, "output_length": 24,
         "hash_ids": [10 * i + j for j in range(-(-(24 + i % 40) // 16))]} for i in range(SESSIONS)
    ]  # fmt: skip
    (root / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng, clock = np.random.default_rng(0), TickingClock()
    requests = [
        TokenRequest(
            request_id=f"r{i}", arrival_s=float(i), max_tokens=24, session_id=f"s{i}",
            prompt_token_ids=tuple(int(x) for x in rng.integers(3, VOCAB, int(rng.integers(20, 60)))),
        )
        for i in range(SESSIONS)
    ]  # fmt: skip
    config = EngineConfig(num_threads=1)
    target = NestedTarget(model, config=config, clock=clock, sleep=clock.sleep, nested=True)
    settings = TuneSettings(
        budget_s=200.0, margin="aggressive", kv_budget_bytes=4 << 20, squeeze=True, per_layer=False,
        context=64, max_quality_requests=48, max_confirm_requests=64, max_load_requests=8, load_max_tokens=8,
        engine=config.to_dict(),
    )  # fmt: skip
    run(target, requests, settings, root / "out", clock=clock)
    return root


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def checked(
    folder: Path, capsys: pytest.CaptureFixture[str], recipe: Path | None = None
) -> tuple[int, dict[str, Any]]:
    path, trace = recipe or folder / "out" / "recipe.json", folder / "trace.jsonl"
    words = ("--recipe", str(path), "--workload", str(trace), "--num-requests", str(SESSIONS))
    return asked(capsys, "check", *words, "--trace-block-size", "16")


def rewritten(folder: Path, path: Path, planes: dict[str, list[int]], /, **proof: Any) -> Path:
    """The recipe with other planes, its proof and its hash made to agree; `proof` changes members of it."""
    body = Recipe.load(folder / "out" / "recipe.json").to_dict()
    del body["content_sha256"]
    for section in ("knobs", "cache"):
        body["configuration"][section]["squeeze_planes"] = planes
    body["quality"]["squeeze"] |= {"planes": planes, **proof}
    body["voided_by"] = tuple(body["voided_by"])
    return Recipe(**body).save(path)


def test_the_recipe_serves_the_planes_that_passed_and_carries_their_proof(folder: Path) -> None:
    recipe = Recipe.load(folder / "out" / "recipe.json")
    proof, planes = recipe.quality["squeeze"], recipe.cache_config().squeeze_planes
    assert planes and recipe.verdict == proof["verdict"] == "PASS"
    assert proof["planes"] == {str(layer): list(pair) for layer, pair in planes.items()}
    assert proof["metrics"]["kl"]["excess"]["value"] > recipe.quality["metrics"]["kl"]["excess"]["value"]
    with Engine.from_recipe(folder / "out" / "recipe.json") as engine:
        assert engine.cache_config.squeeze_planes == planes


def test_check_judges_what_is_served_and_what_the_squeeze_leaves_of_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, record = checked(folder, capsys)
    lowered, planes = record["lowered"], Recipe.load(folder / "out" / "recipe.json").knobs["squeeze_planes"]
    assert (code, record["verdict"], lowered["verdict"], lowered["planes"]) == (0, "PASS", "PASS", planes)
    assert lowered["metrics"]["kl"]["excess"]["value"] > record["metrics"]["kl"]["excess"]["value"]


def test_check_fails_planes_that_harm_although_what_is_served_passes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = {str(layer): [1, 1] for layer in range(4)}
    path = rewritten(folder, tmp_path / "recipe.json", everything)
    code, record = checked(folder, capsys, path)
    assert (code, record["verdict"], record["nominal"]["verdict"]) == (1, "FAIL", "PASS")
    assert "low planes" in record["reason"] and record["lowered"]["verdict"] == "FAIL"
    assert main(["check", "--recipe", str(path), "--workload", str(folder / "trace.jsonl"),
                 "--trace-block-size", "16", "--num-requests", "16"]) == 1  # fmt: skip
    assert "lowered     FAIL: " in capsys.readouterr().out


def test_verify_passes_what_nobody_touched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = asked(capsys, "verify", str(folder / "out" / "recipe.json"), "--load")
    facts = {fact["name"]: fact["verdict"] for fact in record["facts"]}
    assert (code, record["verdict"]) == (0, "PASS"), record["facts"]
    assert facts["recipe.squeeze"] == facts["kernel.numbers"] == facts["cache.fingerprint"] == "same"


@pytest.mark.parametrize("verb", [("verify",), ("check", "--workload", "trace.jsonl", "--recipe")])
def test_planes_edited_by_hand_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    verb: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    data = json.loads((folder / "out" / "recipe.json").read_text())
    for section in ("knobs", "cache"):
        data["configuration"][section]["squeeze_planes"] = {"0": [1, 1]}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data))
    code, record = asked(capsys, *verb, str(path))
    assert code == 2 and "content hash differs" in record["error"]["message"]


def test_planes_that_the_proof_did_not_judge_contradict_it_although_the_hash_agrees(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(folder, tmp_path / "recipe.json", {"0": [1, 1]}, planes={"3": [2, 1]})
    code, record = asked(capsys, "verify", str(path))
    assert code == 2 and "contradicts itself" in record["error"]["message"]


def test_verify_fails_when_the_verdict_on_the_planes_is_no_pass_or_not_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planes = Recipe.load(folder / "out" / "recipe.json").knobs["squeeze_planes"]
    code, record = asked(
        capsys, "verify", str(rewritten(folder, tmp_path / "a.json", planes, verdict="FAIL"))
    )
    assert (code, record["verdict"]) == (1, "FAIL")
    body = Recipe.load(folder / "out" / "recipe.json").to_dict()
    del body["content_sha256"], body["quality"]["squeeze"]
    path = Recipe(**{**body, "voided_by": tuple(body["voided_by"])}).save(tmp_path / "b.json")
    code, record = asked(capsys, "verify", str(path))
    unclear = [fact["name"] for fact in record["facts"] if fact["verdict"] == "unclear"]
    assert (code, record["verdict"], unclear) == (1, "UNDECIDED", ["recipe.squeeze"])


@pytest.mark.parametrize(("numbers", "verdict"), [("other", "changed"), (None, "unclear")])
def test_verify_fails_when_the_kernels_read_a_high_plane_otherwise_than_when_it_was_proven(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: str | None, verdict: str
) -> None:
    body = Recipe.load(folder / "out" / "recipe.json").to_dict()
    del body["content_sha256"]
    attention = body["engine"]["behaviour"]["attention"]
    read = attention.pop("n8_rh, 1 plane")
    if numbers is not None:
        attention["n8_rh, 1 plane"] = [1.01 * x for x in read]
    path = Recipe(**{**body, "voided_by": tuple(body["voided_by"])}).save(tmp_path / "recipe.json")
    code, record = asked(capsys, "verify", str(path))
    found = [fact["name"] for fact in record["facts"] if fact["verdict"] == verdict]
    assert (code, found) == (1, ["kernel.numbers"])


def test_a_plane_of_a_layer_the_model_lacks_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rewritten(folder, tmp_path / "recipe.json", {"9": [1, 1]})
    for code, record in (asked(capsys, "verify", str(path)), checked(folder, capsys, path)):
        assert code == 2 and "layer 9" in record["error"]["message"]


@pytest.mark.parametrize(
    "planes",
    [{"03": [2, 1]}, {"3": [2, 1], "03": [1, 1]}, {"3": [2, 1.5]}, {"3": [2, "1"]}, {"3": [2]}, {"x": [1, 1]},
     {"3": "21"}, {"": [1, 1]}, {"-1": [1, 1]}, {"3": [True, 1]}, {"9" * 5000: [1, 1]}],
)  # fmt: skip
def test_planes_written_in_another_way_are_refused_in_one_short_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], planes: Any
) -> None:
    path = rewritten(folder, tmp_path / "recipe.json", planes)
    for code, record in (asked(capsys, "verify", str(path)), checked(folder, capsys, path)):
        message = record["error"]["message"]
        assert code == 2 and "squeeze_planes" in message and len(message) < 600 and "\n" not in message


@pytest.mark.parametrize("verb", [("verify",), ("check", "--workload", "trace.jsonl", "--recipe")])
@pytest.mark.parametrize("content", [None, "", "{}", "{"])
def test_a_folder_that_is_no_model_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    content: str | None, verb: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    model = tmp_path / "model"
    model.mkdir()
    if content is not None:
        (model / "config.json").write_text(content)
    code, record = asked(capsys, *verb, str(folder / "out" / "recipe.json"), "--model", str(model))
    message = record["error"]["message"]
    assert code in (2, 3) and "config" in message and "\n" not in message


def test_check_finds_a_model_that_was_moved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "moved")
    body = Recipe.load(folder / "out" / "recipe.json").to_dict()
    del body["content_sha256"]
    body["model"]["path"] = str(tmp_path / "gone")
    path = Recipe(**{**body, "voided_by": tuple(body["voided_by"])}).save(tmp_path / "recipe.json")
    words = ("check", "--recipe", str(path), "--workload", str(folder / "trace.jsonl"),
             "--trace-block-size", "16", "--num-requests", "16")  # fmt: skip
    code, record = asked(capsys, *words)
    assert code == 2 and "--model" in record["error"]["message"]
    code, record = asked(capsys, *words, "--model", str(tmp_path / "moved"))
    assert code in (0, 1) and record["voided"] == []
