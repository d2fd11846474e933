"""Low planes that may go under memory pressure: chosen on one half, proven on the other, in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtune.errors import TargetError, UsageError
from kvtune.recipe import Recipe
from kvtune.report import render
from kvtune.target import Knob
from kvtune.tune import TuneSettings, run
from kvtune.workload import split_by_session


@pytest.fixture
def nested(layered: Any) -> type[Any]:
    """Offers two planes instead of int8, and nothing smaller: what `--squeeze` asks an engine for."""

    class NestedTarget(layered):
        codecs = ("bf16", "n8_rh")

        def knobs(self) -> Any:
            lossy = [
                Knob(name=name, values=self.codecs, baseline="bf16", is_lossy=True)
                for name in ("k_codec", "v_codec")
            ]
            return (*lossy, *(knob for knob in super().knobs() if not knob.is_lossy))

    return NestedTarget


def tune(target: Any, requests: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = TuneSettings(**{"budget_s": 600.0, "per_layer": False, "squeeze": True, **changes})
    return dict(run(target, requests, settings, folder, clock=target.clock).record)


def test_the_sides_that_hardly_matter_are_proven_together_and_stand_in_the_recipe(
    nested: Any, requests_: Any, tmp_path: Path
) -> None:
    target = nested()
    record = tune(target, requests_, tmp_path / "out")
    proof = record["squeeze"]
    assert record["winner"]["config"]["k_codec"] == record["winner"]["config"]["v_codec"] == "n8_rh"
    assert proof["planes"] == {"2": [1, 1], "3": [1, 1]}, "layers 0 and 1 hurt"
    assert proof["quality"]["verdict"] == "PASS" and proof["num_proven"] == 4 and proof["num_sides"] == 8
    assert [s["kl"] for s in proof["sides"]] == sorted(s["kl"] for s in proof["sides"])
    assert proof["lowered_bytes_per_token"] / proof["bytes_per_token"] == pytest.approx((8.5 + 4.5) / 17)
    assert target.num_open == 0
    recipe = Recipe.load(tmp_path / "out" / "recipe.json")
    assert recipe.cache_config().squeeze_planes == {2: (1, 1), 3: (1, 1)}
    assert recipe.quality["squeeze"] == {"planes": proof["planes"], **proof["quality"]}


def test_what_harms_requests_the_search_never_saw_is_not_proven(
    nested: Any, requests_: Any, tmp_path: Path
) -> None:
    _, unseen = split_by_session(tuple(requests_), 0.5, np.random.default_rng(0))
    ids = {request.request_id for request in unseen}

    class Treacherous(nested):
        def start(self, *args: Any, **more: Any) -> Any:
            running = super().start(*args, **more)
            logits = running._logits

            def harmed(item_id: str, tokens: int, chunk: int | None) -> Any:
                found = logits(item_id, tokens, chunk)
                is_read_so = running.planes and item_id in ids
                return found * 0.2 if is_read_so else found

            running._logits = harmed
            return running

    record = tune(Treacherous(), requests_, tmp_path / "out")
    proof = record["squeeze"]
    assert record["status"] == "winner" and proof["planes"] == {} and proof["quality"] is None
    assert [t["verdict"] for t in proof["tried"]] == ["FAIL"] * len(proof["tried"]) and proof["tried"]
    sizes = [sum(n == 1 for pair in t["planes"].values() for n in pair) for t in proof["tried"]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes), "each set is smaller"
    recipe = Recipe.load(tmp_path / "out" / "recipe.json")
    assert not recipe.cache_config().squeeze_planes and "squeeze" not in recipe.quality
    page = render(record)
    assert "Sets judged, which share one chance of a false PASS" in page
    assert all(sides in page for sides in ("layer 2 keys and values, 3 keys and values", "layer 3"))


def test_a_winner_without_two_planes_has_nothing_to_give_up(
    layered: Any, requests_: Any, tmp_path: Path
) -> None:
    record = tune(layered(), requests_, tmp_path / "out")
    assert record["status"] == "winner" and "two planes" in record["squeeze"]["skipped"]
    assert "Under memory pressure requests are preempted" in render(record)


def test_nobody_asked_so_nothing_is_read_at_4_bits(nested: Any, requests_: Any, tmp_path: Path) -> None:
    record = tune(nested(), requests_, tmp_path / "out", squeeze=False)
    assert record["squeeze"] is None and "When memory gets short" not in render(record)


def test_a_crash_while_planes_are_read_leaves_the_winner_as_it_is(
    nested: Any, requests_: Any, tmp_path: Path
) -> None:
    class Fragile(nested):
        def start(self, *args: Any, **more: Any) -> Any:
            running = super().start(*args, **more)
            logits = running._logits

            def broken(*given: Any) -> Any:
                if running.planes:
                    raise TargetError("the engine failed")
                return logits(*given)

            running._logits = broken
            return running

    target = Fragile()
    record = tune(target, requests_, tmp_path / "out")
    assert record["status"] == "winner" and record["squeeze"]["skipped"] == "crashed: the engine failed"
    assert target.num_open == 0


def test_a_run_interrupted_while_planes_are_proven_resumes_to_a_recipe_with_its_proof(
    nested: Any, requests_: Any, tmp_path: Path
) -> None:
    class Interrupted(nested):
        def start(self, *args: Any, **more: Any) -> Any:
            running = super().start(*args, **more)
            logits = running._logits

            def broken(*given: Any) -> Any:
                if running.planes:
                    raise KeyboardInterrupt
                return logits(*given)

            running._logits = broken
            return running

    target = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tune(target, requests_, tmp_path / "out")
    assert target.num_open == 0 and not (tmp_path / "out" / "recipe.json").exists()
    with pytest.raises(UsageError, match="--resume"):
        tune(nested(), requests_, tmp_path / "out")
    with pytest.raises(UsageError, match="another model, workload or settings"):
        tune(nested(), requests_, tmp_path / "out", squeeze=False, resume=True)
    record = tune(nested(), requests_, tmp_path / "out", resume=True)
    recipe = Recipe.load(tmp_path / "out" / "recipe.json")
    assert record["squeeze"]["planes"] == recipe.quality["squeeze"]["planes"] == {"2": [1, 1], "3": [1, 1]}


def test_the_page_says_what_may_go_and_what_that_is_worth(
    nested: Any, requests_: Any, tmp_path: Path
) -> None:
    page = render(tune(nested(), requests_, tmp_path / "out"))
    assert "Half of the KV budget then holds 65% of what the whole one did" in page
    assert page.count("may go") >= 4 and "stays" in page
