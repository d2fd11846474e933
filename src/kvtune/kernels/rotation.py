"""The basis rotated codecs store in: centred, then rotated by Hadamard blocks.

A rotation spreads an outlier channel over its whole block and leaves every dot product as it was, so the
query is rotated instead of each key (QuaRot, Ashkboos et al. 2024; block-diagonal as in SAW-INT4, 2026).
The order of additions is part of the definition: native code repeats it bit for bit.
"""

from __future__ import annotations

import torch

__all__ = [
    "MAX_ROTATION_BLOCK",
    "ROTATION_LIMIT",
    "from_stored_basis",
    "hadamard",
    "rotation_block",
    "to_stored_basis",
]

MAX_ROTATION_BLOCK = 128
ROTATION_LIMIT = 2.0**100
"""Finite elements are clamped to this before rotating, so that no sum over a block overflows float32."""


def rotation_block(dim: int) -> int:
    """Elements rotated together: the largest power of two that divides `dim`, at most 128."""
    return min(dim & -dim, MAX_ROTATION_BLOCK)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x float32 [..., d] times the orthonormal Walsh-Hadamard matrix, block by block; its own inverse."""
    block = rotation_block(x.shape[-1])
    y = x.reshape(-1, block)
    size = 1
    while size < block:
        pairs = y.view(-1, block // (2 * size), 2, size)
        first, second = pairs.unbind(2)
        y = torch.stack((first + second, first - second), 2).view(-1, block)
        size *= 2
    return (y * block**-0.5).view(x.shape)


def to_stored_basis(x: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
    """x float32 [..., d] -> what a rotated codec quantises; `centre` broadcasts against x."""
    if centre is not None:
        x = x - centre
    x = torch.where(x.isfinite(), x.clamp(-ROTATION_LIMIT, ROTATION_LIMIT), x)
    return hadamard(x)


def from_stored_basis(y: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
    """The inverse, up to rounding."""
    x = hadamard(y)
    return x if centre is None else x + centre
