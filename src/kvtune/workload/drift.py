"""Whether a workload still looks like the one a recipe was proven on.

A quantity has drifted when its change is both larger than what matters (its tolerance) and clear of the
noise of both samples. All comparisons together share one chance of a false alarm, so a fresh draw of the
same traffic is called drifted less than once in a hundred times. Where too few requests are given to see
prompts double, the answer is "unclear", never "same".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from kvtune.errors import InputFileError
from kvtune.workload.profile import (
    MAX_NAME,
    MAX_VALUES,
    IntArray,
    Lengths,
    Observed,
    clustered_mean,
    observe,
)
from kvtune.workload.request import Workload

__all__ = ["Shift", "workload_drift"]

FALSE_ALARMS: Final = 0.002
"""Nominal, of all comparisons together; lengths have heavy tails, so count on one in a hundred."""
LENGTH_TOLERANCE: Final = math.log(1.3)
RATE_TOLERANCE: Final = math.log(1.5)
SHARING_TOLERANCE: Final = 0.10
SHARE_TOLERANCE: Final = 0.15
NEW_TOLERANCE: Final = 0.05
"""Of requests of a kind that was not there at all when the recipe was proven."""
BEYOND_TOLERANCE: Final = 0.02
"""Of requests longer than the longest of the proven workload."""
DOUBLING: Final = math.log(2)
"""A comparison that would not see lengths double says nothing about lengths."""
_MAX_NUMBER: Final = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """One quantity, then and now. `verdict`: same | drifted | unclear (too few requests) | unseen (not told).

    `change` is drift beyond both `tolerance` and `noise`, the largest change that two draws of the same
    traffic may show. Logarithms of a ratio for lengths and rates, shares of 1 otherwise; None where not
    comparable. `is_speed`: it bears on latency alone, not on answers.
    """

    name: str
    proven: str
    found: str
    verdict: str
    why: str = ""
    change: float | None = None
    noise: float | None = None
    tolerance: float | None = None
    is_speed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def workload_drift(profile: Mapping[str, Any], workload: Workload) -> tuple[Shift, ...]:
    """Compare a recorded `workload_profile` with a workload, quantity by quantity.

    Raises InputFileError where the profile, which comes from a file, is not one.
    """
    seen, proven = observe(workload), _Record(profile, "workload.profile")
    if proven.number("version") != 1:
        raise InputFileError("the recipe's workload profile is of another kvtune; run `kvtune tune` again")
    rule = _Rule(FALSE_ALARMS / _num_comparisons(proven), int(proven.number("num_sessions")))
    return (
        *_compare_lengths("prompt length", proven.record("prompt"), seen.prompt, seen, rule),
        *_compare_lengths("answer length", proven.record("answer"), seen.answer, seen, rule),
        _compare_sharing(proven.record("sharing"), seen, rule),
        _compare_rates(proven.record("arrivals"), seen, rule),
        *_compare_strata(proven.record("strata"), seen, rule),
    )


@dataclass(frozen=True, slots=True)
class _Rule:
    """`level`: chance of a false alarm of one comparison; `num_sessions` of the proven workload."""

    level: float
    num_sessions: int

    def noise(self, then: float | None, now: float | None, count: int) -> float | None:
        """Largest change of the same traffic, given the standard errors of both sides and the number of
        sessions (or stretches) behind the smaller; None where an error is unknown."""
        count = min(count, self.num_sessions)
        if then is None or now is None or count < 2:
            return None
        return _student_quantile(1 - self.level / 2, count - 1) * math.hypot(then, now)

    def could_be(self, change: float, noise: float | None, size: float, count: int) -> bool:
        """Whether a true change of `size` is not excluded with 99 % confidence."""
        count = min(count, self.num_sessions)
        if noise is None or count < 2:
            return True
        error = noise / _student_quantile(1 - self.level / 2, count - 1)
        return abs(change) + _student_quantile(0.99, count - 1) * error >= size


class _Record:
    """Typed reading of an object from a file: whatever is in it, a clear refusal or a finite number."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise InputFileError(f"the recipe's {where} must be an object; run `kvtune tune` again")
        self.data = cast("Mapping[str, Any]", data)
        self.where = where

    def record(self, name: str) -> _Record | None:
        value = self.data.get(name)
        return None if value is None else _Record(value, f"{self.where}.{name[:MAX_NAME]}")

    def number(self, name: str) -> float:
        return self._finite(self.data.get(name), name)

    def error(self, name: str) -> float | None:
        """A standard error; None where the sample was too small for one."""
        value = self.data.get(name)
        return None if value is None else abs(self._finite(value, name))

    def numbers(self, name: str) -> list[float]:
        values = self.data.get(name)
        if not isinstance(values, list) or not 0 < len(cast("list[Any]", values)) <= 100:
            raise InputFileError(f"the recipe's {self.where}.{name} must be a list of numbers")
        return [self._finite(v, name) for v in cast("list[Any]", values)]

    def errors(self, name: str) -> list[float | None]:
        values = self.data.get(name)
        if not isinstance(values, list):
            raise InputFileError(f"the recipe's {self.where}.{name} must be a list of numbers")
        return [_Record({name: v}, self.where).error(name) for v in cast("list[Any]", values)]

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str) or len(value) > MAX_NAME:
            raise InputFileError(f"the recipe's {self.where}.{name} must be a short text")
        return value

    def _finite(self, value: object, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _MAX_NUMBER:
            raise InputFileError(f"the recipe's {self.where}.{name} must be a finite number")
        return float(value)


def _num_comparisons(proven: _Record) -> int:
    strata = proven.record("strata")
    values = 0 if strata is None else sum(len(_values(strata, name)) for name in strata.data)
    return 2 * 11 + 2 + values


# -- lengths --


def _compare_lengths(
    name: str, then: _Record | None, now: Lengths | None, seen: Observed, rule: _Rule
) -> tuple[Shift, ...]:
    if then is None:
        return (
            _unseen(name, "not recorded", "" if now is None else now.unit, "not told when it was proven"),
        )
    if now is None or then.text("unit") != now.unit:
        found = "not told" if now is None else f"counted in {now.unit}"
        why = f"proven in {then.text('unit')}, so nothing can be compared"
        return (_unseen(name, then.text("unit"), found, why),)
    known = np.isfinite(now.values)
    values, clusters = now.values[known], seen.clusters[known]
    mean, error = clustered_mean(np.log(values), clusters)
    count = len(np.unique(clusters))
    noise = rule.noise(then.error("error"), error, count)
    change = mean - then.number("mean_log")
    verdict = _verdict(change, noise, LENGTH_TOLERANCE)
    if verdict != "drifted" and rule.could_be(change, noise, DOUBLING, count):
        verdict = "unclear"
    shift = Shift(
        name=name, proven=_typical(then.number("mean_log"), now.unit), found=_typical(mean, now.unit),
        verdict=verdict, why=_ratio_why(change, noise), change=change, noise=noise,
        tolerance=LENGTH_TOLERANCE,
    )  # fmt: skip
    return shift, _compare_shape(f"{name}s", then, values, clusters, rule)


def _typical(mean_log: float, unit: str) -> str:
    """Geometric mean, in words."""
    return f"about {math.exp(min(mean_log, 40.0)):,.0f} {unit}"


def _ratio_why(change: float, noise: float | None) -> str:
    if noise is None:
        return "fewer than 8 sessions on a side cannot tell"
    return f"{math.exp(change):.2f}x; noise allows {math.exp(-noise):.2f}x to {math.exp(noise):.2f}x"


def _compare_shape(
    name: str, then: _Record, values: npt.NDArray[np.float64], clusters: IntArray, rule: _Rule
) -> Shift:
    """Shares of requests up to each decile of the proven lengths, and beyond the longest of them."""
    edges, shares, errors = then.numbers("deciles"), then.numbers("shares"), then.errors("share_errors")
    if not len(edges) == len(shares) == len(errors):
        raise InputFileError(f"the recipe's {then.where} must hold as many shares as deciles")
    rows = [
        (edge, _Share(share, error, SHARE_TOLERANCE))
        for edge, share, error in zip(edges, shares, errors, strict=True)
    ]
    rows.append((then.number("longest"), _Share(1.0, 0.0, BEYOND_TOLERANCE)))
    found = [(edge, share.against(values <= edge, clusters, rule)) for edge, share in rows]
    edge, worst = max(found, key=lambda row: row[1].severity)
    share = worst.then.share
    return worst.shift(name, f"{share:.0%} up to {edge:,.0f}", f"{share + worst.change:.0%}")


@dataclass(frozen=True, slots=True)
class _Share:
    """A recorded share with its standard error, and the change of it that matters."""

    share: float
    error: float | None
    tolerance: float

    def against(self, is_it: npt.NDArray[np.bool_], clusters: IntArray, rule: _Rule) -> _ShareFound:
        now, now_error = clustered_mean(is_it.astype(np.float64), clusters)
        noise = rule.noise(self.error, now_error, len(np.unique(clusters)))
        change = now - self.share
        return _ShareFound(change, noise, _verdict(change, noise, self.tolerance), self)


@dataclass(frozen=True, slots=True)
class _ShareFound:
    change: float
    noise: float | None
    verdict: str
    then: _Share

    @property
    def severity(self) -> float:
        """Above 1 where it has drifted."""
        return abs(self.change) / max(self.then.tolerance, self.noise or 0.0)

    def shift(self, name: str, proven: str, found: str) -> Shift:
        why = "too few sessions" if self.noise is None else f"noise allows {100 * self.noise:.0f} points"
        return Shift(
            name=name, proven=proven, found=found, verdict=self.verdict, why=why, change=self.change,
            noise=self.noise, tolerance=self.then.tolerance,
        )  # fmt: skip


# -- prefixes and arrivals --


def _compare_sharing(then: _Record | None, seen: Observed, rule: _Rule) -> Shift:
    name = "prefix sharing"
    if then is None:
        return _unseen(name, "not recorded", "", "the proven workload held too few requests, or lengths only")
    now = None if seen.sharing is None else _Record(seen.sharing, "sharing")
    windows = then.record("windows")
    if now is None or windows is None:
        return _unseen(name, "recorded", "not told", "128 requests with content are needed")
    if then.number("block_size") != now.number("block_size"):
        return _unseen(name, "recorded", "other block size", "hit rates of unlike blocks say nothing")
    common = [size for size in now.data["windows"] if size in windows.data]
    if not common:
        raise InputFileError(f"the recipe's {windows.where} must hold windows of 16 requests")
    size = max(common, key=int)
    old, new = (
        cast(_Record, windows.record(size)),
        cast(_Record, cast(_Record, now.record("windows")).record(size)),
    )
    errors = [r.number("sd") / math.sqrt(max(1.0, r.number("n"))) for r in (old, new)]
    noise = rule.noise(errors[0], errors[1], int(min(old.number("n"), new.number("n"))))
    change = new.number("mean") - old.number("mean")
    return Shift(
        name=name, proven=f"{old.number('mean'):.0%} of tokens", found=f"{new.number('mean'):.0%}",
        verdict=_verdict(change, noise, SHARING_TOLERANCE),
        why=f"hits of an empty cache within {size} requests; noise allows {100 * (noise or 0.0):.0f} points",
        change=change, noise=noise, tolerance=SHARING_TOLERANCE,
    )  # fmt: skip


def _compare_rates(then: _Record | None, seen: Observed, rule: _Rule) -> Shift:
    name = "arrival rate"
    if then is None or seen.arrivals is None:
        told = (
            "not recorded" if then is None else "recorded",
            "not told" if seen.arrivals is None else "told",
        )
        return _unseen(name, *told, "arrival times of 65 requests are needed", is_speed=True)
    now = _Record(seen.arrivals, "arrivals")
    change = now.number("log_rate") - then.number("log_rate")
    noise = rule.noise(then.error("error"), now.error("error"), int(min(then.number("n"), now.number("n"))))
    return Shift(
        name=name, proven=_rate(then), found=_rate(now), verdict=_verdict(change, noise, RATE_TOLERANCE),
        why=_ratio_why(change, noise), change=change, noise=noise, tolerance=RATE_TOLERANCE, is_speed=True,
    )  # fmt: skip


def _rate(record: _Record) -> str:
    return f"{math.exp(max(-40.0, min(40.0, record.number('log_rate')))):.3g} per second"


# -- strata --


def _values(strata: _Record, name: str) -> Mapping[str, Any]:
    found = strata.record(name)
    if found is None or len(found.data) > MAX_VALUES + 1:
        raise InputFileError(f"the recipe's {strata.where} must hold at most {MAX_VALUES + 1} values each")
    return found.data


def _compare_strata(then: _Record | None, seen: Observed, rule: _Rule) -> list[Shift]:
    if then is None:
        return [_unseen("kinds of request", "not recorded", "", "run `kvtune tune` again to record them")]
    shifts: list[Shift] = []
    for name in sorted(then.data):
        known = _values(then, name)
        if name in seen.labels:
            shifts.append(
                _compare_stratum(name[:MAX_NAME], cast(_Record, then.record(name)), known, seen, rule)
            )
        else:
            shifts.append(
                _unseen(name[:MAX_NAME], f"{len(known)} values", "not tagged", "no request is tagged")
            )
    return shifts


def _compare_stratum(
    name: str, then: _Record, known: Mapping[str, Any], seen: Observed, rule: _Rule
) -> Shift:
    """The value whose share changed most; a value never seen before is named as such."""
    labels = np.array(_folded(seen.labels[name], known))
    rows: list[tuple[str, _ShareFound]] = []
    for value in sorted({*known, *labels.tolist()}):
        record = then.record(value)
        share = _Share(0.0, 0.0, NEW_TOLERANCE)
        if record is not None:
            share = _Share(record.number("share"), record.error("error"), SHARE_TOLERANCE)
        rows.append((value, share.against(labels == value, seen.clusters, rule)))
    value, worst = max(rows, key=lambda row: row[1].severity)
    share = worst.then.share
    return worst.shift(name, f"{share:.0%} {value[:MAX_NAME]}", f"{share + worst.change:.0%}")


def _folded(labels: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Values as the profile counted them: rare ones were `other` there, and unknown ones are then, too."""
    return [v if v in known or "other" not in known else "other" for v in labels]


# -- the rule --


def _unseen(name: str, proven: str, found: str, why: str, *, is_speed: bool = False) -> Shift:
    return Shift(name=name, proven=proven, found=found, verdict="unseen", why=why, is_speed=is_speed)


def _student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); within 5 % for
    p up to 0.9999 and 7 degrees of freedom."""
    z, n = NormalDist().inv_cdf(p), freedom
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return sum(terms)


def _verdict(change: float, noise: float | None, tolerance: float) -> str:
    """`unseen` where the samples allow no error bar: other quantities then say that too little was given."""
    if noise is None:
        return "unseen"
    return "drifted" if abs(change) > max(tolerance, noise) else "same"
