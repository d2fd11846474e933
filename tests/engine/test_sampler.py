"""A token depends on its own logits, its request's seed and its index, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtune import SamplingParams
from kvtune.engine.sampler import SampleRow, check_sampling, request_seed, sample, uniform
from kvtune.errors import UsageError
from kvtune.types import RequestId

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))


def _row(params: SamplingParams, *, seed: int = 0, index: int = 0) -> SampleRow:
    return SampleRow(RequestId("r"), params, seed, index)


def _draws(params: SamplingParams, count: int = 4000) -> np.ndarray:
    rows = [_row(params, index=index) for index in range(count)]
    return np.array([one.token_id for one in sample(LOGITS.expand(count, -1), rows)])


def _shares(params: SamplingParams) -> np.ndarray:
    return np.bincount(_draws(params), minlength=5) / 4000


def test_zero_temperature_takes_the_best_token():
    assert set(_draws(SamplingParams(temperature=0.0), 20)) == {0}


def test_draws_follow_the_distribution():
    # 4000 draws: standard deviation of a share is at most 0.008
    np.testing.assert_allclose(_shares(SamplingParams()), LOGITS.exp().numpy(), atol=0.03)


def test_temperature_sharpens_and_flattens():
    expected = LOGITS.exp().numpy() ** 2
    np.testing.assert_allclose(_shares(SamplingParams(temperature=0.5)), expected / expected.sum(), atol=0.03)


def test_top_k_keeps_the_k_best_and_renormalises():
    np.testing.assert_allclose(_shares(SamplingParams(top_k=2)), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    np.testing.assert_allclose(_shares(SamplingParams(top_p=0.6)), [4 / 7, 3 / 7, 0, 0, 0], atol=0.03)
    assert set(_draws(SamplingParams(top_p=0.01))) == {0}


def test_top_k_comes_before_top_p():
    # of the two best, renormalised to 4/7 and 3/7, the first alone reaches one half
    assert set(_draws(SamplingParams(top_k=2, top_p=0.5))) == {0}


def test_ties_at_the_cut_go_to_the_lower_ids():
    logits = torch.zeros(1, 6).expand(500, -1)
    rows = [_row(SamplingParams(top_k=2), index=index) for index in range(500)]
    assert {one.token_id for one in sample(logits, rows)} == {0, 1}


def test_a_token_does_not_depend_on_its_batch_mates():
    params = SamplingParams(temperature=0.9, top_p=0.95)
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    rows = [_row(params, seed=i, index=3 * i) for i in range(7)]
    together = [one.token_id for one in sample(logits, rows)]
    alone = [sample(logits[i : i + 1], [rows[i]])[0].token_id for i in range(7)]
    assert together == alone


def test_seed_and_index_both_count():
    numbers = {uniform(seed, index) for seed in range(-20, 20) for index in range(20)}
    assert len(numbers) == 800
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert abs(np.mean(list(numbers)) - 0.5) < 0.05


def test_a_request_without_a_seed_gets_one_from_the_engine_and_its_id():
    params = SamplingParams()
    assert request_seed(0, "a", params) == request_seed(0, "a", params)
    assert (
        len({request_seed(0, "a", params), request_seed(0, "b", params), request_seed(1, "a", params)}) == 3
    )
    assert request_seed(0, "a", SamplingParams(seed=17)) == 17


def test_logprobs_are_of_the_unmodified_logits():
    params = SamplingParams(temperature=0.3, top_k=1, logprobs=3)
    one = sample(5.0 + LOGITS[None], [_row(params)])[0]
    assert one.token_id == 0
    assert one.logprob == pytest.approx(float(LOGITS[0]), abs=1e-6)
    assert list(one.top) == [0, 1, 2]
    assert list(one.top.values()) == pytest.approx(LOGITS[:3].tolist(), abs=1e-6)


def test_zero_logprobs_give_the_chosen_token_only_and_none_gives_nothing():
    chosen = sample(LOGITS[None], [_row(SamplingParams(temperature=0.0, logprobs=0))])[0]
    assert chosen.logprob is not None
    assert chosen.top == {}
    assert sample(LOGITS[None], [_row(SamplingParams(temperature=0.0))])[0].logprob is None


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0},
        {"top_p": 1.1}, {"top_k": -1}, {"logprobs": -1}, {"seed": 1 << 63}, {"stop": "text"}, {"stop": ("",)},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(UsageError):
        check_sampling(SamplingParams(**bad))
