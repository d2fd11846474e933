from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import InputFileError, UsageError
from kvtune.recipe import Recipe, codec_constants_sha256, configuration_of, write_atomically


def make_recipe(**changes: object) -> Recipe:
    knobs = {"k_codec": "int8", "v_codec": "int4", "block_size": 32, "max_num_seqs": 8}
    values: dict[str, object] = {
        "model": {"path": "m", "config_sha256": "c"},
        "engine": {"name": "kvtune", "versions": {"torch": "2.13"}},
        "hardware": {"cpu": "x"},
        "workload": {"sha256": "w"},
        "read_contract": "T0",
        "kernel": "native",
        "codec_constants_sha256": codec_constants_sha256(),
        "configuration": configuration_of(
            {**knobs, "layer_codecs": {0: ("bf16", "bf16")}}, kv_budget_bytes=1 << 20,
            engine={"dtype": "float32", "max_model_len": 512},
        ),
        "baseline": {"knobs": {"k_codec": "bf16"}},
        "evidence": {"kv_bytes_per_token": {"value": 1.5, "n": 1, "low": 1.5, "high": 1.5}},
        "quality": {"verdict": "PASS"},
        "fallback": {"configuration": {"k_codec": "bf16"}},
    }  # fmt: skip
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def test_a_saved_recipe_loads_equal_and_builds_the_settings(tmp_path: Path) -> None:
    recipe = make_recipe()
    loaded = Recipe.load(recipe.save(tmp_path / "recipe.json"))
    assert loaded.to_dict() == recipe.to_dict()
    cache = loaded.cache_config()
    assert (cache.k_codec, cache.v_codec, cache.block_size, cache.kv_budget_bytes) == (
        "int8",
        "int4",
        32,
        1 << 20,
    )
    assert cache.codecs_of(0) == ("bf16", "bf16") and cache.codecs_of(1) == ("int8", "int4")
    assert loaded.scheduler_config().max_num_seqs == 8
    assert loaded.engine_config().dtype == "float32" and loaded.engine_config().max_model_len == 512


def changed_value(value: object) -> object:
    if isinstance(value, dict):
        return {**value, "x": 1}
    if isinstance(value, list):
        return [*value, "x"]
    return value + 1 if isinstance(value, int) else f"{value}x"


def test_every_single_changed_value_is_refused(tmp_path: Path) -> None:
    path = make_recipe().save(tmp_path / "recipe.json")
    data = json.loads(path.read_text())
    for name in data:
        changed = json.loads(path.read_text())
        value = changed[name]
        changed[name] = changed_value(value)
        path.with_name("changed.json").write_text(json.dumps(changed))
        with pytest.raises(UsageError):
            Recipe.load(path.with_name("changed.json"))


