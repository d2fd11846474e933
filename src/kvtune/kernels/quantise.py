"""Numbers of every codec: values <-> codes and strip. The definition that native code must match bit for bit.

All arithmetic is float32, one IEEE operation at a time. Scales are rounded to fp16 first and codes are
computed from the rounded scale, so that decoding uses exactly what encoding used.

| codec | codes | strip |
|---|---|---|
| fp32, bf16, fp16 | a cast | |
| int8 | symmetric (vLLM `int8_per_token_head`) | scale = absmax / 127 |
| fp8 | e4m3 of x / scale | scale = absmax / 448 |
| int4 | asymmetric, 0..15 (QServe KV4) | scale = (max - min) / 15, minimum |
| int4_rh | int4 of the centred, rotated vector (SAW-INT4) | the same |
| n8_rh | the same with 0..255, in two nibble planes | scale = (max - min) / 255, minimum |
| n4_rh | the high plane of n8_rh alone | the same |
"""

from __future__ import annotations

import torch

from kvtune.errors import UsageError
from kvtune.kernels.rotation import from_stored_basis, to_stored_basis
from kvtune.spec import codec_storage

__all__ = [
    "FLOAT_DTYPES",
    "FP8_MAX",
    "FP16_MAX",
    "INT8_OFFSET",
    "decode_values",
    "encode_values",
    "high_plane",
]

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8_OFFSET = 128
FP16_MAX = 65504.0
FP8_MAX = 448.0
PLANE = 16.0
"""Codes of a nested codec per step of its high plane."""
LOW_MIDDLE = 7.5
"""What stands for a low plane that is not read: the middle of its codes."""
_RANGE = {"int4": 15, "int4_rh": 15, "n8_rh": 255, "n4_rh": 255}
_WIDTH = 4


def encode_values(
    codec: str, x: torch.Tensor, centre: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] of any float dtype -> (codes [..., d], strip fp16 [..., strip_values]).

    Codes are of the codec's float dtype, or uint8 (fp8: its bits; int4: 0..15, not yet packed). `centre`,
    float32 and broadcasting against x, is taken from x by the rotated codecs alone. A vector with a NaN or an
    infinity is stored with a NaN scale where there is one: it decodes to NaN as a whole and touches no other
    vector. fp16 saturates finite values at 65504; NaN is stored in its canonical pattern.
    """
    x = x.to(torch.float32)
    if codec in FLOAT_DTYPES:
        return _cast(codec, x), x.new_empty((*x.shape[:-1], 0), dtype=torch.float16)
    if codec_storage(codec).is_rotated:
        x = to_stored_basis(x, centre)
    if codec == "int8":
        return _encode_int8(x)
    if codec == "fp8":
        return _encode_fp8(x)
    if codec in _RANGE:
        codes, strip = _encode_range(x, _RANGE[codec])
        return (codes >> _WIDTH if codec == "n4_rh" else codes), strip
    raise UsageError(f"KV codec {codec!r} has no kernel")


def decode_values(
    codec: str, codes: torch.Tensor, strip: torch.Tensor, centre: torch.Tensor | None = None
) -> torch.Tensor:
    """(codes [..., d], strip [..., strip_values]) -> float32 [..., d].

    Codes of n8_rh may be float: `high_plane` of a vector whose low plane is not read.
    """
    if codec in FLOAT_DTYPES:
        return codes.to(torch.float32)
    scale = strip[..., :1].to(torch.float32)
    if codec == "fp8":
        return codes.view(torch.float8_e4m3fn).to(torch.float32) * scale
    if codec == "int8":
        return (codes.to(torch.float32) - INT8_OFFSET) * scale
    values = high_plane(codes) if codec == "n4_rh" else codes.to(torch.float32)
    values = values * scale + strip[..., 1:2].to(torch.float32)
    return from_stored_basis(values, centre) if codec_storage(codec).is_rotated else values


def high_plane(nibbles: torch.Tensor) -> torch.Tensor:
    """High nibbles of a nested codec -> the codes they stand for where the low plane is not read, float32."""
    return nibbles.to(torch.float32) * PLANE + LOW_MIDDLE


def _cast(codec: str, x: torch.Tensor) -> torch.Tensor:
    if codec == "fp16":
        x = torch.where(x.isfinite(), x.clamp(-FP16_MAX, FP16_MAX), x)
    codes = x.to(FLOAT_DTYPES[codec])
    # Vectorised and scalar casts disagree on the bits of a NaN: store one pattern.
    nan = torch.tensor(float("nan"), dtype=codes.dtype)
    return torch.where(x.isnan(), nan, codes)


def _to_fp16_scale(scale: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    scale = scale.clamp(-FP16_MAX, FP16_MAX)
    return torch.where(finite, scale, torch.nan).to(torch.float16)


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """The stored scale as float32; 1 where it is zero (all codes become 0) or NaN."""
    scale = scale.to(torch.float32)
    return torch.where(scale > 0, scale, 1.0)


def _symmetric(x: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale, scale fp16) with scale = absmax / largest; a vector that is not finite becomes zeros."""
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    scale = _to_fp16_scale(x.abs().amax(-1, keepdim=True) / largest, finite)
    return x / _divisor(scale), scale


def _encode_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    steps, scale = _symmetric(x, 127.0)
    codes = torch.round(steps).clamp(-127, 127) + INT8_OFFSET
    return codes.to(torch.uint8), scale


def _encode_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    steps, scale = _symmetric(x, FP8_MAX)
    # torch's cast gives NaN beyond 448: saturate first
    return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _encode_range(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric codes 0..levels."""
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = _to_fp16_scale((high - low) / float(levels), finite)
    minimum = _to_fp16_scale(low, finite) + 0.0  # which zero a minimum picks depends on order: keep +0
    base = torch.where(minimum.isnan(), 0.0, minimum.to(torch.float32))
    codes = torch.round((x - base) / _divisor(scale)).clamp(0, levels)
    return codes.to(torch.uint8), torch.cat((scale, minimum), -1)
