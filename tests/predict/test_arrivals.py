"""Arrival counts: the rule that did best answers, and only where it beats the last value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.predict import ArrivalPredictor


def backtest(
    counts: np.ndarray, *, season: int | None = None
) -> tuple[ArrivalPredictor, float, float, float]:
    """(predictor, our mean absolute error, the last value's, share inside the interval) after 200 windows."""
    predictor = ArrivalPredictor(season=season)
    ours, last, inside, judged, previous = 0.0, 0.0, 0, 0, 0.0
    for index, count in enumerate(counts):
        if index >= 200:
            shown = predictor.predict()
            ours += abs(shown.count - count)
            last += abs(previous - count)
            assert shown.low is not None
            assert shown.high is not None
            inside += shown.low <= count <= shown.high
            judged += 1
        predictor.observe(float(count))
        previous = float(count)
    return predictor, ours / judged, last / judged, inside / judged


def test_steady_traffic_is_averaged_instead_of_echoed() -> None:
    counts = np.random.default_rng(0).poisson(20, 1500)
    _, ours, last, inside = backtest(counts)
    assert ours < 0.8 * last  # the average of all errs 1 / sqrt(2) as much
    assert 0.7 < inside < 0.92


def test_a_daily_rhythm_is_used_once_a_day_was_seen() -> None:
    hours = np.arange(24 * 60)
    means = 200 * np.where(hours % 24 < 3, 4.0, 1.0)
    counts = np.random.default_rng(1).poisson(means)
    predictor, ours, last, _ = backtest(counts, season=24)
    assert ours < 0.6 * last
    assert predictor.predict().rule == "season"


def test_a_random_walk_is_left_to_the_last_value() -> None:
    steps = np.random.default_rng(2).normal(0, 30, 2000)
    counts = np.round(np.abs(5000 + np.cumsum(steps)))
    _, ours, last, _ = backtest(counts)
    assert ours <= 1.05 * last


def test_a_jump_of_the_level_is_followed() -> None:
    rng = np.random.default_rng(3)
    predictor = ArrivalPredictor()
    for count in np.concatenate([rng.poisson(10, 500), rng.poisson(200, 100)]):
        predictor.observe(float(count))
    assert predictor.predict().count == pytest.approx(200, rel=0.15)


def test_no_interval_is_claimed_from_few_errors() -> None:
    predictor = ArrivalPredictor()
    for _ in range(5):
        predictor.observe(3)
    assert predictor.predict().low is None


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_count_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(UsageError):
        ArrivalPredictor().observe(bad)


def test_nothing_is_forecast_from_nothing() -> None:
    with pytest.raises(UsageError, match="observe"):
        ArrivalPredictor().predict()
    with pytest.raises(UsageError, match="season"):
        ArrivalPredictor(season=1)
