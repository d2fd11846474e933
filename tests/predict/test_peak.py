"""The fullest moment of a batch: exact for known lengths, right in mean and spread for distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.predict import Growth, LengthDistribution, horizons_of, peak_forecast, survival_rows
from kvtune.predict.grid import NUM_BUCKETS, bucket_of


def light_peak(held: list[int], remaining: list[int]) -> int:
    """LightLLM's formula, word for word."""
    order = sorted(zip(remaining, held, strict=True), reverse=True)
    peak = total = 0
    for count, (left, now) in enumerate(order, start=1):
        total += now
        peak = max(peak, count * left + total)
    return peak


def blocks_by_stepping(sequences: list[tuple[int, int, int]], block_size: int) -> int:
    """Most blocks held while (prompt, generated, length) sequences are decoded step by step to their end."""
    peak, step = 0, 0
    while True:
        held = [prompt + gone + step for prompt, gone, length in sequences if gone + step < length]
        if not held:
            return peak
        peak = max(peak, sum(-(-n // block_size) for n in held))
        step += 1


def growth(tokens: int, generated: int, output: LengthDistribution, kept: int = 0) -> Growth:
    return Growth(num_tokens=tokens, generated=generated, kept_blocks=kept, output=output)


Sequences = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 50), st.integers(1, 400)), min_size=1, max_size=8
)


@given(Sequences)
def test_with_known_lengths_the_peak_is_lightllms_formula(drawn: list[tuple[int, int, int]]) -> None:
    sequences = [(prompt, gone, gone + left) for prompt, gone, left in drawn]
    shown = peak_forecast(
        [growth(p + g, g, LengthDistribution.known(n)) for p, g, n in sequences], block_size=1
    )
    # The token sampled last is never stored, so one less remains than the formula's r.
    assert shown.expected == light_peak(
        [p + g for p, g, _ in sequences], [n - g - 1 for _, g, n in sequences]
    )
    assert shown.deviation == 0.0


@given(Sequences, st.sampled_from([1, 4, 16]))
def test_with_known_lengths_no_moment_holds_more_than_the_forecast(
    drawn: list[tuple[int, int, int]], block_size: int
) -> None:
    sequences = [(prompt, gone, gone + left) for prompt, gone, left in drawn]
    shown = peak_forecast(
        [growth(p + g, g, LengthDistribution.known(n)) for p, g, n in sequences], block_size=block_size
    )
    peak = blocks_by_stepping(sequences, block_size)
    # between two looks a sequence may cross into a block it leaves before the next look
    assert peak <= shown.expected + len(sequences)
    assert shown.expected <= peak


def lognormal(median: float, spread: float) -> LengthDistribution:
    rng = np.random.default_rng(5)
    masses = np.zeros(NUM_BUCKETS)
    for length in np.maximum(1, median * np.exp(spread * rng.standard_normal(4000))):
        masses[bucket_of(int(length))] += 1
    return LengthDistribution(masses)


def test_the_expected_holdings_are_those_of_drawn_futures() -> None:
    output, rng = lognormal(300, 0.7), np.random.default_rng(6)
    lengths = np.arange(1, 5000)
    each = np.array([output.probability(int(n)) for n in lengths])
    sequences = [growth(200 + g, g, output) for g in (0, 40, 150, 400, 90, 10)]
    horizons = horizons_of(sequences)
    held = np.zeros((3000, len(horizons)))
    for s in sequences:
        above = each * (lengths > s.generated)
        drawn = rng.choice(lengths, size=3000, p=above / above.sum())
        alive = drawn[:, None] > s.generated + horizons[None, :]
        held += np.ceil((s.num_tokens + horizons) / 16) * alive
    shown = peak_forecast(sequences, block_size=16, z=2.0)
    assert shown.expected == pytest.approx(held.mean(axis=0).max(), rel=0.02)
    assert shown.high == pytest.approx((held.mean(axis=0) + 2.0 * held.std(axis=0)).max(), rel=0.03)


def test_the_batch_needs_less_than_the_sum_of_per_request_quantiles() -> None:
    output = lognormal(300, 0.9)
    sequences = [growth(100, 0, output) for _ in range(50)]
    shown = peak_forecast(sequences, block_size=16, z=3.0)
    per_request = 50 * -(-(100 + output.quantile(0.95)) // 16)
    assert shown.high < 0.6 * per_request


def test_blocks_that_stay_with_others_are_counted_once() -> None:
    output = LengthDistribution.known(64)
    alone = peak_forecast([growth(160, 0, output)], block_size=16)
    shared = peak_forecast(
        [growth(160, 0, output, kept=8), growth(160, 0, output, kept=8)], block_size=16, base_blocks=8
    )
    assert shared.expected == 8 + 2 * (alone.expected - 8)


def test_a_window_bounds_what_one_sequence_holds() -> None:
    output = LengthDistribution.known(1000)
    shown = peak_forecast([growth(500, 0, output)] * 3, block_size=16, window_blocks=9)
    assert shown.expected == 27


def test_nobody_running_needs_only_the_base() -> None:
    assert peak_forecast([], block_size=16, base_blocks=7).high == 7


def test_who_outlived_everything_ever_seen_is_about_to_end() -> None:
    output = LengthDistribution(np.eye(NUM_BUCKETS)[bucket_of(10)])
    rows = survival_rows([growth(500, 400, output)], np.array([0.0, 1.0, 100.0]))
    np.testing.assert_array_equal(rows, [[1.0, 0.0, 0.0]])
