"""When a predictor may be used: only while past data say, with a bound, that it beats its baseline.

Testing by betting (Waudby-Smith and Ramdas 2024): against "the predictor is no better" a gambler stakes
a share of his wealth on every observed difference of losses. Under that hypothesis the chance that the
wealth ever reaches 1 / alpha is at most alpha, at whatever moments one looks and however the differences
depend on the past (Ville's inequality), so the gate can be asked after every request. The opposite bet
turns it off again.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from kvtune.errors import UsageError
from kvtune.predict.grid import Floats

__all__ = ["Gate"]

_STAKES: Final[Floats] = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.7])
_RESTART_EVERY: Final = 256
_MAX_STARTS: Final = 32


class _Bets:
    """Wealth against "the mean of what comes is at most 0"; new bets start now and then.

    A bet that began while the hypothesis was true has lost its money and cannot see a later change, so
    every `_RESTART_EVERY` observations a new one starts with 1 / (k (k + 1)) of the whole stake: the sum
    of all wealth still starts at 1, and the bound holds for ever.
    """

    def __init__(self) -> None:
        self._log_wealth: Floats = np.empty((0, len(_STAKES)))
        self._num_starts = 0
        self._until_restart = 0

    def observe(self, gain: float) -> None:
        """One outcome in [-1, 1]."""
        if self._until_restart == 0:
            self._start()
        self._until_restart -= 1
        self._log_wealth += np.log1p(_STAKES * gain)

    def _start(self) -> None:
        self._num_starts += 1
        share = 1.0 / (self._num_starts * (self._num_starts + 1) * len(_STAKES))
        fresh = np.full((1, len(_STAKES)), np.log(share))
        kept = self._log_wealth
        if len(kept) >= _MAX_STARTS:  # giving a bet up only lowers the wealth: the bound still holds
            kept = np.delete(kept, int(np.argmin(kept.max(axis=1))), axis=0)
        self._log_wealth = np.concatenate([kept, fresh])
        self._until_restart = _RESTART_EVERY

    @property
    def log_wealth(self) -> float:
        if not len(self._log_wealth):
            return 0.0
        top = float(self._log_wealth.max())
        return top + float(np.log(np.exp(self._log_wealth - top).sum()))


class Gate:
    """Turns a predictor on once it beats its constant baseline for sure, and off when it no longer does.

    `scale`: a difference of losses of this size counts fully, larger ones no more (bounded bets).
    `alpha_on`: chance that a predictor that is never better is ever turned on; `alpha_off`: chance that one
    that stays better is turned off after it was turned on. `margin`: how much better it must be, in units of
    the loss.
    """

    def __init__(
        self, *, scale: float, margin: float = 0.0, alpha_on: float = 0.01, alpha_off: float = 0.01
    ) -> None:
        for name, value in (("alpha_on", alpha_on), ("alpha_off", alpha_off)):
            if not 0.0 < value < 1.0:
                raise UsageError(f"{name} must lie between 0 and 1, found {value}")
        if not scale > 0.0 or margin < 0.0:
            raise UsageError(f"a gate needs scale > 0 and margin >= 0, found {scale} and {margin}")
        self._scale, self._margin = scale, margin
        self._thresholds = {False: -np.log(alpha_on), True: -np.log(alpha_off)}
        self._bets = _Bets()
        self.is_on = False
        self.num_switches = 0
        self.num_observed = 0
        self._total = 0.0

    def observe(self, baseline_loss: float, predictor_loss: float) -> bool:
        """Take both losses of one outcome; True when the gate is on afterwards."""
        difference = baseline_loss - predictor_loss
        self.num_observed += 1
        self._total += difference
        gain = min(1.0, max(-1.0, (difference - self._margin) / self._scale))
        self._bets.observe(-gain if self.is_on else gain)
        if self._bets.log_wealth >= self._thresholds[self.is_on]:
            self.is_on = not self.is_on
            self.num_switches += 1
            self._bets = _Bets()
        return self.is_on

    @property
    def mean_gain(self) -> float:
        """Mean of baseline loss minus predictor loss over everything observed; 0 before the first."""
        return self._total / self.num_observed if self.num_observed else 0.0
