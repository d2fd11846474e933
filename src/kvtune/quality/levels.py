"""Who may be wrong how often: error shared out over several candidates and over several looks.

- Candidates: weighted Holm (Holm 1979, section 4; as a graph: Bretz et al. 2009). Candidates come best first
  and the first that stands ends the run, so the second has half of the first's share of the error, and so on.
  A candidate that passes the gate and falls for its speed gives its share to those after it.
- Looks: alpha spending with fixed increments, added up (a union bound, valid however the looks depend on each
  other). Most is kept for the whole sample; a look may stop for harm, and for harmlessness only where enough
  sessions were seen for a bound to hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvtune.errors import UsageError
from kvtune.quality.bootstrap import CONFIDENCE

__all__ = ["LOOKS", "MIN_FAIL_CLUSTERS", "MIN_PASS_CLUSTERS", "Look", "SharedError", "is_decided", "looks_of"]

ERROR = 1 - CONFIDENCE
LOOKS = ((0.25, 0.1), (0.5, 0.3), (1.0, 0.6))
"""(share of the sample, share of the error spent there)."""
MIN_FAIL_CLUSTERS, MIN_PASS_CLUSTERS = 24, 96
"""Sessions below which a look does not stop for harm or for harmlessness: KL per session is skewed, and
upper bounds of few sessions miss more often than they promise."""
MIN_WEIGHT = 1 / 8
"""Of the first candidate's share: a later one would have none worth testing at."""


@dataclass(frozen=True, slots=True)
class Look:
    """Judge after `num_items` items, with one-sided bounds of `confidence` each."""

    num_items: int
    confidence: float
    is_last: bool


def is_decided(look: Look, *, is_pass: bool, is_fail: bool, num_clusters: int) -> bool:
    """Whether to stop at this look."""
    return look.is_last or is_fail or (is_pass and num_clusters >= MIN_PASS_CLUSTERS)


def looks_of(num_items: int, *, error: float = ERROR) -> tuple[Look, ...]:
    """The looks at a sample; where even the first would be too small to stop anything, only the last."""
    counts = [math.ceil(share * num_items) for share, _ in LOOKS]
    if counts[0] < MIN_FAIL_CLUSTERS:
        return (Look(num_items, 1 - error, True),)
    last = len(LOOKS) - 1
    return tuple(
        Look(count, 1 - error * spent, i == last)
        for i, (count, (_, spent)) in enumerate(zip(counts, LOOKS, strict=True))
    )


class SharedError:
    """The error of `num` candidates tested one after the other, best first."""

    def __init__(self, num: int, *, error: float = ERROR) -> None:
        if num < 1:
            raise UsageError(f"at least one candidate shares the error, found {num}")
        self._error = error
        self._weights = [max(2.0**-i, MIN_WEIGHT) for i in range(num)]
        self._passed: set[int] = set()

    def level(self, index: int) -> float:
        """Error that candidate `index` may be tested at now."""
        left = sum(w for i, w in enumerate(self._weights) if i not in self._passed)
        return self._error * self._weights[index] / left

    def passed(self, index: int) -> None:
        """The candidate was found harmless: its share goes to the others."""
        self._passed.add(index)
