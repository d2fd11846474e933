"""One trial as plain data, and which of two trials is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

__all__ = ["TIE", "Objective", "Status", "Trial"]

TIE = 1e-3
"""Bytes per token closer than this count as equal; then goodput decides."""
GOODPUT_TIE = 0.03
"""Run to run, goodput moves by some per cent; less than this breaks no tie."""


class Status(StrEnum):
    COMPLETE = "complete"
    """Feasible: passed the gate and the speed limit on the SEARCH half."""
    INFEASIBLE = "infeasible"
    PRUNED = "pruned"
    """Not measured: it could not beat the best so far."""
    FAILED = "failed"
    """The engine crashed or answered nonsense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Plain JSON values only. `metrics`: kv_bytes_per_token and absolute figures of the longest load run;
    `ratios`: against the baseline, with bounds; `quality`: the gate's verdict on the SEARCH half."""

    number: int
    config: Mapping[str, Any]
    status: Status
    reason: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ratios: Mapping[str, Any] = field(default_factory=dict[str, Any])
    quality: Mapping[str, Any] | None = None
    effective: Mapping[str, Any] = field(default_factory=dict[str, Any])
    elapsed_s: float = 0.0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "status": self.status.value, "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {**data, "status": Status(data["status"]), "notes": tuple(data["notes"])}
        return cls(**fields)

    @property
    def bytes_per_token(self) -> float | None:
        value = self.metrics.get("kv_bytes_per_token")
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class Objective:
    """Without an SLO: fewest bytes per token. With one: most requests within it, then fewest bytes.

    Ties go to the surely higher goodput, else to the configuration that changes fewer knobs: a tie broken
    by noise would only move users away from what they know. `noise`: factor between two runs of the baseline;
    trials ran one after the other, so a smaller difference in goodput says nothing.
    """

    has_slo: bool
    noise: float = 1.0

    def value(self, trial: Trial) -> float:
        """Lower is better."""
        if self.has_slo:
            return -float(trial.metrics.get("num_slo_met") or 0)
        return float("inf") if trial.bytes_per_token is None else trial.bytes_per_token

    def is_better(self, one: Trial, other: Trial) -> bool:
        a, b = self.value(one), self.value(other)
        if not _is_tie(a, b):
            return a < b
        a, b = one.bytes_per_token or float("inf"), other.bytes_per_token or float("inf")
        if not _is_tie(a, b):
            return a < b
        for mine, theirs, wins in ((one, other, True), (other, one, False)):
            low, value = _goodput(mine, "low"), _goodput(theirs, "value")
            if low is not None and value is not None and low > value * max(1 + GOODPUT_TIE, self.noise):
                return wins
        return int(one.metrics.get("num_changed", 0)) < int(other.metrics.get("num_changed", 0))

    def can_beat(self, bytes_per_token: float, best: Trial | None) -> bool:
        """Whether a configuration of this size could still win; only size is known in advance."""
        if best is None or self.has_slo:
            return True
        return bytes_per_token <= self.value(best) * (1 + TIE)


def _is_tie(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= TIE * abs(b)


def _goodput(trial: Trial, bound: str) -> float | None:
    found = trial.ratios.get("goodput", {}).get(bound)
    return None if found is None else float(found)
