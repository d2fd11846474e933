"""Codecs layer by layer, through `tune` against an engine whose layers hurt differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.recipe import Recipe
from kvtune.target import Config
from kvtune.tune import SearchSpace, TuneSettings, run
from kvtune.tune.sensitivity import units_of
from kvtune.tune.space import with_layers
from kvtune.workload import split_by_session

LAYERS = 4


def tune(target: Any, requests: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = TuneSettings(**{"budget_s": 600.0, **changes})
    return dict(run(target, requests, settings, folder, clock=target.clock).record)


def test_a_table_wins_where_some_layers_bear_fewer_bits(layered: Any, requests_: Any, tmp_path: Path) -> None:
    target = layered()
    record = tune(target, requests_, tmp_path / "out")
    table = record["winner"]["config"]["layer_codecs"]
    assert record["status"] == "winner" and record["quality"]["verdict"] == "PASS"
    assert set(table) == {"2", "3"}, "layers 0 and 1 are the ones that hurt"
    uniform = {**record["winner"]["config"], "k_codec": "int8", "v_codec": "int8"}
    uniform.pop("layer_codecs")
    size = target.kv_bytes_per_token(record["winner"]["config"], context=2048)
    assert size < 0.9 * target.kv_bytes_per_token(uniform, context=2048)
    assert record["winner"]["metrics"]["kv_bytes_per_token"] == pytest.approx(size)


def test_the_record_shows_where_the_bits_went_and_what_each_side_loses(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    target = layered()
    layers = tune(target, requests_, tmp_path / "out")["layers"]
    assert layers["is_winner"] and not layers["skipped"]
    assert len(layers["sides"]) == 2 * LAYERS
    total = sum(side["bytes_per_token"] for side in layers["sides"]) + layers["padding_bytes_per_token"]
    assert total == pytest.approx(layers["bytes_per_token"])
    harm = {(tuple(s["layers"]), s["side"]): s["kl"]["value"] for s in layers["sensitivities"]}
    assert harm[(0,), "k"] > harm[(1,), "k"] > harm[(2,), "k"]
    assert {s["method"] for s in layers["sensitivities"]} == {"planes"}
    assert any(t["verdict"] == "PASS" for t in layers["tables"])
    for table in layers["tables"]:
        assert table["bytes_per_token"] < layers["anchor_bytes_per_token"]


def test_planes_are_read_from_one_engine_without_a_start_per_question(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    target = layered()
    tune(target, requests_, tmp_path / "out")
    assert sum(c["k_codec"] == c["v_codec"] == "n8_rh" for c in target.starts) == 2
    assert not any(len(c.get("layer_codecs", {})) == 1 for c in target.starts)


def test_without_a_nested_code_each_question_is_a_replay_and_the_table_the_same(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    record = tune(layered(has_planes=False), requests_, tmp_path / "out")
    assert set(record["winner"]["config"]["layer_codecs"]) == {"2", "3"}
    assert {s["method"] for s in record["layers"]["sensitivities"]} == {"replay"}


def test_where_all_layers_hurt_alike_the_uniform_configuration_stays(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    target = layered(weight={"k": (1.0,) * LAYERS, "v": (1.0,) * LAYERS})
    record = tune(target, requests_, tmp_path / "out")
    assert "layer_codecs" not in record["winner"]["config"]
    assert record["winner"]["config"]["k_codec"] == "int8"
    assert not record["layers"]["is_winner"]
    assert all(t["verdict"] != "PASS" for t in record["layers"]["tables"])


def test_a_table_is_judged_on_the_confirmation_half_like_any_other(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    _, confirm = split_by_session(requests_, 0.5, np.random.default_rng(0))
    harmed = {r.request_id for r in confirm}

    class Worse(layered):  # type: ignore[misc]
        def start(self, config: Config, *, kv_budget_bytes: int | None = None) -> Any:
            running = super().start(config, kv_budget_bytes=kv_budget_bytes)
            whole = running._logits

            def logits(item_id: str, tokens: int, chunk: int | None) -> np.ndarray:
                out = whole(item_id, tokens, chunk)
                if item_id in harmed and "layer_codecs" in config:
                    out = out + np.random.default_rng(7).normal(0, 0.5, out.shape)
                return out

            running._logits = logits
            return running

    record = tune(Worse(), requests_, tmp_path / "out")
    assert "layer_codecs" not in record["winner"]["config"]
    assert any("layer_codecs" in r["config"] and r["reason"].startswith("FAIL") for r in record["rejected"])


def test_a_table_the_search_could_not_decide_wins_if_unseen_requests_settle_it(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    """Of the steps below the first that is confirmed, the smallest that stands; none is claimed untested."""
    _, confirm = split_by_session(requests_, 0.5, np.random.default_rng(0))
    weight = {"k": (1.0, 0.5, 0.06, 0.06), "v": (0.8, 0.4, 0.06, 0.06)}
    ids = frozenset(r.request_id for r in confirm)
    mild = layered(weight=weight, confirm_ids=ids, confirm_relief=0.2)
    record = tune(mild, requests_, tmp_path / "mild", budget_s=3000.0)
    winner = record["winner"]["config"]
    searched = {
        json.dumps(t["config"]["layer_codecs"]): t for t in record["trials"] if "layer_codecs" in t["config"]
    }
    trial = searched[json.dumps(winner["layer_codecs"])]
    assert trial["status"] == "infeasible" and trial["quality"]["verdict"] == "UNDECIDED"
    assert record["quality"]["verdict"] == "PASS"
    alike = tune(layered(weight=weight), requests_, tmp_path / "alike", budget_s=3000.0)
    size = mild.kv_bytes_per_token(winner, context=2048)
    assert size < mild.kv_bytes_per_token(alike["winner"]["config"], context=2048)


def test_asked_not_to_it_searches_no_layers(layered: Any, requests_: Any, tmp_path: Path) -> None:
    target = layered()
    record = tune(target, requests_, tmp_path / "out", per_layer=False)
    assert record["layers"] is None
    assert not any("layer_codecs" in c for c in target.starts)


def test_the_recipe_holds_the_table_and_its_hash_covers_it(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    record = tune(layered(), requests_, tmp_path / "out")
    path = tmp_path / "out" / "recipe.json"
    recipe = Recipe.load(path)
    table = record["winner"]["config"]["layer_codecs"]
    assert recipe.configuration["cache"]["layer_codecs"] == table
    config = recipe.cache_config()
    assert config.codecs_of(3) == tuple(table["3"]) and config.codecs_of(0) == ("int8", "int8")
    body = json.loads(path.read_text())
    body["configuration"]["cache"]["layer_codecs"]["3"] = ["int8", "int8"]
    path.write_text(json.dumps(body))
    with pytest.raises(Exception, match="changed after it was proven"):
        Recipe.load(path)


def test_a_table_that_was_judged_survives_an_interrupt(layered: Any, requests_: Any, tmp_path: Path) -> None:
    def interrupt_in_confirmation(config: Config, stage: str) -> None:
        if stage == "load" and "layer_codecs" in config:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(layered(crash=interrupt_in_confirmation), requests_, tmp_path / "out")
    record = tune(layered(), requests_, tmp_path / "out", resume=True)
    assert set(record["winner"]["config"]["layer_codecs"]) == {"2", "3"}
    numbers = [t["number"] for t in record["trials"]]
    assert len(numbers) == len(set(numbers))


def test_tables_are_written_shortly() -> None:
    base = {"k_codec": "bf16", "v_codec": "bf16", "block_size": 16}
    table = {0: ("int8", "int8"), 1: ("int8", "int8"), 2: ("int8", "n4_rh")}
    assert with_layers(base, table) == {
        "k_codec": "int8", "v_codec": "int8", "block_size": 16, "layer_codecs": {"2": ["int8", "n4_rh"]},
    }  # fmt: skip
    uniform = with_layers(
        {**base, "layer_codecs": {"1": ["a", "b"]}}, dict.fromkeys(range(3), ("int8", "int4"))
    )
    assert uniform == {"k_codec": "int8", "v_codec": "int4", "block_size": 16}


def test_a_table_makes_another_configuration_and_other_reads(layered: Any) -> None:
    space = SearchSpace(layered().knobs())
    plain = dict(space.baseline)
    mixed = {**plain, "layer_codecs": {"1": ["int8", "int8"]}}
    assert space.label(plain) != space.label(mixed) and space.read_key(plain) != space.read_key(mixed)
    assert space.is_lossy(mixed) and not space.is_lossy(plain)
    assert space.label({**plain, "layer_codecs": {}}) == space.label(plain)
    assert space.num_changed(mixed) == 1


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_units_are_neighbours_of_equal_size_that_cover_all_layers(count: int) -> None:
    units = units_of(range(4, 13), count)
    assert [layer for unit in units for layer in unit] == list(range(4, 13))
    assert len(units) == count and max(map(len, units)) - min(map(len, units)) <= 1
