"""What a recipe turns into, for its own engine and for the other one."""

import json
import shlex
from pathlib import Path

import pytest

from kvtune.adapters.emit import check_flags, emit_recipe
from kvtune.cli.main import main
from kvtune.errors import UsageError
from kvtune.recipe import Recipe, codec_constants_sha256, configuration_of

VLLM_KNOBS = {
    "kv_dtype": "fp8_e4m3", "block_size": 64, "max_num_seqs": 32, "max_num_batched_tokens": 512,
    "enable_prefix_caching": True,
}  # fmt: skip
OWN_KNOBS = {
    "k_codec": "int8", "v_codec": "int4", "block_size": 32, "max_num_seqs": 8, "enable_prefix_caching": False,
}  # fmt: skip
VLLM_ENGINE = {
    "name": "vllm", "version": "0.32.0", "launcher": ["/opt/v/bin/vllm", "serve", "/m y/model"],
    "flags": ["--dtype", "bfloat16", "--max-model-len", "2048", "--skip-tokenizer-init"],
}  # fmt: skip


def recipe_of(engine: dict, knobs: dict, *, verdict: str = "PASS", **changes) -> Recipe:
    values = {
        "model": {"path": "/m y/model"}, "engine": engine, "hardware": {}, "workload": {},
        "read_contract": "T0", "kernel": "x", "codec_constants_sha256": codec_constants_sha256(),
        "configuration": configuration_of(
            knobs, kv_budget_bytes=1 << 20, engine={"dtype": "bfloat16", "max_model_len": 2048}
        ),
        "baseline": {}, "evidence": {}, "quality": {"verdict": verdict}, "fallback": {},
    } | changes  # fmt: skip
    return Recipe(**values)


