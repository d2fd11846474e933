"""Output lengths: distributions on the grid, what keys teach, and when the learned answer may speak."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.predict import LengthDistribution, LengthKey, LengthPredictor
from kvtune.predict.grid import EDGES, MAX_LENGTH, NUM_BUCKETS, WIDTHS, bucket_of

SMALL = 300  # brute force looks at every length below this
SMALL_BUCKETS = bucket_of(SMALL - 1)
Masses = st.lists(st.floats(0.0, 1.0), min_size=SMALL_BUCKETS, max_size=SMALL_BUCKETS).filter(
    lambda m: sum(m) > 0.1
)


def distribution(masses: list[float], max_tokens: int | None = None) -> LengthDistribution:
    full = np.zeros(NUM_BUCKETS)
    full[: len(masses)] = masses
    return LengthDistribution(full, max_tokens=max_tokens)


@given(st.integers(0, 2 * MAX_LENGTH))
def test_every_length_falls_into_the_bucket_that_covers_it(length: int) -> None:
    bucket = bucket_of(length)
    assert EDGES[bucket] <= min(length, MAX_LENGTH) < EDGES[bucket + 1]


def test_no_bucket_is_wider_than_a_tenth_of_its_lengths() -> None:
    assert (WIDTHS[17:] / EDGES[17:-1]).max() < 0.12
    assert (WIDTHS[:17] == 1).all()


@given(Masses, st.one_of(st.none(), st.integers(1, SMALL)))
def test_probabilities_of_all_lengths_sum_to_one_and_give_mean_and_survival(
    masses: list[float], max_tokens: int | None
) -> None:
    shown = distribution(masses, max_tokens)
    lengths = range((max_tokens or SMALL) + 1)
    each = np.array([shown.probability(n) for n in lengths])
    assert each.sum() == pytest.approx(1.0)
    assert shown.mean() == pytest.approx(float(each @ np.arange(len(each))))
    for n in (0, 3, 17, 100):
        if max_tokens is None or n < max_tokens:
            assert shown.survival(n) == pytest.approx(float(each[n + 1 :].sum()), abs=1e-9)


@given(Masses, st.floats(0.01, 0.99))
def test_a_quantile_covers_its_share_and_one_token_less_does_not(masses: list[float], share: float) -> None:
    shown = distribution(masses)
    at = int(shown.quantile(share))
    assert 1.0 - shown.survival(at) >= share - 1e-9
    assert at == 0 or 1.0 - shown.survival(at - 1) <= share + 1e-9


@given(st.integers(0, 16), st.integers(0, 16))
def test_the_score_of_a_certain_forecast_is_its_absolute_error(predicted: int, length: int) -> None:
    certain = distribution([0.0] * predicted + [1.0])
    # a whole number stands for the unit interval that starts at it, so the two may differ by that width
    assert abs(certain.crps(length) - abs(predicted - length)) <= 0.5


def test_a_known_length_has_no_spread() -> None:
    known = LengthDistribution.known(137)
    assert known.survival(136) == 1.0
    assert known.survival(137) == 0.0
    assert known.quantile(0.05) == known.quantile(0.95) == known.mean() == 137


def draws(rng: np.random.Generator, median: float, count: int) -> list[int]:
    return [int(n) for n in np.maximum(1, median * np.exp(0.3 * rng.standard_normal(count)))]


def pinball(shown: LengthDistribution, length: int, share: float = 0.9) -> float:
    at = shown.quantile(share)
    return max(share * (length - at), (1 - share) * (at - length))


def saved(keys: list[LengthKey], lengths: list[int], *, warm_up: int = 500) -> tuple[LengthPredictor, float]:
    """Share of the constant baseline's p90 pinball loss saved by what the gate lets through."""
    predictor, ours, constant = LengthPredictor(), 0.0, 0.0
    for index, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        if index >= warm_up:
            ours += pinball(predictor.predict(key), length)
            constant += pinball(predictor.predict_constant(), length)
        predictor.observe(key, length)
    return predictor, 1.0 - ours / constant


