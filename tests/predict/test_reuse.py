"""Hit rates to come, told only where the past is a guide; conversations that return."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.predict import ReturnPredictor, forecast_hit_rate


def traffic(
    shares: np.ndarray, seed: int = 0, *, prompts: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Per request (hit tokens, prompt tokens), half of the requests hitting nothing."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(200, 2000, len(shares)) if prompts is None else prompts
    share = np.clip(2 * shares * rng.integers(0, 2, len(shares)) * rng.uniform(0.8, 1.2, len(shares)), 0, 1)
    return [int(n) for n in asked * share], [int(n) for n in asked]


@pytest.mark.parametrize("seed", range(5))
def test_a_stationary_history_tells_what_comes(seed: int) -> None:
    hits, asked = traffic(np.full(4000, 0.3), seed)
    shown = forecast_hit_rate(hits[:2000], asked[:2000])
    assert shown.is_stationary
    assert shown.value is not None
    assert shown.value == pytest.approx(sum(hits[2000:]) / sum(asked[2000:]), abs=0.03)
    assert shown.low is not None
    assert shown.high is not None
    assert shown.low < 0.3 < shown.high


def test_the_cold_start_is_left_out() -> None:
    shares = np.full(4000, 0.3)
    shares[:900] = 0.0
    shown = forecast_hit_rate(*traffic(shares))
    assert shown.value == pytest.approx(0.3, abs=0.03)
    assert shown.parts[0] < 0.1


def test_a_hit_rate_that_keeps_rising_is_flagged_instead_of_forecast() -> None:
    shown = forecast_hit_rate(*traffic(np.linspace(0.05, 0.45, 4000)))
    assert not shown.is_stationary
    assert shown.value is None
    assert "points apart" in shown.reason


def test_prompts_that_keep_growing_are_flagged_at_an_even_hit_rate() -> None:
    asked = np.linspace(1000, 3000, 4000).astype(int)
    shown = forecast_hit_rate(*traffic(np.full(4000, 0.3), prompts=asked))
    assert not shown.is_stationary
    assert "prompt lengths" in shown.reason


def test_a_short_history_says_that_it_is_short() -> None:
    shown = forecast_hit_rate([1] * 50, [2] * 50)
    assert shown.value is None
    assert "50 requests are too few" in shown.reason


@pytest.mark.parametrize(("hits", "asked"), [([1, 2], [3]), ([5], [3]), ([-1], [3])])
def test_impossible_counts_are_refused(hits: list[int], asked: list[int]) -> None:
    with pytest.raises(UsageError):
        forecast_hit_rate(hits, asked)


def play(predictor: ReturnPredictor, uses: list[tuple[float, int]]) -> None:
    for now, prefix in sorted(uses):
        predictor.use(prefix, now)


def sessions(rng: np.random.Generator, count: int) -> list[tuple[float, int]]:
    """Half are asked once, the other half every 10 s, eight times."""
    uses: list[tuple[float, int]] = []
    for number in range(count):
        start = float(rng.uniform(0, 20000))
        uses += [(start + 10 * turn, number) for turn in range(1 if number % 2 else 8)]
    return uses


def test_a_conversation_under_way_is_told_from_a_single_question() -> None:
    predictor = ReturnPredictor(horizon_s=60)
    play(predictor, sessions(np.random.default_rng(0), 1500))
    assert predictor.gate.is_on
    predictor.use("new", 30000.0)
    assert predictor.predict("new") == pytest.approx(0.5, abs=0.06)
    predictor.use("new", 30010.0)
    assert predictor.predict("new") > 0.95
    assert predictor.baseline() == pytest.approx(7 / 9, abs=0.02)


def test_returns_that_follow_no_class_leave_the_baseline_in_charge() -> None:
    rng = np.random.default_rng(1)
    predictor = ReturnPredictor(horizon_s=5)
    play(predictor, [(float(t), int(rng.integers(0, 50))) for t in np.cumsum(rng.exponential(0.1, 4000))])
    predictor.use("x", 1e6)
    assert predictor.predict("x") == predictor.baseline()


def test_what_did_not_return_in_time_is_forgotten() -> None:
    predictor = ReturnPredictor(horizon_s=10)
    predictor.use("a", 0.0)
    predictor.expire(11.0)
    assert not predictor._open
    assert not predictor._uses
    assert predictor.baseline() == pytest.approx(1 / 3)


def test_a_horizon_must_be_ahead() -> None:
    with pytest.raises(UsageError):
        ReturnPredictor(horizon_s=0)
