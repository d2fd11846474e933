"""Online survival curves of cached blocks, by class: when does a block that was used now get used again?

Ages fall into half-octave buckets. For each class and bucket two numbers are kept: how many blocks came to
the bucket's lower edge unused (at risk), and how many were used within it. Their ratio is the hazard; blocks
still waiting count as at risk, so nothing is lost to censoring (Kaplan and Meier 1958). A class with few
observations leans on the wider class it belongs to, that one on the next, the widest on a constant.

The score of a block at an age is the best rate of hits for the room it takes, over all horizons:
max_h P(used before h) / E[time in the cache until used or h] (the index of Gittins 1979; the hit density of
LHD, Beckmann et al., NSDI'18, without its horizon). Scores never rise with age: where the curve says
otherwise, a block keeps its low score until it is used.

The constants were chosen on the Mooncake conversation trace (FAST'25). The arithmetic is that of
csrc/survival.h, operation by operation, so that both decide alike to the last bit.
"""

from __future__ import annotations

from bisect import bisect_right
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["CLASS_LEVELS", "NUM_AGES", "NUM_CLASSES", "Survival"]

NUM_AGES: Final = 48
CLASS_LEVELS: Final = (3, 5, 8)
"""What a class is made of, widest split first: the number of levels of each feature."""
NUM_CLASSES: Final = prod(CLASS_LEVELS)

_STRENGTH: Final = 4.0  # observations (releases, not blocks) a wider class is worth
_FIRST_HAZARD: Final = 0.05  # per bucket, before anything was seen
_KEPT: Final = 0.97  # share of the past that each full period leaves
_PERIOD: Final = 5000  # block references between two looks at the data, at most
_LARGEST_HAZARD: Final = 0.999

FloatArray = npt.NDArray[np.float64]


class Survival:
    """Counts what happens to blocks and, from time to time, turns the counts into scores."""

    edges: Final = (0, *((16 if b % 2 else 24) << ((b - 1) // 2) for b in range(1, NUM_AGES)))
    """Lower edge of each age bucket, in block references."""
    _widths: Final[FloatArray] = np.diff(np.asarray(edges, dtype=np.float64))

    def __init__(self) -> None:
        cells = NUM_CLASSES * NUM_AGES
        self._used: FloatArray = np.zeros(cells)
        self._at_risk: FloatArray = np.zeros(cells)
        self._new_used = [0] * cells  # since the last look
        self._new_at_risk = [0] * cells
        self._last = 0
        # All classes alike: the first constant leans on itself.
        first = np.full((1, NUM_AGES), _FIRST_HAZARD)
        self._scores: list[list[float]] = _best_rates(first, self._widths).tolist() * NUM_CLASSES

    def bucket(self, age: int) -> int:
        return bisect_right(self.edges, age) - 1

    def add_used(self, block_class: int, age: int) -> None:
        """A block of the class was used again at this age."""
        self._new_used[block_class * NUM_AGES + self.bucket(age)] += 1

    def add_at_risk(self, block_class: int, bucket: int, num_blocks: int) -> None:
        """So many blocks of the class came to this age bucket unused."""
        self._new_at_risk[block_class * NUM_AGES + bucket] += num_blocks

    def score(self, block_class: int, age: int) -> float:
        """Hits per block and reference that a block of this class and age can still bring, at best."""
        row = self._scores[block_class]
        b = self.bucket(age)
        low = float(self.edges[b])
        if b == NUM_AGES - 1:
            return row[b] * low / age
        f = (age - low) / (self.edges[b + 1] - low)
        return row[b] * (1 - f) + row[b + 1] * f

    def advance(self, clock: int, blocks_per_release: float) -> bool:
        """Look at the data when it is time to: often at first, every 5,000 references in the end.

        `blocks_per_release`: mean number of blocks that were released as one observation. True if scores
        changed.
        """
        wait = max(256, min(_PERIOD, clock // 4))
        if clock - self._last < wait:
            return False
        self._last = clock
        kept = _KEPT if wait == _PERIOD else 1.0
        self._used = self._used * kept + np.asarray(self._new_used, dtype=np.float64)
        self._at_risk = self._at_risk * kept + np.asarray(self._new_at_risk, dtype=np.float64)
        self._new_used = [0] * len(self._new_used)
        self._new_at_risk = [0] * len(self._new_at_risk)
        self._scores = self._rebuilt(blocks_per_release)
        return True

    def _rebuilt(self, blocks_per_release: float) -> list[list[float]]:
        used, at_risk = [self._used.reshape(-1, NUM_AGES)], [self._at_risk.reshape(-1, NUM_AGES)]
        for fan in reversed(CLASS_LEVELS):
            used.insert(0, _merged(used[0], fan))
            at_risk.insert(0, _merged(at_risk[0], fan))
        strength = _STRENGTH * blocks_per_release
        hazard: FloatArray = np.full((1, NUM_AGES), _FIRST_HAZARD)
        for fan, level_used, level_at_risk in zip((1, *CLASS_LEVELS), used, at_risk, strict=True):
            wider = np.repeat(hazard, fan, axis=0)
            hazard = (level_used + wider * strength) / (level_at_risk + strength)
        return _best_rates(np.minimum(hazard, _LARGEST_HAZARD), self._widths).tolist()


def _merged(fine: FloatArray, fan: int) -> FloatArray:
    """Sums of `fan` neighbouring rows, added one after the other."""
    groups = fine.reshape(-1, fan, NUM_AGES)
    sums: FloatArray = np.zeros((len(groups), NUM_AGES))
    for j in range(fan):
        sums = sums + groups[:, j]
    return sums


def _best_rates(hazard: FloatArray, widths: FloatArray) -> FloatArray:
    """[classes, ages] scores. The last bucket has no upper edge: it continues the one before."""
    starts = NUM_AGES - 1
    alive: FloatArray = np.ones((len(hazard), starts))
    cost: FloatArray = np.zeros((len(hazard), starts))
    best: FloatArray = np.zeros((len(hazard), starts))
    for step in range(starts):  # of all starts at once, the horizon moves on by one bucket
        p = hazard[:, step:starts]
        n = starts - step
        cost[:, :n] += alive[:, :n] * (1 - p / 2) * widths[step:]
        alive[:, :n] *= 1 - p
        best[:, :n] = np.maximum(best[:, :n], (1 - alive[:, :n]) / cost[:, :n])
    scores = np.minimum.accumulate(best, axis=1)
    return np.concatenate([scores, scores[:, -1:]], axis=1)
