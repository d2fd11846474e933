"""Paired right-or-wrong answers: bounds that hold at few discordant pairs, in both directions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.quality.paired import mcnemar_p, net_loss, pairs_needed


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_bounds_enclose_the_value_and_mirror_when_sides_are_swapped(
    n_lost: tuple[int, int], data: st.DataObject
) -> None:
    n, lost = n_lost
    gained = data.draw(st.integers(0, n - lost))
    one, other = net_loss(lost, gained, n), net_loss(gained, lost, n)
    assert -1 <= one.low <= one.value <= one.high <= 1
    assert one.value == -other.value
    if lost and gained:
        assert one.low == pytest.approx(-other.high, abs=1e-9)


def test_the_bounds_solve_the_score_equation_with_a_likelihood_found_by_search() -> None:
    estimate = net_loss(12, 2, 44)
    assert estimate.value == pytest.approx(10 / 44)
    scores = [(10 - 44 * d) / np.sqrt(44 * (2 * _gain(12, 2, 44, d) + d * (1 - d))) for d in
              (estimate.low, estimate.high)]  # fmt: skip
    assert scores == pytest.approx([1.6449, -1.6449], abs=1e-3)


def _gain(b: int, c: int, n: int, delta: float) -> float:
    """P(gained) that makes the counts most likely under `delta`, by search over a grid."""
    grid = np.linspace(max(0.0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 400_001)
    likelihood = b * np.log(grid + delta) + c * np.log(grid) + (n - b - c) * np.log(1 - 2 * grid - delta)
    return float(grid[likelihood.argmax()])


def test_no_loss_in_n_pairs_bounds_the_loss_by_the_rule_of_three() -> None:
    assert net_loss(0, 0, 150).high == pytest.approx(3 / 150, rel=0.01)
    assert net_loss(0, 0, 150).low <= 0


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.02, 0.02), (0.05, 0.01), (0.01, 0.05), (0.004, 0.0)])
def test_each_bound_misses_at_most_about_one_time_in_twenty(p_lost: float, p_gained: float) -> None:
    rng = np.random.default_rng(7)
    n, runs = 256, 2000
    counts = rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], size=runs)
    known = {}
    misses = np.zeros(2)
    for lost, gained, _ in counts.tolist():
        bounds = known.setdefault((lost, gained), net_loss(lost, gained, n))
        misses += (bounds.low > p_lost - p_gained, bounds.high < p_lost - p_gained)
    assert misses.max() / runs < 0.07


def test_the_exact_test_is_one_sided_for_harm() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 0) == pytest.approx(1 / 32)
    assert mcnemar_p(0, 5) == 1.0
    assert mcnemar_p(6, 2) == pytest.approx((28 + 8 + 1) / 256)


def test_pairs_needed_follow_discordance_and_margin() -> None:
    assert pairs_needed(0.04, 0.02) == 619
    assert pairs_needed(0.02, 0.02) == 310
    assert pairs_needed(0.0, 0.02) == 150
    assert pairs_needed(0.04, 0.0) is None


@pytest.mark.parametrize("counts", [(1, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="pairs cannot hold"):
        net_loss(*counts)
