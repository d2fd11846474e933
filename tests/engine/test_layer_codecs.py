"""Codecs by layer in the engine: what is asked is what runs, is sized and is hashed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams
from kvtune.engine import EngineTarget
from kvtune.errors import UsageError
from kvtune.recipe import Recipe, codec_constants_sha256, configuration_of
from kvtune.target import AllocatesLayers, ReadsPlanes, ScoreItem
from kvtune.tune.evaluation import _cancelled

BASE = {"k_codec": "int8", "v_codec": "int8", "block_size": 16, "enable_prefix_caching": True,
        "max_num_seqs": 4, "max_num_batched_tokens": 64}  # fmt: skip
TABLE = {"1": ["int8", "n4_rh"]}
MIXED = {**BASE, "layer_codecs": TABLE}


@pytest.fixture
def target(llama_folder: Path) -> EngineTarget:
    return EngineTarget(
        llama_folder, config=EngineConfig(kernel="torch"), cache=CacheConfig(kv_budget="2MiB")
    )


def items() -> list[ScoreItem]:
    rng = np.random.default_rng(0)
    return [
        ScoreItem(item_id=str(i), prompt_token_ids=rng.integers(3, 211, 40).tolist(),
                  continuation=rng.integers(3, 211, 8).tolist())
        for i in range(3)
    ]  # fmt: skip


def test_our_target_allocates_layers_and_its_engines_read_planes(target: EngineTarget) -> None:
    assert isinstance(target, AllocatesLayers)
    offered = target.layer_codecs()
    assert offered.layers == tuple(range(len(target.loaded.spec.layers)))
    assert {offered.stored, offered.high} <= set(offered.codecs)
    with target.start(BASE) as running:
        assert isinstance(running, ReadsPlanes)


@pytest.mark.parametrize("context", [16, 100, 2048])
def test_sides_and_padding_make_the_bytes_of_the_whole(target: EngineTarget, context: int) -> None:
    whole = target.kv_bytes_per_token(MIXED, context=context)
    sides = target.kv_side_bytes_per_token(MIXED, context=context)
    padding = whole - sum(k + v for k, v in sides.values())
    assert 0 <= padding * context < 64 * len(sides) * (context // 16 + 1)
    assert sides[1][1] < sides[0][1] and sides[1][0] == sides[0][0]
    assert whole < target.kv_bytes_per_token(BASE, context=context)


def test_the_engine_runs_the_table_that_was_asked_for(target: EngineTarget) -> None:
    with target.start(MIXED) as running:
        assert running.effective["layer_codecs"]["1"] == ["int8", "n4_rh"]
        assert running.effective["layer_codecs"]["0"] == ["int8", "int8"]
        assert _cancelled(MIXED, running.effective) == ()
        other = {**BASE, "layer_codecs": {"0": ["int8", "n4_rh"]}}
        assert "layer_codecs" in _cancelled(other, running.effective)[0]
    with target.start(BASE) as running:
        assert "layer_codecs" not in running.effective
        assert "layer_codecs" in "".join(_cancelled(MIXED, {**running.effective, "layer_codecs": {
            "0": ["int8", "int8"], "1": ["int8", "int8"]}}))  # fmt: skip


def test_blocks_of_another_table_have_another_fingerprint(target: EngineTarget) -> None:
    with target.start(BASE) as uniform, target.start(MIXED) as mixed:
        assert uniform.engine.fingerprint != mixed.engine.fingerprint
        spelled = {**BASE, "layer_codecs": {"0": ["int8", "int8"], **TABLE}}
        with target.start(spelled) as same:
            assert same.engine.fingerprint == mixed.engine.fingerprint


def test_a_side_read_from_its_high_plane_loses_what_the_table_stores_without_it(target: EngineTarget) -> None:
    """What sensitivity reads from planes is, bit for bit, what n4_rh in that place serves."""
    nested = {**BASE, "k_codec": "n8_rh", "v_codec": "n8_rh"}
    with target.start(nested) as running:
        before = running.score(items(), num_top=211)
        with running.reading({1: (2, 1)}):
            read = running.score(items(), num_top=211)
    with target.start({**nested, "layer_codecs": {"1": ["n8_rh", "n4_rh"]}}) as running:
        stored = running.score(items(), num_top=211)
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(read, stored, strict=True))
    assert not all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(before, read, strict=True))


def test_a_recipe_with_a_table_builds_the_engine_it_was_proven_on(
    target: EngineTarget, llama_folder: Path, tmp_path: Path
) -> None:
    identity = target.identity()
    recipe = Recipe(
        model=identity["model"], engine={"name": "kvtune", **identity["engine"]},
        hardware=identity["hardware"], workload={}, read_contract="T0", kernel="torch",
        codec_constants_sha256=codec_constants_sha256(),
        configuration=configuration_of(MIXED, kv_budget_bytes=1 << 21, engine={"kernel": "torch"}),
        baseline={"configuration": BASE, "metrics": {}}, evidence={}, quality={"verdict": "PASS"},
        fallback={},
    )  # fmt: skip
    path = recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(path).content_sha256 == recipe.content_sha256
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [list(item.prompt_token_ids) for item in items()]
    with Engine.from_recipe(path, llama_folder) as engine, target.start(MIXED) as running:
        layouts = {n: layer.cache.layout for n, layer in engine.attention_layers.items()}
        assert layouts[1].v_codec == "n4_rh" and layouts[0].v_codec == "int8"
        assert engine.fingerprint == running.engine.fingerprint
        assert [o.token_ids for o in engine.generate(prompts, params)] == [
            o.token_ids for o in running.engine.generate(prompts, params)
        ]


def test_a_table_for_a_layer_the_model_lacks_is_refused(target: EngineTarget) -> None:
    with pytest.raises(UsageError, match="layer 99"):
        target.start({**BASE, "layer_codecs": {"99": ["int8", "int8"]}})
