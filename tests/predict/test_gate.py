"""The gate: rarely opened for nothing, soon for something, and closed again."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.predict import Gate


def test_a_predictor_no_better_than_its_baseline_is_almost_never_turned_on() -> None:
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(100):
        gate = Gate(scale=1.0, alpha_on=0.01)
        for difference in rng.normal(0.0, 0.5, 1500):
            gate.observe(float(difference), 0.0)
            if gate.is_on:
                opened += 1
                break
    assert opened <= 5  # expected at most 1 of 100


def test_a_better_predictor_is_turned_on_soon_and_left_on() -> None:
    rng = np.random.default_rng(1)
    gate = Gate(scale=1.0)
    states = [gate.observe(float(d), 0.0) for d in rng.normal(0.2, 0.5, 2000)]
    assert states.index(True) < 300
    assert gate.is_on
    assert gate.num_switches == 1
    assert gate.mean_gain == pytest.approx(0.2, abs=0.05)


def test_a_predictor_that_turns_bad_is_turned_off_even_after_a_long_good_time() -> None:
    rng = np.random.default_rng(2)
    gate = Gate(scale=1.0)
    for difference in rng.normal(0.2, 0.5, 5000):
        gate.observe(float(difference), 0.0)
    assert gate.is_on
    states = [gate.observe(float(d), 0.0) for d in rng.normal(-0.2, 0.5, 2000)]
    assert states.index(False) < 1000
    assert not gate.is_on


def test_a_predictor_that_turns_good_is_seen_after_a_long_bad_time() -> None:
    rng = np.random.default_rng(3)
    gate = Gate(scale=1.0)
    for difference in rng.normal(-0.2, 0.5, 20000):
        gate.observe(float(difference), 0.0)
    assert not gate.is_on
    states = [gate.observe(float(d), 0.0) for d in rng.normal(0.3, 0.5, 2000)]
    assert True in states


def test_one_huge_win_does_not_open_the_gate() -> None:
    gate = Gate(scale=1.0)
    assert not gate.observe(1e9, 0.0)


@pytest.mark.parametrize(
    "bad", [{"scale": 0.0}, {"scale": 1.0, "margin": -1.0}, {"scale": 1.0, "alpha_on": 1.0}]
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Gate(**bad)