def words_of(text: str) -> list[str]:
    """What a shell would run: comments gone, continued lines joined."""
    return shlex.split(
        "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    )


def test_a_vllm_recipe_becomes_the_measured_command_with_every_knob_and_the_budget():
    emission = emit_recipe(recipe_of(VLLM_ENGINE, VLLM_KNOBS), Path("recipe.json"), "vllm")
    assert words_of(emission.text) == list(emission.command)
    assert list(emission.command) == [
        "/opt/v/bin/vllm", "serve", "/m y/model", "--kv-cache-dtype", "fp8_e4m3", "--block-size", "64",
        "--max-num-seqs", "32", "--max-num-batched-tokens", "512", "--enable-prefix-caching",
        "--kv-cache-memory-bytes", "1048576", "--dtype", "bfloat16", "--max-model-len", "2048",
        "--skip-tokenizer-init",
    ]  # fmt: skip
    assert "vllm 0.32.0" in emission.text
    assert emission.warnings == ()


def test_prefix_caching_off_is_said_because_vllm_turns_it_on_by_itself():
    emission = emit_recipe(
        recipe_of(VLLM_ENGINE, VLLM_KNOBS | {"enable_prefix_caching": False}), Path("r"), "vllm"
    )
    assert "--no-enable-prefix-caching" in emission.command
    assert "--enable-prefix-caching" not in emission.command


@pytest.mark.parametrize("verdict", ["FAIL", "UNDECIDED", "INERT"])
def test_a_recipe_that_did_not_pass_says_so_in_what_is_pasted(verdict):
    emission = emit_recipe(recipe_of(VLLM_ENGINE, VLLM_KNOBS, verdict=verdict), Path("r"), "vllm")
    assert f"# warning: the quality verdict of this recipe is {verdict}" in emission.text


def test_a_lossy_recipe_of_our_engine_is_refused_for_vllm_with_what_to_do():
    with pytest.raises(UsageError, match=r"int4 and int8.*--target transformers.*--engine vllm"):
        emit_recipe(recipe_of({"name": "kvtune"}, OWN_KNOBS), Path("r"), "vllm")


def test_one_lossy_layer_is_enough_to_refuse():
    knobs = OWN_KNOBS | {"k_codec": "bf16", "v_codec": "bf16", "layer_codecs": {3: ("bf16", "int8")}}
    with pytest.raises(UsageError, match=r"layer 3 bf16/int8.*one KV cache dtype.*--engine vllm") as refused:
        emit_recipe(recipe_of({"name": "kvtune"}, knobs), Path("r"), "vllm")
    assert "\n" not in str(refused.value)


def test_a_table_by_layer_is_kept_where_the_recipe_goes_to_transformers(tmp_path: Path):
    knobs = OWN_KNOBS | {"layer_codecs": {3: ("bf16", "int8")}}
    recipe = recipe_of({"name": "kvtune"}, knobs)
    emission = emit_recipe(Recipe.load(recipe.save(tmp_path / "recipe.json")), tmp_path / "recipe.json",
                           "transformers")  # fmt: skip
    assert "Engine.from_recipe" in emission.text
    assert Recipe.load(tmp_path / "recipe.json").cache_config().codecs_of(3) == ("bf16", "int8")


def test_a_lossless_recipe_of_our_engine_is_carried_to_vllm_with_a_warning():
    knobs = OWN_KNOBS | {"k_codec": "bf16", "v_codec": "bf16"}
    emission = emit_recipe(recipe_of({"name": "kvtune"}, knobs), Path("r"), "vllm")
    assert emission.command[:3] == ("vllm", "serve", "/m y/model")
    assert "--kv-cache-dtype auto --block-size 32 --max-num-seqs 8 --no-enable-prefix-caching" in " ".join(
        emission.command
    )
    assert any("not proven here" in warning for warning in emission.warnings)


def test_a_lossy_vllm_recipe_is_refused_for_transformers():
    with pytest.raises(UsageError, match=r"fp8_e4m3 in vllm.*--engine kvtune"):
        emit_recipe(recipe_of(VLLM_ENGINE, VLLM_KNOBS), Path("r"), "transformers")


def test_a_lossless_vllm_recipe_becomes_an_engine_whose_blocks_kernels_can_hold():
    knobs = VLLM_KNOBS | {"kv_dtype": "auto", "block_size": 24}
    emission = emit_recipe(recipe_of(VLLM_ENGINE, knobs), Path("r"), "transformers")
    compile(emission.text, "snippet", "exec")
    assert "block_size=32" in emission.text
    assert "max_num_seqs=32" in emission.text
    assert any("no multiple of 16" in warning for warning in emission.warnings)


def test_our_recipe_becomes_a_snippet_that_builds_from_the_file(tmp_path):
    emission = emit_recipe(recipe_of({"name": "kvtune"}, OWN_KNOBS), tmp_path / "recipe.json", "transformers")
    compile(emission.text, "snippet", "exec")
    assert f"Engine.from_recipe({str(tmp_path / 'recipe.json')!r})" in emission.text


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(UsageError, match="known: vllm, transformers"):
        emit_recipe(recipe_of(VLLM_ENGINE, VLLM_KNOBS), Path("r"), "sglang")


def test_a_flag_that_the_installed_vllm_lacks_is_named():
    with pytest.raises(UsageError, match=r"vLLM 9\.9 has no --block-size"):
        check_flags(["vllm", "--model", "x", "--block-size", "16"], ["--model"], "9.9")


@pytest.fixture
def kvtune_emit(capsys):
    def run(*args: str) -> tuple[int, str, str]:
        code = main(["emit", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_prints_the_text_and_under_json_one_object(tmp_path, kvtune_emit):
    path = recipe_of(VLLM_ENGINE, VLLM_KNOBS).save(tmp_path / "recipe.json")
    code, text, err = kvtune_emit(str(path), "--target", "vllm")
    assert code == 0, err
    assert words_of(text)[0] == "/opt/v/bin/vllm"
    found = json.loads(kvtune_emit(str(path), "--target", "vllm", "--json")[1])
    assert found["command"] == words_of(text)
    assert found["verdict"] == "PASS"


def test_the_command_refuses_in_one_line_with_exit_2(tmp_path, kvtune_emit):
    path = recipe_of({"name": "kvtune"}, OWN_KNOBS).save(tmp_path / "recipe.json")
    code, out, err = kvtune_emit(str(path), "--target", "vllm", "--json")
    assert code == 2
    assert "int4" in json.loads(out)["error"]["message"]
    assert len(err.strip().splitlines()) == 1
