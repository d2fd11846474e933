"""What a run records beside the verdict: ablation, requests held, KL by position, pairs of answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from shown import Shown, check_numbers, orphans

from kvtune.quality import Slo, kl_by_position
from kvtune.quality.divergence import TokenDivergence
from kvtune.report import render
from kvtune.target import LoadReport, LoadResult, MemoryMoment
from kvtune.tune import TuneSettings, run
from kvtune.tune.ablation import Ablation, importance
from kvtune.tune.evidence import AnswerPair, answer_record
from kvtune.tune.held import held_in, within_slo
from kvtune.tune.memory import memory_record
from kvtune.tune.pace import Pace
from kvtune.tune.space import SearchSpace
from kvtune.tune.trial import Status, Trial


@pytest.fixture
def found(fake: Any, requests_: Any, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    class Target(fake):
        looked_at: list[dict[str, Any]] = []  # noqa: RUF012

        def memory_moments(self, config, requests, *, kv_budget_bytes=None):
            self.looked_at.append(dict(config))
            return (MemoryMoment(name="before load"), MemoryMoment(name="after load", allocated_bytes=7))

    target = Target()
    settings = TuneSettings(
        budget_s=300.0, price_per_hour=3.6, text=lambda ids: " ".join(f"w{i}" for i in ids)
    )
    result = run(target, requests_, settings, tmp_path, clock=target.clock)
    return target, dict(result.record)


def test_each_changed_setting_of_the_winner_is_measured_without_it(found: Any) -> None:
    target, record = found
    winner, baseline = record["winner"]["config"], record["baseline"]["config"]
    changed = [name for name in winner if winner[name] != baseline[name]]
    assert changed
    rows = record["ablation"]["variants"]
    assert [row["setting"] for row in rows] == changed
    for row in rows:
        assert row["config"] == {**winner, row["setting"]: baseline[row["setting"]]}
        assert row["metrics"]["kv_bytes_per_token"] == target.kv_bytes_per_token(row["config"], context=2048)
        assert row["metrics"]["tpot_s"]["n"] > 0
    assert record["ablation"]["skipped"] == []
    assert record["ablation"]["winner"]["config"] == winner


def test_what_the_search_measured_is_taken_as_it_is(found: Any) -> None:
    _, record = found
    trials = {json.dumps(t["config"]): t for t in record["trials"] if t["status"] != "pruned"}
    for row in [record["ablation"]["winner"], *record["ablation"]["variants"]]:
        known = trials.get(json.dumps(row["config"]))
        if known is not None and "tpot_s" in known["metrics"]:
            assert row["metrics"] == known["metrics"]
            assert row["source"] == f"trial {known['number']} of the search"
        else:
            assert row["source"] == "measured for this table"


def ablation(
    left_s: float, trials: list[Trial], asked: list[Any], names: tuple[str, ...] = ("k", "v", "size")
) -> Ablation:
    def evaluate(number: int, config: Any, best: Any) -> Trial:
        asked.append(config)
        return Trial(number=number, config=config, status=Status.COMPLETE, metrics={"tpot_s": {}})

    knobs = [SimpleNamespace(name=n, values=("a", "b"), baseline="a", is_lossy=False) for n in names]
    pace = Pace(lambda: 0.0, left_s)
    with pace.measure("trial"):
        pass
    pace._spent["trial"] = (10.0, 1.0)
    evaluator: Any = SimpleNamespace(evaluate=evaluate)
    return Ablation(evaluator, SearchSpace(knobs), trials, pace=pace)


def test_without_time_a_setting_is_named_instead_of_measured() -> None:
    asked: list[Any] = []
    record = ablation(1.0, [], asked).record({"k": "b", "v": "a", "size": "b"})
    assert record["skipped"] == ["k", "size"] and record["variants"] == [] and asked == []


def test_a_trial_that_was_never_measured_is_measured() -> None:
    asked: list[Any] = []
    pruned = Trial(number=3, config={"k": "a", "v": "a", "size": "b"}, status=Status.PRUNED)
    record = ablation(100.0, [pruned], asked).record({"k": "b", "v": "a", "size": "b"})
    assert {"k": "a", "v": "a", "size": "b"} in asked
    assert [row["setting"] for row in record["variants"]] == ["k", "size"]


def test_a_side_that_differs_by_layer_goes_back_in_every_layer() -> None:
    asked: list[Any] = []
    found = ablation(100.0, [], asked, names=("k_codec", "v_codec"))
    winner = {"k_codec": "b", "v_codec": "c", "layer_codecs": {"0": ["c", "c"], "3": ["b", "b"]}}
    record = found.record(winner)
    assert [row["setting"] for row in record["variants"]] == ["k_codec", "v_codec", "layer_codecs"]
    assert [row["config"] for row in record["variants"]] == [
        {"k_codec": "a", "v_codec": "c", "layer_codecs": {"3": ["a", "b"]}},
        {"k_codec": "b", "v_codec": "a", "layer_codecs": {"0": ["c", "a"]}},
        {"k_codec": "b", "v_codec": "c"},
    ]


def test_seconds_set_aside_stay_within_a_tenth_of_the_budget() -> None:
    assert ablation(100.0, [], []).cost_s({"k": "b", "v": "b", "size": "b"}) == pytest.approx(10.0)
    assert ablation(1000.0, [], []).cost_s({"k": "b", "v": "a", "size": "a"}) == pytest.approx(25.0)


def test_a_setting_that_decides_a_result_explains_its_spread() -> None:
    rng = np.random.default_rng(0)
    trials = [
        Trial(number=i, config={"codec": c, "seqs": s, "fixed": 1}, status=Status.COMPLETE,
              metrics={"kv_bytes_per_token": {"a": 100.0, "b": 50.0}[c],
                       "tpot_s": {"mean": s / 10 + rng.normal(0, 0.01)}})
        for i, (c, s) in enumerate([(c, s) for c in "ab" for s in (1, 2, 3)] * 3)
    ]  # fmt: skip
    found = {row["setting"]: row for row in importance(trials)}
    assert set(found) == {"codec", "seqs"}
    assert found["codec"]["bytes"] == pytest.approx(1.0) and found["codec"]["tpot"] < 0.05
    assert found["seqs"]["bytes"] == pytest.approx(0.0) and found["seqs"]["tpot"] > 0.95
    assert found["codec"]["kl"] is None


def test_requests_held_carry_bounds_that_hold_the_value(found: Any) -> None:
    _, record = found
    for side in ("baseline", "winner"):
        held = record["held"][side]
        assert held["low"] < held["value"] < held["high"]
        assert held["num_clusters"] == 48
    ratio = record["gain"]["requests_held"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert ratio["ratio"] == pytest.approx(
        record["held"]["winner"]["value"] / record["held"]["baseline"]["value"], rel=1e-3
    )


def test_a_budget_holds_fewer_requests_when_they_are_larger() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(5, 1, 200)
    sessions = [str(i // 4) for i in range(200)]
    held = held_in(1_000_000, sizes, sessions, np.random.default_rng(0))
    assert held["value"] == pytest.approx(1_000_000 / sizes.mean(), abs=0.01)
    assert held["low"] < held["value"] < held["high"]


def report(met: list[bool]) -> LoadReport:
    return LoadReport(
        duration_s=1.0,
        results=[
            LoadResult(request_id=str(i), token_ids=[1], num_cached_tokens=0, ttft_s=0.1 if ok else 9.0,
                       tpot_s=0.01, e2e_s=1.0)
            for i, ok in enumerate(met)
        ],
    )  # fmt: skip


def test_runs_of_the_same_requests_do_not_add_to_n() -> None:
    slo = Slo(ttft_p95_s=1.0)
    once = within_slo([report([True] * 18 + [False] * 2)], slo)
    thrice = within_slo([report([True] * 18 + [False] * 2)] * 3, slo)
    assert (once["value"], once["n"]) == (18, 20) == (thrice["value"], thrice["n"])
    assert (once["low"], once["high"]) == (thrice["low"], thrice["high"])
    assert once["low"] < 18 < once["high"] < 20
    assert thrice["num_runs"] == 3


def test_a_price_becomes_the_cost_of_a_million_tokens(found: Any) -> None:
    _, record = found
    for side in ("baseline", "winner"):
        metrics = record[side]["metrics"]
        expected = 1000 / metrics["output_tokens_per_s"]
        assert metrics["cost_per_million_tokens"] == pytest.approx(expected)


def test_memory_is_looked_at_for_both_sides(found: Any) -> None:
    target, record = found
    assert target.looked_at == [record["baseline"]["config"], record["winner"]["config"]]
    assert record["memory"]["winner"]["moments"][1]["allocated_bytes"] == 7


def test_the_worst_answers_come_first_and_every_case_is_shown(found: Any) -> None:
    _, record = found
    shown = record["answers_side_by_side"]
    damage = [sample["kl"] for sample in shown["samples"]]
    assert damage == sorted(damage, reverse=True)
    assert {sample["strata"]["case"] for sample in shown["samples"]} == {"easy", "long"}
    assert all(sample["baseline"].startswith("w") for sample in shown["samples"])
    worst = record["quality"]["worst_request"]
    assert shown["samples"][0]["request_id"] == worst["request_id"]


def pair(before: str, after: str, kl: float = 0.1) -> AnswerPair:
    return AnswerPair(
        request_id="r", strata={}, prompt_token_ids=[1], baseline=tuple(map(ord, before)),
        winner=tuple(map(ord, after)), kl=kl, flips=0.0,
    )  # fmt: skip


def test_answers_that_stay_json_are_counted() -> None:
    pairs = [
        pair('{"a": 1}', '{"a": 2}'),
        pair('{"a": 1}', '{"a": '),
        pair("text", "{}"),
        pair("[1]", " [1]<|end|>user"),
    ]
    record = answer_record(pairs, lambda ids: "".join(map(chr, ids)))
    assert record["json"] == {"baseline_valid": 3, "still_valid": 2}
    assert record["num_changed"] == 4
    assert [p.first_change for p in pairs] == [6, 6, 0, 0]


def divergence(kl: list[float]) -> TokenDivergence:
    values = np.array(kl)
    return TokenDivergence(item_id="", kl=values, flips=values, delta_nll=values, num_ids=1, is_exact=True)


def test_damage_that_grows_with_distance_shows_at_its_distance() -> None:
    near, far = divergence([0.01] * 4), divergence([0.5, 0.5, 0.7, 0.7])
    none = divergence([0.0] * 4)
    pairs = [(near, none), (far, none)] * 8
    found = kl_by_position(
        pairs, [40, 300] * 8, [str(i) for i in range(16)], rng=np.random.default_rng(0)
    )  # fmt: skip
    assert [(b["from"], b["to"], b["num_tokens"]) for b in found["context"]] == [(32, 63, 32), (256, 511, 32)]
    assert [b["kl"]["value"] for b in found["context"]] == pytest.approx([0.01, 0.6])
    assert [(b["from"], b["to"]) for b in found["answer"]] == [(0, 0), (1, 1), (2, 3)]
    assert found["answer"][-1]["kl"]["value"] == pytest.approx((0.01 + 0.7) / 2)
    assert sum(b["num_tokens"] for b in found["answer"]) == sum(b["num_tokens"] for b in found["context"])


def test_the_page_of_a_run_shows_what_the_run_recorded(found: Any) -> None:
    _, record = found
    shown = Shown(render(record))
    assert check_numbers(shown, record) > 300
    assert orphans(shown) == []
    pointers = {element["pointer"].split("/")[1] for element in shown.marked}
    told = {"ablation", "memory", "positions", "answers_side_by_side", "held", "within_slo", "importance"}
    assert told <= pointers


def test_memory_is_not_looked_at_when_the_time_is_out(fake: Any, requests_: Any) -> None:
    class Target(fake):
        def memory_moments(self, config, requests, *, kv_budget_bytes=None):
            raise AssertionError("there is no time for this")

    pace = Pace(lambda: 0.0, 10.0)
    pace._spent["long load"] = (20.0, 1.0)
    baseline = {"k_codec": "bf16", "v_codec": "bf16", "block_size": 16, "max_num_seqs": 16}
    record = memory_record(
        Target(), {"baseline": baseline}, requests_, kv_budget_bytes=1 << 30, context=2048, pace=pace
    )
    assert record == {"note": "no time was left to look at the memory"}


def test_an_engine_that_cannot_be_looked_into_says_so(fake: Any, requests_: Any) -> None:
    target = fake(name="vllm")
    record = memory_record(
        target, {}, requests_, kv_budget_bytes=None, context=2048, pace=Pace(lambda: 0.0, 10.0)
    )
    assert record == {"note": "engine vllm does not tell its KV memory"}
