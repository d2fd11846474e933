"""Codes <-> bytes of packed blocks (kvtune.spec.PackedLayout), as torch views."""

from __future__ import annotations

import torch

from kvtune.kernels.quantise import FLOAT_DTYPES, decode_values
from kvtune.spec import PackedLayout, codec_storage

__all__ = ["decode_blocks", "store_codes"]


def decode_blocks(
    blocks: torch.Tensor, layout: PackedLayout, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """blocks uint8 [m, block_bytes] -> (k [m, h, B, Dk], v [m, h, B, Dv]), decoded in float32, then cast."""
    k = decode_values(layout.k_codec, _k_codes(blocks, layout), _strip(blocks, layout, "k"))
    v = decode_values(layout.v_codec, _v_codes(blocks, layout), _strip(blocks, layout, "v"))
    return k.to(dtype), v.to(dtype)


def store_codes(
    arena: torch.Tensor,
    layout: PackedLayout,
    *,
    k: tuple[torch.Tensor, torch.Tensor],
    v: tuple[torch.Tensor, torch.Tensor],
    block: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    """Write (codes [n, h, d], strip [n, h, s]) of K and V at token `offset` [n] of `block` [n]."""
    _store_k(arena, layout, k[0], block, offset)
    _store_v(arena, layout, v[0], block, offset)
    for side, strip in (("k", k[1]), ("v", v[1])):
        if strip.shape[-1]:
            _strip_view(arena, layout, side)[block, :, :, offset] = strip


def _elements_per_word(codec: str) -> int:
    return 32 // codec_storage(codec).code_bits


def _k_words(blocks: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """View [m, h, B/16, d/e, 16, 4 bytes]."""
    e = _elements_per_word(layout.k_codec)
    shape = (-1, layout.num_kv_heads, layout.block_size // 16, layout.k_head_dim // e, 16, 4)
    return blocks[:, : layout.k_codes_bytes].view(shape)


def _v_words(blocks: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """View [m, h, B/e, d, 4 bytes]."""
    e = _elements_per_word(layout.v_codec)
    start = layout.v_codes_offset
    shape = (-1, layout.num_kv_heads, layout.block_size // e, layout.v_head_dim, 4)
    return blocks[:, start : start + layout.v_codes_bytes].view(shape)


def _strip_view(blocks: torch.Tensor, layout: PackedLayout, side: str) -> torch.Tensor:
    """View fp16 [m, h, strip_values, B]."""
    start, size, codec = (
        (layout.k_strip_offset, layout.k_strip_bytes, layout.k_codec)
        if side == "k"
        else (layout.v_strip_offset, layout.v_strip_bytes, layout.v_codec)
    )
    shape = (blocks.shape[0], layout.num_kv_heads, codec_storage(codec).strip_values, layout.block_size)
    return blocks[:, start : start + size].view(torch.float16).view(shape)


def _strip(blocks: torch.Tensor, layout: PackedLayout, side: str) -> torch.Tensor:
    """fp16 [m, h, B, strip_values]."""
    return _strip_view(blocks, layout, side).transpose(2, 3)


def _word_elements(words: torch.Tensor, codec: str) -> torch.Tensor:
    """uint8 [..., 4] -> codes [..., e]."""
    if codec in FLOAT_DTYPES:
        return words.view(FLOAT_DTYPES[codec])
    if codec == "int8":
        return words
    return torch.cat((words & 15, words >> 4), -1)


def _words_of(codes: torch.Tensor, codec: str) -> torch.Tensor:
    """Codes [..., e] -> uint8 [..., 4]."""
    if codec in FLOAT_DTYPES:
        return codes.contiguous().view(torch.uint8)
    if codec == "int8":
        return codes
    return codes[..., :4] | (codes[..., 4:] << 4)


def _k_codes(blocks: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    codes = _word_elements(_k_words(blocks, layout), layout.k_codec)  # [m, h, B/16, d/e, 16, e]
    shape = (-1, layout.num_kv_heads, layout.block_size, layout.k_head_dim)
    return codes.permute(0, 1, 2, 4, 3, 5).reshape(shape)


def _v_codes(blocks: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    codes = _word_elements(_v_words(blocks, layout), layout.v_codec)  # [m, h, B/e, d, e]
    shape = (-1, layout.num_kv_heads, layout.block_size, layout.v_head_dim)
    return codes.permute(0, 1, 2, 4, 3).reshape(shape)


def _store_k(
    arena: torch.Tensor, layout: PackedLayout, codes: torch.Tensor, block: torch.Tensor, offset: torch.Tensor
) -> None:
    e = _elements_per_word(layout.k_codec)
    words = _words_of(codes.unflatten(-1, (-1, e)), layout.k_codec)  # [n, h, d/e, 4]
    _k_words(arena, layout)[block, :, offset // 16, :, offset % 16] = words


def _store_v(
    arena: torch.Tensor, layout: PackedLayout, codes: torch.Tensor, block: torch.Tensor, offset: torch.Tensor
) -> None:
    words = _v_words(arena, layout)
    if layout.v_codec != "int4":
        e = _elements_per_word(layout.v_codec)
        elements = words if layout.v_codec == "int8" else words.view(FLOAT_DTYPES[layout.v_codec])
        elements[block, :, offset // e, :, offset % e] = codes
        return
    # Tokens r and r + 4 of eight share a byte: two passes, so that no byte is written twice in one.
    for high in (False, True):
        rows = ((offset % 8) >= 4) == high
        index = (block[rows], slice(None), offset[rows] // 8, slice(None), offset[rows] % 4)
        old, new = words[index], codes[rows]
        words[index] = (old & 0x0F) | (new << 4) if high else (old & 0xF0) | new
