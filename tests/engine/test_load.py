"""A model is served after it proved itself, or refused in one line that names it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvtune.config import EngineConfig
from kvtune.engine import load_model
from kvtune.engine.self_test import check_packed_equals_eager
from kvtune.errors import InputFileError, UnsupportedModelError, UsageError
from kvtune.testing.models import REFUSED_FAMILIES, SERVED_FAMILIES, write_model_folder

NAMED = {
    "falcon": "attention registry",
    "gptj": "attention registry",
    "qwen3_next": "linear_attention",
    "llama4": "chunked_attention",
    "deepseek_v3": "mla",
}


@pytest.mark.parametrize("family", SERVED_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_served_families_load_and_keep_their_dtype(tmp_path, family, dtype):
    loaded = load_model(write_model_folder(tmp_path, family, dtype=dtype))
    assert loaded.dtype == dtype
    assert loaded.eos_token_ids == {2}
    assert loaded.tokenizer is None


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_families_we_cannot_hold_are_refused_by_name(tmp_path, family):
    with pytest.raises(UnsupportedModelError) as error:
        load_model(write_model_folder(tmp_path, family))
    message = str(error.value)
    assert "\n" not in message
    assert family.split("_")[0] in message
    assert "layer 0" in message
    assert NAMED[family] in message


def test_dynamic_rope_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = write_model_folder(tmp_path, "llama", rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="'dynamic' RoPE"):
        load_model(folder)


def _eager_and_spec(folder):
    loaded = load_model(folder)
    return loaded.model, loaded.spec


def test_a_window_the_model_code_does_not_have_is_caught(tmp_path):
    model, spec = _eager_and_spec(write_model_folder(tmp_path, "llama"))
    layers = tuple(dataclasses.replace(layer, window=30) for layer in spec.layers)
    with pytest.raises(
        UnsupportedModelError, match="layer 0 attends with a window of None, its config says 30"
    ):
        check_packed_equals_eager(model, dataclasses.replace(spec, layers=layers))


def test_the_self_test_catches_a_layer_that_never_attends(tmp_path):
    model, spec = _eager_and_spec(write_model_folder(tmp_path, "llama"))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 1 \(full_attention\) called kvtune's attention 0"
    ):
        check_packed_equals_eager(model, spec)


def test_the_self_test_catches_a_layer_that_mixes_packed_neighbours(tmp_path):
    model, spec = _eager_and_spec(write_model_folder(tmp_path, "llama"))
    model.model.layers[0].mlp.register_forward_hook(lambda *args: 0.1 * args[-1].cumsum(dim=1))
    with pytest.raises(UnsupportedModelError, match="differs"):
        check_packed_equals_eager(model, spec)


def test_the_self_test_refuses_a_model_that_computes_nan(tmp_path):
    model, spec = _eager_and_spec(write_model_folder(tmp_path, "llama"))
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="differs"):
        check_packed_equals_eager(model, spec)


@pytest.mark.parametrize("fault", ["no folder", "no config", "bad config", "list config", "no weights",
                                   "torn weights", "a weight is missing"])  # fmt: skip
def test_a_folder_that_is_no_model_is_one_clear_line(tmp_path, llama_folder, fault):
    folder = tmp_path / "model"
    if fault != "no folder":
        shutil.copytree(llama_folder, folder)
    if fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "bad config":
        (folder / "config.json").write_text("{")
    elif fault == "list config":
        (folder / "config.json").write_text("[]")
    elif fault == "no weights":
        (folder / "model.safetensors").unlink()
    elif fault == "torn weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    elif fault == "a weight is missing":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputFileError) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_has_the_digests_its_folder_has_by_definition(llama_folder, llama):
    """Written out, not called: recipes and stored blocks name models by these, they must never change."""

    def of_files(*names: str) -> str:
        total = hashlib.sha256()
        for name in names:
            total.update(name.encode() + b"\0" + hashlib.sha256((llama_folder / name).read_bytes()).digest())
        return total.hexdigest()

    config = json.loads((llama_folder / "config.json").read_text())
    del config["transformers_version"]
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    assert llama.weights_sha256 == of_files("model.safetensors")
    assert llama.tokenizer_sha256 == of_files("tokenizer.json", "tokenizer_config.json")
    assert llama.config_sha256 == hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def test_a_model_object_is_taken_as_it_is(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    loaded = load_model(model)
    assert loaded.model is model
    assert loaded.path is None


def test_a_length_beyond_the_model_is_refused(llama_folder):
    with pytest.raises(UsageError, match="max_model_len 513 is beyond the model's 512"):
        load_model(llama_folder, EngineConfig(max_model_len=513))


def test_the_longrope_regime_follows_the_longest_sequence_and_changes_the_fingerprint(tmp_path, make_engine):
    folder = write_model_folder(tmp_path, "phi3", max_position_embeddings=512)  # original length 128
    short = load_model(folder, EngineConfig(max_model_len=128))
    long = load_model(folder, EngineConfig(max_model_len=129))
    assert (short.rope_regime, long.rope_regime) == ("longrope_short", "longrope_long")
    assert make_engine(short).fingerprint != make_engine(long).fingerprint
    with pytest.raises(UsageError, match="needs RoPE regime longrope_short"):
        make_engine(long, config={"max_model_len": 100})


def test_the_fingerprint_names_everything_stored_bytes_depend_on(tmp_path, llama_folder, llama, make_engine):
    other = load_model(write_model_folder(tmp_path / "other", "llama", seed=1))
    half = load_model(llama_folder, EngineConfig(dtype="bfloat16"))
    engines = [
        make_engine(llama),
        make_engine(other),
        make_engine(half),
        make_engine(llama, cache={"k_codec": "int8"}),
        make_engine(llama, cache={"v_codec": "int8"}),
        make_engine(llama, cache={"layer_codecs": {1: ("int8", "bf16")}}),
        make_engine(llama, cache={"first_block_16bit": True}),
        make_engine(llama, cache={"block_size": 32}),
    ]
    assert len({engine.fingerprint for engine in engines}) == len(engines)
    assert make_engine(llama, cache={"kv_budget": "2MiB"}).fingerprint == engines[0].fingerprint
