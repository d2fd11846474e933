"""The interval of a share: known values, symmetry, coverage, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.errors import UsageError
from kvtune.quality import wilson_interval


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (243, 256, 0.9149, 0.9700)],
)
def test_known_values(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=2e-4)


def test_failures_have_the_mirrored_interval():
    low, high = wilson_interval(3, 17)
    assert wilson_interval(14, 17) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("share", [0.03, 0.5, 0.95])
def test_the_interval_holds_the_share_about_nineteen_times_in_twenty(share):
    drawn = np.random.default_rng(0).binomial(256, share, size=4000)
    inside = [low <= share <= high for low, high in (wilson_interval(int(k), 256) for k in drawn)]
    assert 0.93 < np.mean(inside) < 0.97


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, count):
    with pytest.raises(UsageError, match=f"found {successes} of {count}"):
        wilson_interval(successes, count)