def test_a_recipe_of_another_engine_gives_no_settings_for_ours() -> None:
    with pytest.raises(UsageError, match="kvtune emit"):
        make_recipe(engine={"name": "vllm"}).cache_config()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe\x00", b"[]", b"{}", b"null", b"NaN",
        b'{"schema_version": NaN}', b'{"schema_version": true}',
        b'{"schema_version": 99}', b'{"schema_version": 1}', b'{"a":1,"a":2}', b"[" * 100_000,
        b'{"schema_version": 1' + b"0" * 10_000 + b"}", b'{"schema_version": 1e999}',
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(InputFileError) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(InputFileError):
            Recipe.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("quality", {"verdict": "MAYBE"}), ("configuration", {"knobs": []}), ("engine", {"name": 3}),
     ("evidence", []), ("voided_by", [1]), ("kernel", 7), ("schema_version", 0)],
)  # fmt: skip
def test_wrong_shapes_are_refused_even_when_the_hash_agrees(tmp_path: Path, name: str, value: object) -> None:
    from kvtune.recipe import _content_hash

    data = make_recipe().to_dict()
    data.pop("content_sha256")
    data[name] = value
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**data, "content_sha256": _content_hash(data)}))
    with pytest.raises(InputFileError):
        Recipe.load(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(evidence=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_evidence_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, evidence: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("r") / "recipe.json"
    make_recipe(evidence=evidence).save(path)
    assert Recipe.load(path).evidence == json.loads(json.dumps(evidence))


def test_infinity_hidden_as_a_large_number_is_refused(tmp_path: Path) -> None:
    path = make_recipe().save(tmp_path / "r.json")
    path.write_text(path.read_text().replace('"value": 1.5', '"value": 1e999'))
    with pytest.raises(InputFileError):
        Recipe.load(path)


def test_not_finite_evidence_is_refused_before_a_file_exists(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        make_recipe(evidence={"x": float("nan")}).save(tmp_path / "recipe.json")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_atomically(path, "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_an_absent_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        make_recipe().save(tmp_path / "absent" / "recipe.json")


# -- a hash is no signature --


def agreeing(tmp_path: Path, **changes: object) -> Path:
    """A recipe somebody edited, hash included. `section__name=value` changes configuration.section.name."""
    from kvtune.recipe import _content_hash

    data = make_recipe(baseline={"configuration": {"k_codec": "bf16"}}).to_dict()
    data.pop("content_sha256")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            data["configuration"][section][name] = value
        else:
            data[section] = value
    path = tmp_path / "edited.json"
    path.write_text(json.dumps({**data, "content_sha256": _content_hash(data)}))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache__k_codec": "int4"}, "contradicts itself"),
        ({"knobs__block_size": 16}, "contradicts itself"),
        ({"scheduler__max_num_seqs": 9}, "contradicts itself"),
        ({"cache__first_block_16bit": True}, "contradicts itself"),
        ({"cache__block_size": 24, "knobs__block_size": 24}, "multiple of 16"),
        ({"cache__block_size": -16, "knobs__block_size": -16}, "block_size"),
        ({"cache__block_size": 2**70, "knobs__block_size": 2**70}, "block_size"),
        ({"cache__block_size": "32", "knobs__block_size": "32"}, "impossible value"),
        ({"cache__k_codec": ["int8"], "knobs__k_codec": ["int8"]}, "impossible value"),
        ({"cache__k_codec": "int3", "knobs__k_codec": "int3"}, "unknown KV codec"),
        ({"cache__v_codec": "nvfp9\n", "knobs__v_codec": "nvfp9\n"}, "unknown KV codec"),
        ({"cache__layer_codecs": {"-1": ["bf16", "bf16"]}, "knobs__layer_codecs": {"-1": ["bf16", "bf16"]}},
         "layer"),
        ({"cache__squeeze_planes": {"1": [1, 1]}}, "no second plane"),
        ({"cache__squeeze_planes": {"1": [1]}}, "squeeze_planes"),
        ({"cache__squeeze_planes": {"1": [2, 2]}}, "contradicts itself"),
        ({"cache__plane_arena": "lots"}, "size"),
        ({"cache__layer_codecs": {"0": 5}, "knobs__layer_codecs": {"0": 5}}, "layer_codecs"),
        ({"cache__layer_codecs": [], "knobs__layer_codecs": []}, "layer_codecs"),
        ({"cache__enable_prefix_caching": "no"}, "impossible value"),
        ({"cache__kv_budget": -5}, "size"), ({"cache__kv_budget": [1]}, "size"),
        ({"cache__unheard_of": 1}, "unheard_of"), ({"knobs__unheard_of": 1}, "unheard_of"),
        ({"engine__dtype": "float7"}, "dtype"), ({"engine__max_model_len": -1}, "max_model_len"),
        ({"engine__num_threads": 1.5}, "impossible value"), ({"engine__kernel": "/bin/sh"}, "kernel"),
        ({"baseline": {"configuration": {"k_codec": {}}}}, "baseline.configuration"),
        ({"baseline": {"configuration": {"rm": "-rf"}}}, "no knob"),
    ],
)  # fmt: skip
def test_settings_that_contradict_themselves_or_nothing_can_take_are_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(InputFileError) as caught:
        Recipe.load(agreeing(tmp_path, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.timeout(20)
def test_a_pipe_a_device_and_a_name_no_file_has_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "a\0b", tmp_path / ("x" * 5000)):
        with pytest.raises(InputFileError):
            Recipe.load(path)


def test_a_file_too_large_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # sparse: ten gigabytes of zeros without a line end
    with pytest.raises(InputFileError, match="larger than"):
        Recipe.load(path)
