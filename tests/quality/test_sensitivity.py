"""What one change adds in KL, paired request by request."""

from __future__ import annotations

import numpy as np
import pytest

from kvtune.quality import Reference, divergence, isolated_kl
from kvtune.target import ScoreItem, Scores

VOCABULARY = 32


def scored(logits: np.ndarray, item: str) -> Scores:
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return Scores(
        item_id=item, ids=np.broadcast_to(np.arange(VOCABULARY, dtype=np.int32), logp.shape),
        logprobs=logp.astype(np.float32), token_logprobs=logp[:, 0].astype(np.float32),
        argmax=logp.argmax(axis=1).astype(np.int32), is_full=True,
    )  # fmt: skip


def runs(*spreads: float, seed: int = 0, num_items: int = 24) -> list[tuple[Scores, ...]]:
    """Scores of the same items under added noise of these deviations; answers of unequal length."""
    rng = np.random.default_rng(seed)
    base = [rng.normal(0, 2, (3 + i % 9, VOCABULARY)) for i in range(num_items)]
    return [
        tuple(scored(x + spread * rng.normal(0, 1, x.shape), str(i)) for i, x in enumerate(base))
        for spread in spreads
    ]


def reference_of(scores: tuple[Scores, ...]) -> Reference:
    items = tuple(
        ScoreItem(item_id=s.item_id, prompt_token_ids=(1, 2), continuation=(0,) * len(s.argmax))
        for s in scores
    )
    clusters = tuple(f"session {i // 2}" for i in range(len(items)))
    return Reference(
        items=items, scores=scores, aa_scores=scores, clusters=clusters, strata=({},) * len(items)
    )


def test_it_is_the_difference_of_mean_kl_per_token() -> None:
    exact, before, after = runs(0.0, 0.1, 0.3)
    found = isolated_kl(reference_of(exact), before, after, rng=np.random.default_rng(0))
    means = [
        np.concatenate([divergence(a, b).kl for a, b in zip(exact, run, strict=True)]).mean()
        for run in (before, after)
    ]
    assert found.value == pytest.approx(means[1] - means[0], rel=1e-6)
    assert found.low < found.value < found.high
    assert found.n == 24 and found.num_clusters == 12


def test_no_change_adds_nothing_and_its_reversal_adds_the_opposite() -> None:
    exact, before, after = runs(0.0, 0.1, 0.3)
    reference = reference_of(exact)
    same = isolated_kl(reference, before, before, rng=np.random.default_rng(0))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    forth = isolated_kl(reference, before, after, rng=np.random.default_rng(0))
    back = isolated_kl(reference, after, before, rng=np.random.default_rng(0))
    assert back.value == pytest.approx(-forth.value)


def test_pairing_tells_a_small_addition_to_a_large_damage() -> None:
    """What the rest of the configuration costs cancels: bounds are those of the addition alone."""
    rng = np.random.default_rng(1)
    base = [rng.normal(0, 2, (8, VOCABULARY)) for _ in range(24)]
    harmed = [x + (0.1 + 0.5 * (i % 3)) * rng.normal(0, 1, x.shape) for i, x in enumerate(base)]
    exact, before, after = (
        tuple(scored(x, str(i)) for i, x in enumerate(rows))
        for rows in (base, harmed, [x + 0.05 * rng.normal(0, 1, x.shape) for x in harmed])
    )
    reference = reference_of(exact)
    whole = isolated_kl(reference, exact, after, rng=np.random.default_rng(0))
    added = isolated_kl(reference, before, after, rng=np.random.default_rng(0))
    assert added.high - added.low < (whole.high - whole.low) / 4
