"""Conversations that return, told from single questions."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.predict import ReturnPredictor


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
