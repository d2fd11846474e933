"""What a codec is, and the built-in ones.

A codec stores each (token, head) vector by itself: truncating, sharing or rolling back blocks never
touches another token. The numbers are defined in kvtune.kernels.quantise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvtune.errors import UsageError
from kvtune.kernels.quantise import FP8_MAX, FP16_MAX, LOW_MIDDLE, decode_values, encode_values
from kvtune.kernels.rotation import ROTATION_LIMIT, rotation_block, to_stored_basis
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

    def encode(self, x: torch.Tensor, centre: torch.Tensor | None = None) -> Encoded:
        """x [T, h, d] of any float dtype. `centre` float32 [h, d]: used by rotated codecs alone."""
        return Encoded(*encode_values(self.name, x, centre))

    def decode(self, encoded: Encoded, centre: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [T, h, d]; `centre` as in `encode`."""
        return decode_values(self.name, encoded.codes, encoded.strip, centre)

    def error_bound(self, x: torch.Tensor, centre: torch.Tensor | None = None) -> torch.Tensor:
        """Largest |decode(encode(x)) - x| per token and head, float32 [T, h].

        inf for a vector that holds a NaN or an infinity: it decodes to non-finite values.
        """
        x = x.to(torch.float32)
        finite = x.isfinite().all(-1)
        x = torch.where(finite.unsqueeze(-1), x, 0.0)
        return torch.where(finite, self._bound(x, centre), torch.inf)

    def _bound(self, x: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
        return self._finite_bound(x) + ROUNDING_SLACK * x.abs().amax(-1)

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
class Fp8Codec(Codec):
    """e4m3 of x / scale, scale = absmax / 448 in fp16: 3 bits of mantissa, 15 binades, then even steps.

    Clips like int8 where the fp16 scale is too small.
    """

    def _finite_bound(self, x: torch.Tensor) -> torch.Tensor:
        absmax = x.abs().amax(-1)
        scale = self.encode(x).strip[..., 0].to(torch.float32)
        return torch.maximum(absmax * 2.0**-4 + scale * 2.0**-10, absmax - FP8_MAX * scale)


@dataclass(frozen=True)
class RangeCodec(Codec):
    """Asymmetric: scale = (max - min) / levels and minimum, both fp16, codes 0..levels (QServe KV4 with 15).

    The minimum saturates at +-65504. What the rounded pair cannot reach is clipped; the bound says so.
    `unread`: codes between a stored code and what it decodes to, at most (a low plane that is not there).
    """

    levels: int
    unread: float = 0.0

    def _finite_bound(self, x: torch.Tensor) -> torch.Tensor:
        return self._range_bound(x, self.encode(x).strip)

    def _range_bound(self, x: torch.Tensor, strip: torch.Tensor) -> torch.Tensor:
        scale, minimum = strip.to(torch.float32).unbind(-1)
        below = minimum - x.amin(-1)
        above = x.amax(-1) - (minimum + self.levels * scale)
        return torch.maximum(scale / 2, torch.maximum(below, above)) + self.unread * scale


@dataclass(frozen=True)
class RotatedCodec(RangeCodec):
    """RangeCodec of the vector less its centre, rotated by orthonormal Hadamard blocks (SAW-INT4).

    An element of the decoded vector sums a block's errors with signs: sqrt(block) times the largest at worst,
    about once its root mean square in practice. Elements beyond 2^100 from the centre are clipped to that.
    """

    def _bound(self, x: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
        block = rotation_block(x.shape[-1])
        away = x if centre is None else x - centre
        clipped = (away.abs().amax(-1) - ROTATION_LIMIT).clamp(min=0)
        rotated = to_stored_basis(x, centre)
        bound = self._range_bound(
            rotated, self.encode(x, centre).strip
        ) + ROUNDING_SLACK * rotated.abs().amax(-1)
        # log2(block) additions each way, each within 2^-24 of a partial sum of at most sqrt(block) x absmax
        rounding = (2 * block.bit_length() + 4) * 2.0**-24 * block**0.5
        largest = away.abs().amax(-1).clamp(max=ROTATION_LIMIT)
        offset = 0.0 if centre is None else centre.abs().amax(-1)
        return (
            bound * block**0.5 + clipped + rounding * largest + ROUNDING_SLACK * (x.abs().amax(-1) + offset)
        )


CODECS: dict[str, Codec] = {
    "fp32": FloatCodec("fp32", 0.0, 0.0, 3.4028235e38),
    "bf16": FloatCodec("bf16", 2.0**-8, 2.0**-134, 3.3895314e38),
    "fp16": FloatCodec("fp16", 2.0**-11, 2.0**-25, FP16_MAX),
    "int8": Int8Codec("int8"),
    "int4": RangeCodec("int4", 15),
    "fp8": Fp8Codec("fp8"),
    "int4_rh": RotatedCodec("int4_rh", 15),
    "n8_rh": RotatedCodec("n8_rh", 255),
    "n4_rh": RotatedCodec("n4_rh", 255, LOW_MIDDLE),
}


def codec(name: str) -> Codec:
    """A codec by name; UsageError names the known ones."""
    try:
        return CODECS[name]
    except KeyError:
        raise UsageError(f"unknown KV codec {name!r}; known: {', '.join(CODECS)}") from None
