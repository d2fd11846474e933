"""What a codec is, and the built-in ones.

A codec stores each (token, head) vector by itself: truncating, sharing or rolling back blocks never
touches another token. The numbers are defined in kvtune.kernels.quantise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvtune.errors import UsageError
from kvtune.kernels.quantise import FP16_MAX, decode_values, encode_values
from kvtune.spec import CodecStorage, codec_storage

__all__ = ["CODECS", "Codec", "Encoded", "codec"]

ROUNDING_SLACK = 2.0**-21
"""Share of the largest magnitude left for the float32 operations of encode and decode themselves."""


@dataclass(frozen=True)
class Encoded:
    """`codes` [T, h, d] (float dtype, or uint8) and `strip` fp16 [T, h, strip_values]."""

    codes: torch.Tensor
    strip: torch.Tensor


@dataclass(frozen=True)
class Codec(ABC):
    """One side's storage form. `name` is the name in settings, recipes and `kvtune.spec`."""

    name: str

    @property
    def storage(self) -> CodecStorage:
        return codec_storage(self.name)

    def encode(self, x: torch.Tensor) -> Encoded:
        """x [T, h, d] of any float dtype."""
        return Encoded(*encode_values(self.name, x))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """float32 [T, h, d]."""
        return decode_values(self.name, encoded.codes, encoded.strip)

    def error_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Largest |decode(encode(x)) - x| per token and head, float32 [T, h].

        inf for a vector that holds a NaN or an infinity: it decodes to non-finite values.
        """
        x = x.to(torch.float32)
        finite = x.isfinite().all(-1)
        x = torch.where(finite.unsqueeze(-1), x, 0.0)
        bound = self._finite_bound(x) + ROUNDING_SLACK * x.abs().amax(-1)
        return torch.where(finite, bound, torch.inf)

    @abstractmethod
    def _finite_bound(self, x: torch.Tensor) -> torch.Tensor:
        """Bound for finite x, without float32 rounding."""


@dataclass(frozen=True)
class FloatCodec(Codec):
    """A cast, rounded to nearest even. `epsilon`: half a unit in the last place; `tiny`: half the smallest
    subnormal; `largest`: finite values beyond it are stored as it."""

    epsilon: float
    tiny: float
    largest: float

    def _finite_bound(self, x: torch.Tensor) -> torch.Tensor:
        absmax = x.abs().amax(-1)
        if self.name == "fp32":
            return torch.zeros_like(absmax)
        return absmax * self.epsilon + self.tiny + (absmax - self.largest).clamp(min=0)


@dataclass(frozen=True)
class Int8Codec(Codec):
    """Symmetric: scale = absmax / 127 in fp16, code = round(x / scale) + 128 (vLLM int8_per_token_head).

    Clips where the fp16 scale is too small: magnitudes above 127 x 65504 (scale saturated) or below fp16's
    smallest subnormal (scale rounds down, to zero in the end, and so does the vector).
    """

    def _finite_bound(self, x: torch.Tensor) -> torch.Tensor:
        absmax = x.abs().amax(-1)
        scale = self.encode(x).strip[..., 0].to(torch.float32)
        return torch.maximum(scale / 2, absmax - 127 * scale)


@dataclass(frozen=True)
class Int4Codec(Codec):
    """Asymmetric: scale = (max - min) / 15 and minimum, both fp16, codes 0..15 (QServe KV4).

    The minimum saturates at +-65504. What the rounded pair cannot reach is clipped; the bound says so.
    """

    def _finite_bound(self, x: torch.Tensor) -> torch.Tensor:
        scale, minimum = self.encode(x).strip.to(torch.float32).unbind(-1)
        below = minimum - x.amin(-1)
        above = x.amax(-1) - (minimum + 15 * scale)
        return torch.maximum(scale / 2, torch.maximum(below, above))


CODECS: dict[str, Codec] = {
    "fp32": FloatCodec("fp32", 0.0, 0.0, 3.4028235e38),
    "bf16": FloatCodec("bf16", 2.0**-8, 2.0**-134, 3.3895314e38),
    "fp16": FloatCodec("fp16", 2.0**-11, 2.0**-25, FP16_MAX),
    "int8": Int8Codec("int8"),
    "int4": Int4Codec("int4"),
}


def codec(name: str) -> Codec:
    """A codec by name; UsageError names the known ones."""
    try:
        return CODECS[name]
    except KeyError:
        raise UsageError(f"unknown KV codec {name!r}; known: {', '.join(CODECS)}") from None
