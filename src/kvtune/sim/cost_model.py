"""How long a step takes: fitted to measured steps of the real engine, or a roofline where nobody measured.

Time is a sum of what a step does, with coefficients >= 0 (idea of Vidur's and AIConfigurator's per-operator
models, with one engine's steps in place of an operator database)::

    seconds = fixed + matmul(rows) + per sequence + per sampled token
              + bytes of KV decodes read + bytes prefill reads + query-key pairs of prefill
              + distinct bytes of KV (a shared prefix is fetched from memory once)
              + requests admitted + tokens of theirs + what a prefill leaves to the steps after it

`matmul` is a monotone piecewise-linear curve over the rows of the step: weights are read once however few
rows there are, tiles fill at some widths and not at others, and no straight line fits that. Taking in a
request between steps (copying and checking its prompt) costs time too, and is fitted apart.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from kvtune.errors import InputFileError, UsageError
from kvtune.sched.shape import CALIBRATION_VERSION, SHAPE_COLUMNS, ShapeRows
from kvtune.sim.nnls import nonnegative_least_squares

__all__ = [
    "CostModel",
    "FitError",
    "FittedCost",
    "RooflineCost",
    "load_calibration",
    "median_by_shape",
    "shape_cells",
]

Floats = npt.NDArray[np.float64]
ROW_KNOTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_MIN_SAMPLES = 24
_HOLD_OUT = 4
"""Every so many shapes, one is kept out of the fit and predicted."""
_NUM_REWEIGHTINGS = 12
_LEAST_S = 1e-9
_STALL = 3.0
"""A step beyond so many times its prediction counts as that much: the machine stood still, not the engine."""
MAX_CALIBRATION_BYTES = 64 << 20


class CostModel(Protocol):
    """How long a server's work takes, in seconds, each step above zero."""

    @property
    def source(self) -> str:
        """`fitted`, `roofline`, or what a test injects."""
        ...

    def seconds(self, shapes: ShapeRows) -> Floats:
        """Of steps: shapes [n, len(SHAPE_COLUMNS)] -> [n]."""
        ...

    def step_s(self, row: list[float]) -> float:
        """Of one step: the same as `seconds` of one row, to rounding."""
        ...

    def submission_s(self, num_prompt_tokens: int) -> float:
        """Of taking in one request, between steps."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Where the numbers come from and how well they fit: goes into every report."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """Relative error of predicted step times, as a share: mean and 95th percentile of |error|, mean error.

    `num_shapes` distinct batch shapes, none of which the fit has seen.
    """

    mean_absolute: float
    p95_absolute: float
    bias: float
    num_shapes: int

    @classmethod
    def of(cls, predicted: Floats, measured: Floats) -> Self:
        error = (predicted - measured) / measured
        return cls(
            mean_absolute=float(np.abs(error).mean()),
            p95_absolute=float(np.quantile(np.abs(error), 0.95)),
            bias=float(error.mean()),
            num_shapes=len(error),
        )

    def to_dict(self) -> dict[str, float | int]:
        return {
            "mean_absolute": self.mean_absolute,
            "p95_absolute": self.p95_absolute,
            "bias": self.bias,
            "num_shapes": self.num_shapes,
        }


@dataclass(frozen=True, kw_only=True)
class FittedCost:
    """Coefficients fitted to measured steps. `facts` say what was measured: model, codecs, hardware."""

    knots: Floats
    coefficients: Floats
    submission: tuple[float, float] = (0.0, 0.0)
    """Seconds per request taken in, and per prompt token of it."""
    error: FitError | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_steps: int = 0
    level: float = 1.0
    """What the medians were scaled by, so that the sum over all measured steps agrees."""
    source: str = "fitted"

    @classmethod
    def fit(
        cls,
        shapes: ShapeRows,
        seconds: Floats,
        *,
        submissions: Floats | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Self:
        """From measured steps: shapes [n, columns], seconds [n]; submissions [m, 2]: prompt tokens, seconds.

        Equal shapes (context rounded to a sixteenth of its size) are one: their median counts. Every
        fourth batch composition (decodes, prefill chunks, prefill tokens) is held out and the error stated
        on those; the coefficients handed out are then fitted to all. Latencies are sums of steps, and what
        disturbs a step only ever makes it longer: the curve is raised until the measured total is met.
        UsageError where there are too few shapes.
        """
        grid, medians = median_by_shape(shapes, seconds)
        if len(grid) < _MIN_SAMPLES:
            raise UsageError(
                f"a cost model needs at least {_MIN_SAMPLES} distinct batch shapes, found {len(grid)}; "
                "calibrate with more time"
            )
        held = _held_out(grid)
        trained = cls._of(grid[~held], medians[~held])
        error = FitError.of(trained.seconds(grid[held]), medians[held])
        model = cls._of(grid, medians)
        predicted = model.seconds(shapes)
        level = float(np.minimum(seconds, _STALL * predicted).sum() / predicted.sum())
        return replace(
            model,
            coefficients=model.coefficients * level,
            submission=_line(submissions),
            error=error,
            facts=dict(facts or {}),
            num_steps=len(shapes),
            level=level,
        )

    @classmethod
    def _of(cls, shapes: ShapeRows, seconds: Floats) -> Self:
        knots = _knots(shapes)
        coefficients = _fit(_features(shapes, knots), seconds)
        # beyond the last knot the curve goes on as it rose over all of it
        coefficients[len(knots)] = coefficients[1 : len(knots)].sum() / knots[-1]
        return cls(knots=knots, coefficients=coefficients)

    def seconds(self, shapes: ShapeRows) -> Floats:
        return np.maximum(_features(shapes, self.knots) @ self.coefficients, _LEAST_S)

    def step_s(self, row: list[float]) -> float:
        fixed, curve, beyond, prefill, rest = self._parts
        rows = row[0] + row[2]
        total = fixed + prefill * row[1] + rest[-1] * (row[0] + row[1])
        for value, coefficient in zip(row[3:], rest, strict=False):
            total += value * coefficient
        knots, heights = curve
        if rows >= knots[-1]:
            total += heights[-1] + beyond * (rows - knots[-1])
        else:
            i = bisect.bisect_right(knots, rows)
            share = (rows - knots[i - 1]) / (knots[i] - knots[i - 1])
            total += heights[i - 1] + share * (heights[i] - heights[i - 1])
        return max(total, _LEAST_S)

    @functools.cached_property
    def _parts(self) -> tuple[float, tuple[list[float], list[float]], float, float, list[float]]:
        """The coefficients as numbers: fixed, curve over rows, its slope beyond, per prefill, the rest."""
        c, n = self.coefficients.tolist(), len(self.knots)
        heights = [0.0, *np.cumsum(self.coefficients[1:n]).tolist()]
        return c[0], (self.knots.tolist(), heights), c[n], c[n + 1], c[n + 2 :]

    def submission_s(self, num_prompt_tokens: int) -> float:
        return self.submission[0] + self.submission[1] * num_prompt_tokens

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "fit_error": None if self.error is None else self.error.to_dict(),
            "mean_error_on_unseen_shapes": None if self.error is None else self.error.mean_absolute,
            "num_measured_steps": self.num_steps,
            "level": self.level,
            "submission_s": {"per_request": self.submission[0], "per_prompt_token": self.submission[1]},
            "calibrated_on": dict(self.facts),
            "coefficients": dict(zip(_feature_names(self.knots), map(float, self.coefficients), strict=True)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCost:
    """A prior from data sheets: bytes over bandwidth, operations over peak, whichever binds (Williams 2009).

    bandwidth [bytes/s], flops [1/s], `weights_bytes` read in every step, `num_parameters` multiplied in it,
    `pair_flops`: operations per query-key pair and layer (4 x query heads x head dim). `efficiency` is the
    share of both peaks that is reached, `overhead_s` what a step costs besides.
    """

    bandwidth: float
    flops: float
    weights_bytes: float
    num_parameters: float
    pair_flops: float
    efficiency: float = 0.6
    overhead_s: float = 0.5e-3
    hardware: str = ""
    source: str = "roofline"

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "weights_bytes", "num_parameters", "efficiency"):
            if not getattr(self, name) > 0:
                raise UsageError(f"roofline: {name} must be above zero, found {getattr(self, name)}")

    def seconds(self, shapes: ShapeRows) -> Floats:
        decodes, _, prefill_tokens, _, decode_bytes, prefill_bytes, pairs = shapes.T[:7]
        bandwidth, flops = self.bandwidth * self.efficiency, self.flops * self.efficiency
        rows = decodes + prefill_tokens
        linear = np.maximum(self.weights_bytes / bandwidth, 2 * self.num_parameters * rows / flops)
        prefill = np.maximum(prefill_bytes / bandwidth, self.pair_flops * pairs / flops)
        return self.overhead_s + linear + decode_bytes / bandwidth + prefill

    def step_s(self, row: list[float]) -> float:
        return float(self.seconds(np.array([row]))[0])

    def submission_s(self, num_prompt_tokens: int) -> float:
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "fit_error": None,
            "hardware": self.hardware,
            "bandwidth_bytes_per_s": self.bandwidth,
            "flops_per_s": self.flops,
            "efficiency": self.efficiency,
            "overhead_s": self.overhead_s,
            "weights_bytes": self.weights_bytes,
            "note": "not measured: peaks of the data sheet times an assumed efficiency",
        }


def load_calibration(path: Path) -> FittedCost:
    """The cost model of a calibration file. InputFileError where it is none, or damaged."""
    try:
        if path.stat().st_size > MAX_CALIBRATION_BYTES:
            raise InputFileError(
                f"{path}: larger than {MAX_CALIBRATION_BYTES >> 20} MiB: no calibration file"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{path}: {error.strerror or error}; make one with --calibrate") from None
    except (ValueError, RecursionError):
        raise InputFileError(f"{path}: not JSON; make a calibration file with --calibrate") from None
    try:
        version, columns = data["calibration_version"], tuple(data["columns"])
        shapes, seconds = np.array(data["shapes"], float), np.array(data["seconds"], float)
        submissions = np.array(data["submissions"], float).reshape(-1, 2)
        facts = dict(data["facts"])
    except (KeyError, TypeError, ValueError):
        raise InputFileError(f"{path}: not a calibration file of kvtune; make one with --calibrate") from None
    if version != CALIBRATION_VERSION or columns != SHAPE_COLUMNS:
        raise InputFileError(
            f"{path}: calibration version {version!r}, this kvtune reads {CALIBRATION_VERSION}"
        )
    if shapes.ndim != 2 or shapes.shape[1] != len(SHAPE_COLUMNS) or seconds.shape != (len(shapes),):
        raise InputFileError(f"{path}: {seconds.size} times do not belong to shapes {list(shapes.shape)}")
    figures = (shapes, seconds, submissions)
    if not all(np.isfinite(f).all() and (f >= 0).all() for f in figures) or not (seconds > 0).all():
        raise InputFileError(f"{path}: holds a negative or infinite figure; calibrate again")
    return FittedCost.fit(shapes, seconds, submissions=submissions, facts=facts)


# --- features


def _knots(shapes: ShapeRows) -> Floats:
    """Row counts between which time is linear: powers of two that measurements lie around."""
    rows = np.unique(shapes[:, 0] + shapes[:, 2])
    last = float(rows.max())
    inner = [
        k for low, k in zip((0, *ROW_KNOTS), ROW_KNOTS, strict=False) if ((rows > low) & (rows <= k)).any()
    ]
    return np.array([0.0, *[float(k) for k in inner if 0 < k < last], last])


def _feature_names(knots: Floats) -> list[str]:
    ramps = [f"rows_{a:.0f}_to_{b:.0f}" for a, b in itertools.pairwise(knots)]
    return ["fixed", *ramps, "rows_beyond", "num_prefills", *SHAPE_COLUMNS[3:], "num_sequences"]


def _features(shapes: ShapeRows, knots: Floats) -> Floats:
    """[n, features]. Ramps rise from 0 to 1 between two knots: their coefficients are the curve's rises."""
    decodes, prefills, prefill_tokens = shapes[:, 0], shapes[:, 1], shapes[:, 2]
    rows = decodes + prefill_tokens
    ramps = np.clip((rows[:, None] - knots[:-1]) / np.diff(knots), 0.0, 1.0)
    beyond = np.maximum(rows - knots[-1], 0.0)
    columns = (np.ones(len(shapes)), *ramps.T, beyond, prefills, *shapes[:, 3:].T, decodes + prefills)
    return np.stack(columns, axis=1)


