"""The gate on planted damage of known size: perturbed logits, every truth computed in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import TargetError, UsageError
from kvtune.quality import (
    MARGINS,
    QualityVerdict,
    Reference,
    Slo,
    Verdict,
    bootstrap_mean,
    bootstrap_ratio,
    compare_speed,
    divergence,
    is_bit_equal,
    judge,
    kl_divergence,
    margin_named,
)
from kvtune.quality.replay import affordable_top, decode_subset
from kvtune.target import LoadReport, LoadResult, ScoreItem, Scores

VOCABULARY = 64
NEAR = MARGINS["near-lossless"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def scores_of(
    logits: np.ndarray, tokens: np.ndarray, *, item: str = "r0", ids: np.ndarray | None = None
) -> Scores:
    logp = log_softmax(logits.astype(np.float64))
    rows = np.arange(len(tokens))
    full = ids is None
    chosen = np.broadcast_to(np.arange(logits.shape[1], dtype=np.int32), logits.shape) if ids is None else ids
    return Scores(
        item_id=item, ids=chosen.astype(np.int32),
        logprobs=np.take_along_axis(logp, chosen.astype(np.int64), axis=1).astype(np.float32),
        token_logprobs=logp[rows, tokens].astype(np.float32), argmax=logp.argmax(axis=1).astype(np.int32),
        is_full=full,
    )  # fmt: skip


def true_kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    p, q = log_softmax(a.astype(np.float64)), log_softmax(b.astype(np.float64))
    return (np.exp(p) * (p - q)).sum(axis=1)


def make_case(
    damage: float, *, seed: int, floor: float = 1e-3, num: int = 32, tokens: int = 48,
    synthetic: bool = False, num_decode: int = 0,
) -> tuple[Reference, list[Scores], float]:  # fmt: skip
    """A reference of `num` sessions, a candidate with logit noise `damage`, and its true mean KL."""
    rng = np.random.default_rng(seed)
    base, cand, aa, kls = [], [], [], []
    for i in range(num):
        logits = rng.normal(0, 3, (tokens, VOCABULARY))
        # damage differs between sessions, as it does between prompts
        noise = rng.normal(0, damage * rng.uniform(0.5, 1.5), logits.shape)
        picked = logits.argmax(axis=1)
        base.append(scores_of(logits, picked, item=f"r{i}"))
        cand.append(scores_of(logits + noise, picked, item=f"r{i}"))
        aa.append(scores_of(logits + rng.normal(0, floor, logits.shape), picked, item=f"r{i}"))
        kls.append(true_kl(logits, logits + noise).mean())
    items = tuple(
        ScoreItem(item_id=s.item_id, prompt_token_ids=(1,) * 10, continuation=(1,) * tokens) for s in base
    )
    reference = Reference(
        items=items, scores=tuple(base), aa_scores=tuple(aa), clusters=tuple(f"s{i}" for i in range(num)),
        strata=tuple({"prompt_tokens": "0-255", "case": "easy" if i % 2 else "long"} for i in range(num)),
        decode_items=tuple(range(num_decode)), decode_scores=tuple(aa[:num_decode]),
        is_synthetic_text=synthetic,
    )  # fmt: skip
    return reference, cand, float(np.mean(kls))


def verdict_of(damage: float, *, seed: int = 0, is_lossy: bool = True, **options: object) -> QualityVerdict:
    reference, scores, _ = make_case(damage, seed=seed, **options)  # type: ignore[arg-type]
    return judge(reference, scores, margin=NEAR, is_lossy=is_lossy, rng=np.random.default_rng(1))


def damage_of_kl(target: float) -> float:
    low, high = 0.0, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if make_case(middle, seed=0)[2] < target else (low, middle)
    return low


# divergence


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.01, 8), noise=st.floats(0, 4))
def test_full_vocabulary_kl_equals_the_direct_float64_sum(seed: int, spread: float, noise: float) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(0, spread, (7, VOCABULARY))
    b = a + rng.normal(0, noise, a.shape)
    tokens = a.argmax(axis=1)
    kl, num_ids, exact = kl_divergence(scores_of(a, tokens), scores_of(b, tokens))
    assert exact and num_ids == VOCABULARY
    # float32 log-probabilities: absolute error of each about 6e-8 x their size
    np.testing.assert_allclose(kl, true_kl(a, b), rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, VOCABULARY), noise=st.floats(0, 4))
def test_lumping_the_tail_never_exceeds_the_true_kl_and_grows_with_k(seed: int, k: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 2, (5, VOCABULARY))
    b = a + rng.normal(0, noise, a.shape)
    tokens = a.argmax(axis=1)
    order = np.argsort(-a, axis=1)
    lumped = [
        kl_divergence(scores_of(a, tokens, ids=order[:, :n]), scores_of(b, tokens, ids=order[:, :n]))[0]
        for n in (k, min(2 * k, VOCABULARY))
    ]
    assert (lumped[0] <= true_kl(a, b) + 1e-5).all()
    assert (lumped[0] <= lumped[1] + 1e-5).all()


def test_ids_the_engine_did_not_answer_go_to_the_tail() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(0, 2, (6, VOCABULARY))
    b = a + rng.normal(0, 0.5, a.shape)
    tokens = a.argmax(axis=1)
    own = np.argsort(-b, axis=1)[:, :8]  # the candidate's own top ids, in another order than asked
    wanted = np.argsort(-a, axis=1)[:, :8]
    kl, num_ids, exact = kl_divergence(scores_of(a, tokens, ids=wanted), scores_of(b, tokens, ids=own))
    shared = [np.intersect1d(x, y) for x, y in zip(own, wanted, strict=True)]
    assert not exact and num_ids == min(len(s) for s in shared) < 8
    p, q = np.exp(log_softmax(a)), np.exp(log_softmax(b))
    for row, ids in enumerate(shared):
        tail_p, tail_q = 1 - p[row, ids].sum(), 1 - q[row, ids].sum()
        want = (p[row, ids] * np.log(p[row, ids] / q[row, ids])).sum() + tail_p * np.log(tail_p / tail_q)
        assert kl[row] == pytest.approx(want, abs=1e-5)


def test_missing_entries_with_id_minus_one_are_not_taken_for_tokens() -> None:
    a = np.random.default_rng(0).normal(0, 2, (4, VOCABULARY))
    tokens = a.argmax(axis=1)
    ids = np.argsort(-a, axis=1)[:, :6].astype(np.int32)
    reference = scores_of(a, tokens, ids=ids)
    holes = Scores(
        item_id="r0", ids=np.where(np.arange(6) < 4, ids, -1).astype(np.int32),
        logprobs=np.where(np.arange(6) < 4, reference.logprobs, -np.inf).astype(np.float32),
        token_logprobs=reference.token_logprobs, argmax=reference.argmax, is_full=False,
    )  # fmt: skip
    kl, num_ids, _ = kl_divergence(reference, holes)
    assert num_ids == 4 and kl == pytest.approx(np.zeros(4), abs=1e-6)


def test_flips_and_delta_nll_have_the_stated_sign() -> None:
    a = np.zeros((1, 4))
    a[0, 2] = 3.0
    b = np.zeros((1, 4))
    b[0, 1] = 3.0
    d = divergence(scores_of(a, np.array([2])), scores_of(b, np.array([2])))
    assert d.flips.tolist() == [1.0] and d.delta_nll[0] == pytest.approx(3.0, abs=1e-6)


def test_scores_of_other_tokens_are_refused() -> None:
    a = np.zeros((2, 4))
    with pytest.raises(TargetError, match="cannot be used"):
        divergence(scores_of(a, np.array([0, 0])), scores_of(a[:1], np.array([0])))


def test_bit_equality_sees_the_last_bit() -> None:
    a = np.random.default_rng(0).normal(0, 1, (3, 8))
    one, two = (scores_of(a, np.array([0, 1, 2])) for _ in range(2))
    assert is_bit_equal(one, two)
    two.logprobs[0, 0] = np.nextafter(two.logprobs[0, 0], np.float32(0))
    assert not is_bit_equal(one, two)


def test_a_candidate_asked_at_all_ids_is_exact_although_the_engine_does_not_say_so() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 2, (4, VOCABULARY))
    everything = np.broadcast_to(np.arange(VOCABULARY, dtype=np.int32), a.shape)
    tokens = a.argmax(axis=1)
    _, _, exact = kl_divergence(scores_of(a, tokens), scores_of(a + 0.1, tokens, ids=everything))
    assert exact


# bootstrap


@pytest.mark.parametrize("side", ["high", "low"])
def test_bounds_cover_the_mean_as_often_as_promised(side: str) -> None:
    """400 intervals over skewed clusters of unequal size; 5 % may miss, 31 is 2.5 sigma above 20."""
    rng = np.random.default_rng(11)
    misses = 0
    for _ in range(400):
        sizes = rng.integers(1, 4, size=40)
        level = rng.gamma(4.0, 1.0, size=40)  # sessions differ: tokens within one are not independent
        values = np.concatenate([m + rng.normal(0, 0.2, n) for m, n in zip(level, sizes, strict=True)])
        clusters = [f"s{i}" for i, n in enumerate(sizes) for _ in range(n)]
        bounds = bootstrap_mean(values, clusters, rng=rng, num_resamples=600)
        misses += bounds.high < 4.0 if side == "high" else bounds.low > 4.0
    assert 5 <= misses <= 31


def test_ignoring_the_clusters_would_miss_far_more_often() -> None:
    rng = np.random.default_rng(12)
    misses = 0
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 20), 10)
        misses += bootstrap_mean(values, [str(i) for i in range(200)], rng=rng, num_resamples=400).high < 0
    assert misses > 40  # 5 % promised: this is what drawing tokens instead of sessions would do


def test_one_cluster_gives_no_interval_and_equal_clusters_a_point() -> None:
    rng = np.random.default_rng(0)
    one = bootstrap_mean([1.0, 2.0], ["a", "a"], rng=rng)
    assert (one.low, one.high) == (-np.inf, np.inf) and one.to_dict()["high"] is None
    same = bootstrap_mean([2.0, 2.0, 2.0], ["a", "b", "c"], rng=rng)
    assert (same.low, same.value, same.high) == (2.0, 2.0, 2.0)


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(UsageError):
        bootstrap_mean([], [], rng=np.random.default_rng(0))
    with pytest.raises(UsageError):
        bootstrap_ratio([1.0], [1.0, 2.0], lambda x: x.mean(axis=-1), rng=np.random.default_rng(0))


def test_the_same_seed_gives_the_same_interval() -> None:
    values, clusters = np.random.default_rng(5).normal(size=50), [str(i % 9) for i in range(50)]
    one, two = (bootstrap_mean(values, clusters, rng=np.random.default_rng(7)) for _ in range(2))
    assert one == two


# verdict


@pytest.mark.parametrize("multiple", [2.0, 4.0])
def test_damage_of_twice_the_margin_never_passes(multiple: float) -> None:
    damage = damage_of_kl(multiple * NEAR.kl)
    verdicts = [verdict_of(damage, seed=100 + s).verdict for s in range(60)]
    assert Verdict.PASS not in verdicts
    assert verdicts.count(Verdict.FAIL) >= 55


def test_damage_far_below_the_margin_passes_and_says_why() -> None:
    passed = 0
    for seed in range(20):
        verdict = verdict_of(damage_of_kl(0.1 * NEAR.kl), seed=seed, num=48)
        passed += verdict.verdict is Verdict.PASS
    assert passed >= 18
    assert verdict.is_proven and "margin" in verdict.reason
    assert {s["value"] for s in verdict.strata} == {"0-255", "easy", "long"}
    assert verdict.worst_request["request_id"].startswith("r")


def test_a_lossy_knob_without_any_effect_is_inert() -> None:
    assert verdict_of(0.0, is_lossy=True).verdict is Verdict.INERT


def test_a_codec_neutral_knob_without_effect_is_lossless() -> None:
    verdict = verdict_of(0.0, is_lossy=False, synthetic=True)
    assert verdict.verdict is Verdict.PASS and verdict.is_lossless and verdict.is_proven


def test_a_decode_replay_that_is_worse_decides() -> None:
    reference, scores, _ = make_case(0.01, seed=2, num_decode=16, num=48)
    _, worse, _ = make_case(0.6, seed=2, num=48)
    good = judge(reference, scores, margin=NEAR, is_lossy=True, rng=np.random.default_rng(0),
                 decode_scores=scores[:16])  # fmt: skip
    bad = judge(reference, scores, margin=NEAR, is_lossy=True, rng=np.random.default_rng(0),
                decode_scores=worse[:16])  # fmt: skip
    assert good.verdict is Verdict.PASS and good.num_decode == 16
    assert bad.verdict is Verdict.FAIL and bad.reason.startswith("decode_")


def test_a_decode_replay_of_few_requests_does_not_blunt_the_verdict() -> None:
    reference, scores, _ = make_case(damage_of_kl(0.3 * NEAR.kl), seed=4, num_decode=16, num=96)
    alone = judge(reference, scores, margin=NEAR, is_lossy=True, rng=np.random.default_rng(0))
    both = judge(reference, scores, margin=NEAR, is_lossy=True, rng=np.random.default_rng(0),
                 decode_scores=scores[:16])  # fmt: skip
    assert alone.verdict is both.verdict is Verdict.PASS
    by_name = {m.name: m.excess for m in both.metrics}
    assert by_name["decode_flips"].high == pytest.approx(by_name["flips"].high, rel=0.02)


def test_no_flip_among_few_tokens_does_not_prove_that_none_happens() -> None:
    verdict = verdict_of(1e-3, num=10, tokens=6)
    flips = next(m for m in verdict.metrics if m.name == "flips")
    assert flips.raw == 0 and flips.excess.high == pytest.approx(3 / 60, rel=0.01)
    assert verdict.verdict is Verdict.UNDECIDED


def test_noise_above_a_third_of_the_margin_is_undecided_not_a_wider_threshold() -> None:
    noisy = damage_of_kl(0.5 * NEAR.kl)
    verdict = verdict_of(noisy, floor=noisy)
    assert verdict.verdict is Verdict.UNDECIDED and "A/A noise" in verdict.reason


def test_plain_harm_fails_even_under_a_noisy_floor() -> None:
    assert verdict_of(damage_of_kl(10 * NEAR.kl), floor=damage_of_kl(0.5 * NEAR.kl)).verdict is Verdict.FAIL


def test_few_sessions_are_undecided_and_say_how_many_more() -> None:
    verdict = verdict_of(0.01, num=5)
    assert verdict.verdict is Verdict.UNDECIDED and "3 more" in verdict.reason


def test_an_interval_across_the_margin_names_the_requests_still_needed() -> None:
    verdicts = [verdict_of(damage_of_kl(0.85 * NEAR.kl), seed=s, num=9, tokens=6) for s in range(8)]
    undecided = [v for v in verdicts if v.verdict is Verdict.UNDECIDED]
    assert undecided and any(m.more_requests for v in undecided for m in v.metrics)


def test_scores_that_are_not_finite_fail_with_the_request_named() -> None:
    reference, scores, _ = make_case(0.01, seed=0)
    scores[3].logprobs[0, 0] = np.nan
    verdict = judge(reference, scores, margin=NEAR, is_lossy=True, rng=np.random.default_rng(0))
    assert verdict.verdict is Verdict.FAIL and "'r3'" in verdict.reason


def test_minus_infinity_where_the_reference_has_mass_fails() -> None:
    reference, scores, _ = make_case(0.01, seed=0)
    scores[2].logprobs[0, int(scores[2].argmax[0])] = -np.inf
    verdict = judge(reference, scores, margin=NEAR, is_lossy=True, rng=np.random.default_rng(0))
    assert verdict.verdict is Verdict.FAIL


def test_a_lossy_pass_on_synthetic_text_is_not_proven() -> None:
    verdict = verdict_of(0.01, synthetic=True)
    assert verdict.verdict is Verdict.PASS and not verdict.is_proven
    assert any("generic" in n for n in verdict.notes) and any("not proven" in n for n in verdict.notes)


def test_wider_margins_admit_more_and_unknown_names_are_refused() -> None:
    near, balanced, aggressive = (MARGINS[n].limits() for n in ("near-lossless", "balanced", "aggressive"))
    assert all(near[m] < balanced[m] < aggressive[m] for m in near)
    with pytest.raises(UsageError, match="near-lossless"):
        margin_named("lossless")


# replay


def test_decode_replay_spreads_over_lengths_and_takes_long_prompts_last() -> None:
    items = [ScoreItem(item_id=str(n), prompt_token_ids=(0,) * n, continuation=(0,)) for n in range(1, 101)]
    chosen = decode_subset(items, count=16, max_length=60, max_tokens=10_000)
    lengths = [len(items[i].prompt_token_ids) for i in chosen]
    assert len(chosen) == 16 and min(lengths) == 1 and max(lengths) == 59
    assert len(decode_subset(items, count=80, max_length=10, max_tokens=10_000)) == 80


@pytest.mark.parametrize("budget", [0, 2, 40, 200, 500])
def test_decode_replay_keeps_its_step_budget(budget: int) -> None:
    items = [ScoreItem(item_id=str(n), prompt_token_ids=(0,) * n, continuation=(0,)) for n in range(1, 101)]
    chosen = decode_subset(items, count=16, max_length=60, max_tokens=budget)
    assert sum(len(items[i].prompt_token_ids) + 1 for i in chosen) <= budget
    assert len(set(chosen)) == len(chosen) and (len(chosen) == 16 if budget >= 200 else len(chosen) < 16)


def test_kept_ids_shrink_as_the_reference_grows() -> None:
    assert affordable_top(10) > 100_000 and affordable_top(10**9) == 64
    assert affordable_top(4096) == 5120


# speed


def report(factor: float, *, seed: int, num: int = 40, errors: int = 0) -> LoadReport:
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    size = shared.lognormal(0, 0.5, num)
    results = [
        LoadResult(
            request_id=str(i), token_ids=(1, 2), num_cached_tokens=0,
            ttft_s=None if i < errors else float(0.1 * factor * size[i] * rng.lognormal(0, 0.05)),
            tpot_s=None if i < errors else float(0.01 * factor * size[i] * rng.lognormal(0, 0.05)),
            e2e_s=1.0, error="died" if i < errors else None,
        )
        for i in range(num)
    ]  # fmt: skip
    return LoadReport(results=results, duration_s=10.0 * factor)


def test_paired_ratios_find_the_planted_slowdown() -> None:
    ratios = compare_speed(
        [report(1.2, seed=1)], [report(1.0, seed=2)], slo=Slo(), rng=np.random.default_rng(0)
    )
    for name in ("tpot_s.mean", "ttft_s.p95"):
        estimate = ratios.ratios[name]
        assert 1.0 < estimate.low < 1.2 < estimate.high
    assert ratios.ratios["goodput"].value == pytest.approx(1 / 1.2)
    assert ratios.exceeds(1.1, bound="low") == "tpot_s.mean"
    assert ratios.exceeds(1.3, bound="high") is None


def test_a_run_against_itself_again_covers_one() -> None:
    ratios = compare_speed(
        [report(1.0, seed=1)], [report(1.0, seed=2)], slo=Slo(), rng=np.random.default_rng(0)
    )
    assert ratios.ratios["tpot_s.mean"].low < 1 < ratios.ratios["tpot_s.mean"].high
    assert ratios.exceeds(1.1, bound="high") is None


def test_failed_requests_lower_goodput_and_are_left_out_of_latencies() -> None:
    ratios = compare_speed(
        [report(1.0, seed=1, errors=10)], [report(1.0, seed=2)], slo=Slo(), rng=np.random.default_rng(0)
    )
    assert ratios.ratios["tpot_s.mean"].n == 30
    assert ratios.ratios["goodput"].value == pytest.approx(0.75)


def test_slo_counts_requests_within_both_targets() -> None:
    slo = Slo(ttft_p95_s=0.1, tpot_p95_s=0.01)
    results = report(1.0, seed=1).results
    assert 0 < sum(slo.is_met(r) for r in results) < len(results)
