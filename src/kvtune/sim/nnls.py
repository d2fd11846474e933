"""Least squares with coefficients that cannot be negative: time never falls with work."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["nonnegative_least_squares"]

Floats = npt.NDArray[np.float64]


def nonnegative_least_squares(a: Floats, b: Floats, *, tolerance: float = 1e-10) -> Floats:
    """x >= 0 [n] that minimises |a x - b| for a [m, n], b [m].

    Lawson and Hanson's active set method (Solving Least Squares Problems, 1974, algorithm NNLS), with
    columns scaled to unit norm first: features here differ by nine orders of magnitude.
    """
    norms = np.linalg.norm(a, axis=0)
    norms[norms == 0] = 1.0
    scaled = a / norms
    num_columns = scaled.shape[1]
    x = np.zeros(num_columns)
    is_active = np.zeros(num_columns, bool)
    gradient = scaled.T @ b
    limit = tolerance * max(1.0, float(np.abs(gradient).max(initial=0.0)))
    for _ in range(3 * num_columns + 10):  # the method ends by itself; rounding must not keep it going
        blocked = is_active | (gradient <= limit)
        if blocked.all():
            break
        is_active[int(np.argmax(np.where(blocked, -np.inf, gradient)))] = True
        x = _feasible(scaled, b, x, is_active)
        gradient = scaled.T @ (b - scaled @ x)
    return x / norms


def _feasible(a: Floats, b: Floats, x: Floats, is_active: npt.NDArray[np.bool_]) -> Floats:
    """Solve over the active columns; let go of those that would turn negative (changes `is_active`)."""
    while True:
        trial = np.zeros_like(x)
        trial[is_active] = np.linalg.lstsq(a[:, is_active], b, rcond=None)[0]
        negative = is_active & (trial <= 0)
        if not negative.any():
            return trial
        gap = x[negative] - trial[negative]
        steps = np.divide(x[negative], gap, out=np.zeros_like(gap), where=gap > 0)
        x = x + float(steps.min(initial=1.0)) * (trial - x)
        is_active &= x > 1e-14
        if not is_active.any():
            return np.zeros_like(x)