def _fit(features: Floats, seconds: Floats) -> Floats:
    """Coefficients >= 0 that make the mean absolute relative error small, by reweighted least squares."""
    weights = np.ones(len(seconds))
    coefficients = np.zeros(features.shape[1])
    for _ in range(_NUM_REWEIGHTINGS):
        scale = weights / seconds
        coefficients = nonnegative_least_squares(features * scale[:, None], weights)
        residual = np.abs(features @ coefficients / seconds - 1.0)
        weights = 1.0 / np.sqrt(np.maximum(residual, 0.01))
    return coefficients


def _line(points: Floats | None) -> tuple[float, float]:
    """(at zero, per token) of a line through points [m, 2], both >= 0, equal relative weight."""
    if points is None or not len(points):
        return 0.0, 0.0
    tokens, seconds = points.T
    scale = 1.0 / np.maximum(seconds, _LEAST_S)
    features = np.stack((np.ones(len(tokens)), tokens), axis=1)
    at_zero, slope = nonnegative_least_squares(features * scale[:, None], np.ones(len(tokens)))
    return float(at_zero), float(slope)


def _held_out(shapes: ShapeRows) -> npt.NDArray[np.bool_]:
    """Every fourth composition of the batch; the largest stays in, so that nothing is extrapolated."""
    _, composition = np.unique(shapes[:, :3], axis=0, return_inverse=True)
    composition = composition.reshape(-1)
    if composition.max() < 2 * _HOLD_OUT:  # too few to give away whole ones
        return np.arange(len(shapes)) % _HOLD_OUT == _HOLD_OUT // 2
    return (composition % _HOLD_OUT == _HOLD_OUT // 2) & (composition < composition.max())


def shape_cells(shapes: ShapeRows) -> Floats:
    """Rows [n, columns] that are equal where steps are alike: bytes and pairs within a sixteenth octave,
    what is left of a prefill within an eighth of it."""
    is_counted = np.array([name.startswith("num_") or name == "prefill_tokens" for name in SHAPE_COLUMNS])
    cells = np.where(is_counted, shapes, np.round(16 * np.log2(1.0 + shapes / 4096.0)))
    after_prefill = SHAPE_COLUMNS.index("after_prefill")
    cells[:, after_prefill] = np.round(8 * shapes[:, after_prefill])
    return cells


def median_by_shape(shapes: ShapeRows, seconds: Floats) -> tuple[ShapeRows, Floats]:
    """Median shape and time of steps that are alike, in order of shape so that holding out is even."""
    _, group = np.unique(shape_cells(shapes), axis=0, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    cells = np.split(order, np.cumsum(np.bincount(group.reshape(-1)))[:-1]) if len(order) else []
    if not cells:
        return shapes[:0], seconds[:0]
    grid = np.array([np.median(shapes[cell], axis=0) for cell in cells])
    return grid, np.array([float(np.median(seconds[cell])) for cell in cells])
