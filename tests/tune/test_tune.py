"""Whole runs against the deterministic engine: what wins, what is refused, what survives an interrupt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtune.errors import EngineUnavailableError, TargetError, UsageError
from kvtune.recipe import Recipe
from kvtune.tune import ProgressEvent, TuneSettings, parse_slo, run
from kvtune.workload import split_by_session


def tune(target: Any, requests: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = TuneSettings(**{"budget_s": 300.0, **changes})
    return dict(run(target, requests, settings, folder, clock=target.clock).record)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_smallest_harmless_cache_wins_and_the_next_step_fails(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    target = fake()
    record = tune(target, requests_, tmp_path / "out")
    assert record["status"] == "winner"
    assert (record["winner"]["config"]["k_codec"], record["winner"]["config"]["v_codec"]) == ("int8", "int8")
    assert record["gain"]["kv_bytes_per_token"]["ratio"] == pytest.approx(8.25 / 16)
    assert record["gain"]["kv_bytes_per_token"]["significant"]
    assert record["quality"]["verdict"] == "PASS" and record["quality"]["num_decode_requests"] >= 16
    step = record["smallest_failing_step"]
    assert sorted((step["config"]["k_codec"], step["config"]["v_codec"])) == ["int4", "int8"]
    assert step["quality"]["verdict"] == "FAIL"
    assert record["held"]["winner"]["value"] == pytest.approx(
        record["held"]["baseline"]["value"] * 16 / 8.25, rel=0.01
    )
    assert target.num_open == 0


def test_the_files_agree_with_each_other(fake: Any, requests_: Any, tmp_path: Path) -> None:
    record = tune(fake(), requests_, tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "result.json").read_text()) == record
    recipe = Recipe.load(out / "recipe.json")
    assert recipe.knobs == record["winner"]["config"] and recipe.verdict == "PASS"
    assert recipe.cache_config().k_codec == "int8" and recipe.read_contract == "T0"
    assert recipe.evidence["gain.tpot_s.mean"]["n"] > 0
    trials = lines(out / "trials.jsonl")
    assert (
        trials == record["trials"] and trials[0]["config"]["k_codec"] == "bf16" and trials[0]["number"] == 0
    )
    answers = lines(out / "confirmation.jsonl")
    _, confirm = split_by_session(requests_, 0.5, __import__("numpy").random.default_rng(0))
    assert {a["request_id"] for a in answers} <= {r.request_id for r in confirm}
    assert all(len(a["token_ids"]) == a["max_tokens"] for a in answers)
    assert sorted(p.name for p in out.iterdir()) == [
        "confirmation.jsonl", "recipe.json", "result.json", "study.journal", "trials.jsonl"]  # fmt: skip


def test_every_codec_harmful_keeps_the_baseline_and_says_so(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    target = fake(damage={"bf16": 0.0, "int8": 0.6, "int4": 0.9})
    record = tune(target, requests_, tmp_path)
    assert record["status"] == "no_significant_gain" and record["winner"]["is_baseline"]
    assert record["gain"]["kv_bytes_per_token"]["ratio"] == 1.0
    assert Recipe.load(tmp_path / "recipe.json").knobs == record["baseline"]["config"]
    assert len(lines(tmp_path / "confirmation.jsonl")) >= 12
    assert {t["status"] for t in record["trials"] if t["config"]["k_codec"] != "bf16"} == {"infeasible"}


def test_a_codec_that_changes_nothing_is_inert_and_never_wins(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    record = tune(fake(damage={"bf16": 0.0, "int8": 0.0, "int4": 0.9}), requests_, tmp_path)
    inert = [t for t in record["trials"] if t["quality"] and t["quality"]["verdict"] == "INERT"]
    assert inert and all(t["status"] == "infeasible" for t in inert)
    assert record["status"] == "no_significant_gain"


def test_a_slower_codec_is_infeasible_though_smaller(fake: Any, requests_: Any, tmp_path: Path) -> None:
    record = tune(fake(slowdown={"int8": 1.5, "int4": 1.5}), requests_, tmp_path)
    assert record["status"] == "no_significant_gain"
    slow = [t for t in record["trials"] if "limit 1.1x" in t["reason"]]
    assert slow and all(t["status"] == "infeasible" for t in slow)


def test_a_crash_is_one_infeasible_trial_with_its_reason(fake: Any, requests_: Any, tmp_path: Path) -> None:
    def crash(config: Any, stage: str) -> None:
        if stage == "load" and config["k_codec"] == "int8" and config["v_codec"] == "int8":
            raise TargetError("segfault in kernel")
        if stage == "start" and config["v_codec"] == "int4":
            raise RuntimeError("out of memory")

    target = fake(crash=crash)
    record = tune(target, requests_, tmp_path)
    failed = {t["reason"] for t in record["trials"] if t["status"] == "failed"}
    assert "TargetError: segfault in kernel" in failed
    assert "RuntimeError: out of memory" in failed
    assert record["winner"]["config"]["k_codec"] != "int8" or record["winner"]["config"]["v_codec"] != "int8"
    assert record["status"] == "winner"  # bf16 beside int8 is still smaller
    assert target.num_open == 0


def test_a_config_that_cannot_fit_is_infeasible_not_zero(fake: Any, requests_: Any, tmp_path: Path) -> None:
    def crash(config: Any, stage: str) -> None:
        if stage == "start" and config["block_size"] == 32:
            raise UsageError("the KV budget holds no block of 32 tokens")

    record = tune(fake(crash=crash), requests_, tmp_path)
    refused = [t for t in record["trials"] if t["config"]["block_size"] == 32 and t["status"] != "pruned"]
    assert all(t["status"] == "infeasible" and t["metrics"]["kv_bytes_per_token"] > 0 for t in refused)


@pytest.mark.parametrize("budget", [20.0, 60.0, 200.0])
def test_the_budget_is_kept(fake: Any, requests_: Any, tmp_path: Path, budget: float) -> None:
    target = fake(start_s=1.0)
    record = tune(target, requests_, tmp_path, budget_s=budget)
    assert record["elapsed_s"] <= budget
    assert (tmp_path / "recipe.json").exists()


def test_a_runaway_load_is_cut_off(fake: Any, requests_: Any, tmp_path: Path) -> None:
    target = fake(slowdown={"int4": 1000.0}, damage={"bf16": 0.0, "int8": 0.01, "int4": 0.02})
    record = tune(target, requests_, tmp_path, budget_s=120.0)
    assert record["elapsed_s"] <= 120.0
    assert any("not finished before the deadline" in t["reason"] for t in record["trials"])


def test_a_winner_that_harms_unseen_requests_falls_to_the_next(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    import numpy as np

    _, confirm = split_by_session(requests_, 0.5, np.random.default_rng(0))
    target = fake(
        damage={"bf16": 0.0, "int8": 0.01, "int4": 0.02}, confirm_damage={"int4": 0.8},
        confirm_ids=frozenset(r.request_id for r in confirm),
    )  # fmt: skip
    record = tune(target, requests_, tmp_path, max_confirmed=4)
    assert record["rejected"] and all("FAIL" in r["reason"] for r in record["rejected"])
    assert (record["winner"]["config"]["k_codec"], record["winner"]["config"]["v_codec"]) == ("int8", "int8")
    assert record["smallest_failing_step"]["quality"]["verdict"] == "FAIL"


def test_an_interrupt_leaves_a_study_that_resumes(fake: Any, requests_: Any, tmp_path: Path) -> None:
    def stop_after_three(event: ProgressEvent) -> None:
        if event.trial is not None and event.trial["number"] == 3:
            raise KeyboardInterrupt

    first = fake()
    settings = TuneSettings(budget_s=300.0)
    with pytest.raises(KeyboardInterrupt):
        run(first, requests_, settings, tmp_path, progress=stop_after_three, clock=first.clock)
    assert first.num_open == 0 and not (tmp_path / "recipe.json").exists()
    known = lines(tmp_path / "trials.jsonl")
    with pytest.raises(UsageError, match="--resume"):
        tune(fake(), requests_, tmp_path)
    record = tune(fake(), requests_, tmp_path, resume=True)
    assert [t["number"] for t in record["trials"][: len(known)]] == [t["number"] for t in known]
    assert record["winner"]["config"]["k_codec"] == "int8"
    labels = [json.dumps(t["config"], sort_keys=True) for t in record["trials"]]
    assert len(labels) == len(set(labels))


def test_an_interrupt_inside_a_trial_runs_that_trial_again(fake: Any, requests_: Any, tmp_path: Path) -> None:
    hits: list[dict[str, Any]] = []

    def crash(config: Any, stage: str) -> None:
        if stage == "score" and config["k_codec"] == "int8" and not hits:
            hits.append(dict(config))
            raise KeyboardInterrupt

    target = fake(crash=crash)
    with pytest.raises(KeyboardInterrupt):
        tune(target, requests_, tmp_path)
    assert target.num_open == 0
    record = tune(fake(), requests_, tmp_path, resume=True)
    assert hits[0] in [t["config"] for t in record["trials"]]


def test_a_journal_cut_in_half_by_a_kill_still_resumes(fake: Any, requests_: Any, tmp_path: Path) -> None:
    tune(fake(), requests_, tmp_path)
    (tmp_path / "result.json").unlink()
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 5, "wor')
    assert tune(fake(), requests_, tmp_path, resume=True)["status"] == "winner"


def test_resuming_another_study_is_refused(fake: Any, requests_: Any, tmp_path: Path) -> None:
    tune(fake(), requests_, tmp_path)
    other = fake(identity_model={"path": "other", "weights_sha256": "x"})
    with pytest.raises(UsageError, match="another model"):
        tune(other, requests_, tmp_path, resume=True)
    with pytest.raises(UsageError, match="nothing to resume"):
        tune(fake(), requests_, tmp_path / "empty", resume=True)
    assert not (tmp_path / "empty").exists()


def test_a_finished_run_is_replaced_by_the_next(fake: Any, requests_: Any, tmp_path: Path) -> None:
    tune(fake(), requests_, tmp_path)
    record = tune(fake(damage={"bf16": 0.0, "int8": 0.9, "int4": 0.9}), requests_, tmp_path)
    assert record["status"] == "no_significant_gain"
    assert Recipe.load(tmp_path / "recipe.json").knobs["k_codec"] == "bf16"


def test_a_baseline_that_does_not_start_leaves_nothing_behind(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    def crash(_config: Any, stage: str) -> None:
        raise EngineUnavailableError(f"no engine at {stage}")

    with pytest.raises(EngineUnavailableError):
        tune(fake(crash=crash), requests_, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="holds no block"):
        tune(fake(), requests_, tmp_path / "out", kv_budget_bytes=8)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_first(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    target = fake()
    with pytest.raises(UsageError, match="choose another --out"):
        tune(target, requests_, tmp_path / "file" / "out")
    assert target.starts == []


def test_synthetic_text_is_said_and_a_lossy_winner_is_not_proven(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    record = tune(fake(), requests_, tmp_path, is_synthetic_text=True)
    assert "generic: text is synthetic" in record["quality"]["notes"]
    assert record["winner"]["config"]["k_codec"] == "int8" and record["quality"]["proven"] is False


def test_with_an_slo_the_most_requests_within_it_win(fake: Any, requests_: Any, tmp_path: Path) -> None:
    target = fake(slowdown={"bf16": 1.6, "int4": 1.6})
    record = tune(target, requests_, tmp_path, slo=parse_slo("ttft_p95=60ms"), kv_budget_bytes=1 << 20)
    assert record["winner"]["config"]["k_codec"] == "int8" and record["winner"]["config"]["v_codec"] == "int8"
    assert record["winner"]["metrics"]["num_slo_met"] > record["baseline"]["metrics"]["num_slo_met"]


def test_the_same_seed_gives_the_same_result(fake: Any, requests_: Any, tmp_path: Path) -> None:
    one, two = (tune(fake(), requests_, tmp_path / name) for name in ("a", "b"))
    for record in (one, two):
        record.pop("recipe"), record.pop("next_command")
    assert one == two


def test_aa_noise_of_the_same_baseline_is_reported_and_covers_one(
    fake: Any, requests_: Any, tmp_path: Path
) -> None:
    record = tune(fake(), requests_, tmp_path)
    noise = record["aa_noise"]["tpot_s.mean"]
    assert 0.9 < noise["low"] <= noise["value"] <= noise["high"] < 1.1
    assert not record["gain"]["tpot_s.mean"]["significant"]


@pytest.mark.parametrize(
    "text", ["", "ttft_p95", "ttft_p95=", "ttft_p95=fast", "latency=3s", "ttft_p95=1s,ttft_p95=2s"]
)
def test_a_malformed_slo_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_slo(text)


def test_an_slo_reads_durations() -> None:
    slo = parse_slo("ttft_p95=300ms, tpot_p95=0.05s")
    assert (slo.ttft_p95_s, slo.tpot_p95_s) == (0.3, 0.05)


def test_one_session_cannot_be_confirmed(fake: Any, requests_: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="never saw"):
        tune(fake(), requests_[:2], tmp_path)


def test_progress_tells_the_time_left_and_the_best_so_far(fake: Any, requests_: Any, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    target = fake()
    run(target, requests_, TuneSettings(budget_s=300.0), tmp_path, progress=events.append, clock=target.clock)
    assert [e.time_left_s for e in events] == sorted((e.time_left_s for e in events), reverse=True)
    assert {"baseline", "search", "confirm"} <= {e.stage for e in events}
    assert events[-1].best is not None
