"""What one layer and side loses alone: KL that one change adds, on paired replays of the same requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtune.quality.bootstrap import Estimate, bootstrap_mean
from kvtune.quality.coverage import item_means, num_tokens
from kvtune.quality.divergence import divergence
from kvtune.quality.replay import Reference
from kvtune.target import Scores

__all__ = ["isolated_kl"]


def isolated_kl(
    reference: Reference, before: Sequence[Scores], after: Sequence[Scores], *, rng: np.random.Generator
) -> Estimate:
    """Mean KL to the reference [nats per token] that `after` has more than `before`, sessions drawn whole.

    Both were scored on the reference's items; `before` is the configuration without the change, so that what
    the rest of it costs cancels request by request. Below zero where the change does good, or by noise.
    """
    changed = [divergence(a, b) for a, b in zip(reference.scores, after, strict=True)]
    unchanged = [divergence(a, b) for a, b in zip(reference.scores, before, strict=True)]
    added = item_means(changed, "kl") - item_means(unchanged, "kl")
    return bootstrap_mean(added, reference.clusters, rng=rng, weights=num_tokens(changed))
