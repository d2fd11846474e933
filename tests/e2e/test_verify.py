"""`kvtune verify` passes unchanged and names whatever drifted, with the exit codes of the contract."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from proven import chats, proven_recipe

from kvtune.adapters.vllm_install import VLLMInstall, VLLMOffer
from kvtune.adapters.vllm_server import VLLMTarget
from kvtune.cli.main import main
from kvtune.recipe import Recipe, configuration_of
from kvtune.testing.reference import reference_model_path

Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of its own, a workload, and int8 and n8_rh recipes proven on them."""
    root = tmp_path_factory.mktemp("proven")
    shutil.copytree(reference_model_path(), root / "model", ignore=shutil.ignore_patterns("__pycache__"))
    workload = chats(root / "chats.jsonl", 80)
    for codec in ("int8", "n8_rh"):
        proven_recipe(root / f"{codec}.json", root / "model", workload, codec)
    return root


@pytest.fixture
def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Runs `kvtune verify --json`: (exit code, the object printed)."""

    def run(recipe: Path | None = None, *words: str) -> tuple[int, dict[str, Any]]:
        code = main(["verify", str(recipe or folder / "int8.json"), "--json", *words])
        return code, json.loads(capsys.readouterr().out)

    return run


def changed(record: dict[str, Any], verdict: str = "changed") -> list[str]:
    return [fact["name"] for fact in record["facts"] if fact["verdict"] == verdict]


@pytest.mark.parametrize("codec", ["int8", "n8_rh"])
def test_what_nobody_touched_passes(folder: Path, verify: Verify, codec: str) -> None:
    code, record = verify(folder / f"{codec}.json", "--workload", str(folder / "chats.jsonl"))
    assert (code, record["verdict"]) == (0, "PASS"), changed(record)
    assert {f["verdict"] for f in record["facts"]} == {"same"}
    assert f"codecs.{codec}" in [f["name"] for f in record["facts"]] and record["not_looked_at"]


def test_a_fresh_draw_of_the_same_traffic_passes(folder: Path, tmp_path: Path, verify: Verify) -> None:
    fresh = chats(tmp_path / "fresh.jsonl", 90, seed=5, first=300)
    code, record = verify(None, "--workload", str(fresh))
    assert code == 0, record["facts"]


def test_doubled_lengths_fail(folder: Path, tmp_path: Path, verify: Verify) -> None:
    code, record = verify(None, "--workload", str(chats(tmp_path / "d.jsonl", 90, first=300, repeat=2)))
    assert (code, record["verdict"]) == (1, "FAIL")
    assert "workload.prompt_length" in changed(record)
    assert record["next_command"].startswith("kvtune check --recipe ")


def test_too_little_traffic_to_tell_is_no_pass(folder: Path, tmp_path: Path, verify: Verify) -> None:
    code, record = verify(None, "--workload", str(chats(tmp_path / "few.jsonl", 4)))
    assert (code, record["verdict"]) == (1, "UNDECIDED")


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "model", tmp_path / "model")
    return tmp_path / "model"


def edited(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


def test_one_changed_bit_of_the_weights_fails(folder: Path, tmp_path: Path, verify: Verify) -> None:
    model = copied(folder, tmp_path)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)
        file.seek(-100, 2)
        file.write(bytes([byte[0] ^ 1]))
    code, record = verify(None, "--model", str(model))
    assert (code, changed(record)) == (1, ["model.weights"])
    assert record["next_command"].startswith("kvtune tune ")


@pytest.mark.parametrize(
    ("file", "old", "new", "name"),
    [
        ("tokenizer.json", b'"the"', b'"teh"', "model.tokenizer"),
        ("chat_template.jinja", b"{", b" {", "model.chat_template"),
        ("config.json", b'"rope_theta": ', b'"rope_theta": 1', "model.config"),
    ],
)  # fmt: skip
def test_another_tokenizer_template_or_config_fails(
    folder: Path, tmp_path: Path, verify: Verify, file: str, old: bytes, new: bytes, name: str
) -> None:
    model = copied(folder, tmp_path)
    if old not in (model / file).read_bytes():
        old, new = b"{", b"{ "
        if file == "config.json":
            old, new = b"{", b'{"x_new": 1,'
    edited(model / file, old, new)
    code, record = verify(None, "--model", str(model))
    assert (code, changed(record)) == (1, [name])


def test_changed_codec_constants_fail_although_no_version_moved(
    folder: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtune.kernels.quantise.INT8_OFFSET", 127)
    code, record = verify()
    assert (code, changed(record)) == (1, ["codecs.int8"])


def test_another_rotation_fails(folder: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtune.kernels.rotation.MAX_ROTATION_BLOCK", 32)
    code, record = verify(folder / "n8_rh.json")
    assert code == 1 and {"codecs.n8_rh", "codecs.rotation"} <= set(changed(record))


def test_another_instruction_set_or_kernel_path_fails(
    folder: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Recipe.load(folder / "int8.json").kernel != "native":
        pytest.skip("the native kernels are not built here")
    with monkeypatch.context() as patch:
        patch.setenv("KVTUNE_ISA", "portable")
        code, record = verify()
        assert code == 1 and "kernel.isa" in changed(record)
        code, record = verify(None, "--accept", "kernel")
        assert (code, changed(record, "accepted")[:1]) == (0, ["kernel.isa"])
    monkeypatch.setattr("kvtune.kernels.dispatch.library_path", lambda: None)
    code, record = verify()
    assert code == 1 and {"kernel.path", "kernel.isa"} <= set(changed(record))


@pytest.mark.parametrize(
    ("name", "version", "verdict"),
    [("torch", "1.0.0", "changed"), ("transformers", "4.2", "changed"), ("python", "3.9.1", "noted"),
     ("version", "9.0.0", "changed"), ("torch", None, "unclear")],
)  # fmt: skip
def test_versions_count_by_the_stated_policy(
    folder: Path, tmp_path: Path, verify: Verify, name: str, version: str | None, verdict: str
) -> None:
    data = Recipe.load(folder / "int8.json")
    engine = {**data.engine, name: version}
    fact = f"engine.{'kvtune' if name == 'version' else name}"
    path = rewritten(data, tmp_path / "r.json", engine=engine)
    code, record = verify(path)
    assert changed(record, verdict) == [fact]
    assert code == (0 if verdict == "noted" else 1)


def rewritten(recipe: Recipe, path: Path, **changes: Any) -> Path:
    """The recipe with other members and a hash that agrees: what somebody determined can write."""
    body = {key: value for key, value in recipe.to_dict().items() if key != "content_sha256"}
    body["voided_by"] = tuple(body["voided_by"])
    return Recipe(**{**body, **changes}).save(path)


def test_a_recipe_without_the_facts_is_no_pass(folder: Path, tmp_path: Path, verify: Verify) -> None:
    data = Recipe.load(folder / "int8.json")
    bare = {key: data.engine[key] for key in ("name", "version", "torch", "transformers")}
    path = rewritten(data, tmp_path / "r.json", engine=bare, model={"path": data.model["path"]})
    code, record = verify(path)
    assert (code, record["verdict"]) == (1, "UNDECIDED")
    assert {"model.weights", "codecs.int8", "kernel.numbers"} <= set(changed(record, "unclear"))


def test_an_old_recipe_stands_only_with_traffic_that_was_compared(
    folder: Path, tmp_path: Path, verify: Verify
) -> None:
    path = rewritten(
        Recipe.load(folder / "int8.json"), tmp_path / "r.json", created_at="2020-01-01T00:00:00+00:00"
    )
    code, record = verify(path)
    assert (code, changed(record)) == (1, ["recipe.age"])
    assert verify(path, "--workload", str(folder / "chats.jsonl"))[0] == 0


def test_a_verdict_that_is_no_pass_fails(folder: Path, tmp_path: Path, verify: Verify) -> None:
    path = rewritten(Recipe.load(folder / "int8.json"), tmp_path / "r.json", quality={"verdict": "UNDECIDED"})
    assert changed(verify(path)[1]) == ["recipe.verdict"]


def test_another_machine_is_noted_unless_an_slo_chose_the_recipe(
    folder: Path, tmp_path: Path, verify: Verify
) -> None:
    data = Recipe.load(folder / "int8.json")
    elsewhere = {**data.hardware, "cpu": "another", "memory_bytes": 2**44}
    code, record = verify(rewritten(data, tmp_path / "r.json", hardware=elsewhere))
    assert code == 0 and changed(record, "noted") == ["hardware.cpu", "hardware.memory"]
    slo = {**data.provenance, "objective": {"slo": {"ttft_p95_s": 1.0}}}
    code, record = verify(rewritten(data, tmp_path / "s.json", hardware=elsewhere, provenance=slo))
    assert code == 1 and changed(record) == ["hardware.cpu", "hardware.memory"]


def test_the_fingerprint_of_the_live_cache_is_compared_when_asked(
    folder: Path, tmp_path: Path, verify: Verify
) -> None:
    from kvtune import Engine

    data = Recipe.load(folder / "n8_rh.json")
    with Engine.from_recipe(folder / "n8_rh.json") as engine:
        fingerprint = engine.fingerprint.hex()
    for value, code in ((fingerprint, 0), ("0" * 64, 1)):
        effective = {**data.provenance, "effective": {"fingerprint": value}}
        path = rewritten(data, tmp_path / "r.json", provenance=effective)
        assert verify(path, "--load")[0] == code


def test_a_missing_engine_is_exit_3_and_says_what_it_could_see(
    folder: Path, tmp_path: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Recipe.load(folder / "int8.json")
    monkeypatch.setenv("PATH", "/nonexistent")
    path = rewritten(data, tmp_path / "r.json", engine={"name": "vllm", "version": "0.32"})
    code, record = verify(path)
    assert (code, record["verdict"]) == (3, "UNDECIDED")
    assert changed(record, "missing") == ["engine"] and "model.weights" in changed(record, "same")
    assert verify(path, "--accept", "engine")[0] == 0


@pytest.mark.parametrize(
    ("now", "names"),
    [
        ({}, []), ({"version": "0.33.0"}, ["engine.version"]),
        ({"attention_backend": "X"}, ["engine.attention_backend"]),
        ({"platform": "cuda"}, ["engine.platform"]), ({"model_dtype": "float16"}, ["engine.dtype"]),
        ({"torch": "9"}, []),
    ],
)  # fmt: skip
def test_a_recipe_of_vllm_stands_or_falls_with_what_vllm_says_of_itself(
    folder: Path, tmp_path: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch, now: dict[str, Any],
    names: list[str],
) -> None:  # fmt: skip
    def offer(**changes: Any) -> VLLMOffer:
        facts: dict[str, Any] = {
            "version": "0.32.0", "has_vllm_command": True, "platform": "cpu", "torch": "2.13",
            "transformers": "5.19", "attention_backend": "CPU_ATTN", "model_dtype": "bfloat16",
            "max_model_len": 4096, "kv_dtypes": {"auto": None}, "block_sizes": [32],
            "default_block_size": 128,
            "default_max_num_seqs": 64, "default_max_num_batched_tokens": 512,
            "default_enable_prefix_caching": True, "flags": ["--kv-cache-memory-bytes"],
        }  # fmt: skip
        return VLLMOffer(**{**facts, **changes})

    def install(changes: dict[str, Any]) -> None:
        monkeypatch.setattr(VLLMInstall, "ask", lambda *_: offer(**changes))

    install({})
    target = VLLMTarget(folder / "model", python=Path(sys.executable))
    identity = target.identity()
    target.close()
    path = rewritten(
        Recipe.load(folder / "int8.json"), tmp_path / "r.json", model=identity["model"],
        engine=identity["engine"], kernel="", configuration=configuration_of({"kv_dtype": "auto"}),
    )  # fmt: skip
    install(now)
    code, record = verify(path, "--vllm-python", sys.executable)
    assert (code, changed(record)) == (1 if names else 0, names), record
    assert any("vLLM's kernels" in text for text in record["not_looked_at"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--accept", "nonsense"], "nonsense"), (["--model", "/no/such/folder"], "--model"),
        (["--workload", "/no/such/file"], "no such file"), (["--recipe", "second.json"], "found two"),
        (["--vllm-python", "/no/such/python"], None),
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_2_in_one_object(
    folder: Path, verify: Verify, words: list[str], text: str | None
) -> None:
    code, record = verify(None, *words)
    if text is None:  # not needed for a recipe of our own engine
        assert code == 0
    else:
        assert code == 2 and text in record["error"]["message"]


def test_the_table_names_every_fact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--recipe", str(folder / "int8.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("verdict     PASS") and "codecs.int8" in shown and "not looked at" in shown