@pytest.mark.parametrize(
    "key",
    [
        lambda group: LengthKey(client=f"client-{group}"),
        lambda group: LengthKey(session=f"session-{group}"),
        lambda group: LengthKey(prompt_tokens=10 * 4**group),
        lambda group: LengthKey(prompt_tokens=5000, new_tokens=10 * 4**group),
    ],
)
def test_each_key_that_tells_lengths_apart_is_learned(key) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, 3000)
    medians = [20, 100, 500, 2500]
    lengths = [draws(rng, medians[g], 1)[0] for g in groups]
    predictor, gain = saved([key(int(g)) for g in groups], lengths)
    assert predictor.gate.is_on
    assert gain > 0.4


def test_keys_that_mean_nothing_cost_nothing() -> None:
    rng = np.random.default_rng(1)
    lengths = draws(rng, 300, 3000)
    keys = [
        LengthKey(client=f"c{a}", session=f"s{b}", prompt_tokens=int(c), new_tokens=int(c) // 2)
        for a, b, c in zip(
            rng.integers(0, 5, 3000), rng.integers(0, 500, 3000), rng.integers(1, 9999, 3000), strict=True
        )
    ]
    predictor, gain = saved(keys, lengths)
    assert abs(gain) < 0.02
    assert predictor.predict(keys[0]).quantile(0.9) == pytest.approx(
        predictor.predict_constant().quantile(0.9), rel=0.15
    )


def test_before_the_gate_opens_the_constant_baseline_answers() -> None:
    predictor = LengthPredictor()
    for length in (5, 500, 50):
        predictor.observe(LengthKey(client="a"), length)
    assert not predictor.gate.is_on
    answer = predictor.predict(LengthKey(client="a"))
    np.testing.assert_array_equal(answer.masses, predictor.predict_constant().masses)


def test_a_shift_of_all_lengths_is_followed_by_the_mixture_and_not_by_the_constant() -> None:
    rng = np.random.default_rng(2)
    predictor = LengthPredictor()
    for length in draws(rng, 100, 2000) + draws(rng, 1000, 1500):
        predictor.observe(LengthKey(), length)
    assert predictor.predict_constant().quantile(0.5) < 400
    assert predictor.predict(LengthKey()).quantile(0.5) == pytest.approx(1000, rel=0.2)


def test_outputs_cut_off_teach_what_lies_above_the_cut() -> None:
    rng = np.random.default_rng(3)
    naive, told = LengthPredictor(), LengthPredictor()
    for length in draws(rng, 400, 3000):
        naive.observe(LengthKey(), min(length, 350))
        told.observe(LengthKey(), min(length, 350), is_censored=length > 350)
    # With nothing ever seen above the cut nobody can know how far it goes, only that it goes on.
    assert naive.predict_constant().survival(500) < 0.01
    assert told.predict_constant().survival(500) > 0.3


def test_what_is_remembered_is_bounded() -> None:
    predictor = LengthPredictor(max_contexts=10)
    for index in range(200):
        predictor.observe(LengthKey(client=f"c{index}", session=f"s{index}"), 100 + index)
    assert max(len(contexts) for contexts in predictor._contexts) <= 10


def test_a_negative_length_and_empty_limits_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="negative, found -1"):
        LengthPredictor().observe(LengthKey(), -1)
    with pytest.raises(UsageError, match="max_contexts"):
        LengthPredictor(max_contexts=0)


def test_few_observations_do_not_make_outputs_look_endless() -> None:
    predictor = LengthPredictor()
    for length in draws(np.random.default_rng(5), 200, 32):
        predictor.observe(LengthKey(), length)
    shown = predictor.predict_constant(max_tokens=16_384)
    assert shown.survival(4_000) < 0.02
    assert shown.mean() < 400
