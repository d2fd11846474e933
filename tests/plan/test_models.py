"""Finding the config that MODEL names, and refusing everything that is not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtune.errors import InputFileError, UsageError
from kvtune.plan import GPUS, bundled_models, find_gpu, find_model
from kvtune.plan.weights import dense_weights_bytes
from kvtune.spec import ModelSpec

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.parametrize("name", ["Qwen/Qwen3-32B", "qwen3-32b", "QWEN/qwen3-32b", "Qwen3-32B"])
def test_a_bundled_model_is_found_in_any_case_with_or_without_its_organisation(name: str) -> None:
    assert find_model(name).name == "Qwen/Qwen3-32B"


def test_a_file_and_its_folder_name_the_same_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert find_model(str(tmp_path)).config == find_model(str(tmp_path / "config.json")).config == LLAMA


def test_weights_beside_the_config_are_weighed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert find_model(str(tmp_path)).weights_bytes is None
    for i in range(2):
        (tmp_path / f"model-{i}.safetensors").write_bytes(b"x" * 100)
    assert find_model(str(tmp_path)).weights_bytes == 200


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Qwen3-30B.*Qwen/Qwen3-32B"):
        find_model("Qwen3-30B")


@pytest.mark.parametrize("name", ["", "x" * 100_000, "a\0b", "/no/such/dir", "~nobody-here/x"])
def test_names_that_cannot_be_models_are_usage_errors_of_one_short_line(name: str) -> None:
    with pytest.raises(UsageError) as error:
        find_model(name)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1"),
        (b'{\n"a": 1,\n"b": }', "line 3"),
        (b"\xff\xfe\x00\x01", "not a JSON text file"),
        (b"[1, 2]", "expected a JSON object, found a list"),
        (b"[" * 100_000, "not a JSON text file"),
        (b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "not a JSON text file"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_path(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputFileError) as error:
        find_model(str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputFileError, match="larger than"):
        find_model(str(path))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"config\.json"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.1-8B",
        "Llama-3.1-70B",
        "Qwen3-32B",
        "Mistral-7B-v0.1",
        "Qwen2.5-7B-Instruct",
        "gemma-3-27b-it",
    ],
)
def test_counting_a_dense_model_from_its_config_comes_within_a_thousandth(name: str) -> None:
    source = find_model(name)
    config = {**source.config, "vocab_size": 262_208} if "gemma" in name else source.config
    if "gemma" in name:  # its file leaves out vocabulary and tied embeddings
        config["text_config"] = {**config["text_config"], "vocab_size": 262_208, "tie_word_embeddings": True}
    counted = dense_weights_bytes(config, ModelSpec.from_config(config))
    assert counted == pytest.approx(source.weights_bytes, rel=1e-3)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "DeepSeek-V3", "Jamba-v0.1", "gemma-4-26B-A4B-it"])
def test_models_the_dense_formula_does_not_fit_are_not_guessed(name: str) -> None:
    config = find_model(name).config
    assert dense_weights_bytes(config, ModelSpec.from_config(config)) is None


def test_every_bundled_model_can_be_read_and_weighed() -> None:
    families: set[str] = set()
    for name in bundled_models():
        source = find_model(name)
        spec = ModelSpec.from_config(source.config)
        families.add(spec.model_type)
        assert spec.layers
        assert (source.weights_bytes or 0) > 10**9
    assert len(families) >= 25


@pytest.mark.parametrize(
    ("asked", "found"),
    [("h200", "H200"), ("H100", "H100-80GB"), ("a100 40gb", "A100-40GB"), ("rtx4090", "RTX-4090")],
)
def test_a_gpu_is_found_by_a_name_people_use(asked: str, found: str) -> None:
    assert find_gpu(asked).name == found


@pytest.mark.parametrize("asked", ["A100", "", "TPU-v9"])
def test_an_ambiguous_or_unknown_gpu_is_a_usage_error(asked: str) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        find_gpu(asked)
    assert "A100-80GB" in GPUS
