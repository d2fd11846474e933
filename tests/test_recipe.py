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
