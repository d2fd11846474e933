"""Numbers of every codec: values <-> codes and strip. The definition that native code must match bit for bit.

All arithmetic is float32, one IEEE operation at a time. Scales are rounded to fp16 first and codes are
computed from the rounded scale, so that decoding uses exactly what encoding used.

int8 and int4 are the per-token-per-head schemes of vLLM's `int8_per_token_head` and of QServe's KV4.
"""

from __future__ import annotations

import torch

from kvtune.errors import UsageError
from kvtune.spec import codec_storage

__all__ = ["FLOAT_DTYPES", "INT8_OFFSET", "decode_values", "encode_values"]

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8_OFFSET = 128
FP16_MAX = 65504.0


def encode_values(codec: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] of any float dtype -> (codes [..., d], strip fp16 [..., strip_values]).

    Codes are of the codec's float dtype, or uint8 (int4: 0..15, not yet packed). A vector with a NaN or an
    infinity is stored by the integer codecs with a NaN scale: it decodes to NaN as a whole and touches no
    other vector. fp16 saturates finite values at 65504; NaN is stored in its canonical pattern.
    """
    x = x.to(torch.float32)
    if codec in FLOAT_DTYPES:
        return _cast(codec, x), x.new_empty((*x.shape[:-1], 0), dtype=torch.float16)
    if codec == "int8":
        return _encode_int8(x)
    if codec == "int4":
        return _encode_int4(x)
    codec_storage(codec)
    raise UsageError(f"KV codec {codec!r} has no kernel")


def decode_values(codec: str, codes: torch.Tensor, strip: torch.Tensor) -> torch.Tensor:
    """(codes [..., d], strip [..., strip_values]) -> float32 [..., d]."""
    if codec in FLOAT_DTYPES:
        return codes.to(torch.float32)
    values = codes.to(torch.float32)
    scale = strip[..., :1].to(torch.float32)
    if codec == "int8":
        return (values - INT8_OFFSET) * scale
    return values * scale + strip[..., 1:2].to(torch.float32)


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


def _encode_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    scale = _to_fp16_scale(x.abs().amax(-1, keepdim=True) / 127.0, finite)
    codes = torch.round(x / _divisor(scale)).clamp(-127, 127) + INT8_OFFSET
    return codes.to(torch.uint8), scale


def _encode_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    finite = x.isfinite().all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = _to_fp16_scale((high - low) / 15.0, finite)
    minimum = _to_fp16_scale(low, finite) + 0.0  # which zero a minimum picks depends on order: keep +0
    base = torch.where(minimum.isnan(), 0.0, minimum.to(torch.float32))
    codes = torch.round((x - base) / _divisor(scale)).clamp(0, 15)
    return codes.to(torch.uint8), torch.cat((scale, minimum), -1)
