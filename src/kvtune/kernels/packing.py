"""Codes <-> bytes of packed blocks (kvtune.spec.PackedLayout), as torch views."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvtune.kernels.planes import LowPlanes
from kvtune.kernels.quantise import FLOAT_DTYPES, decode_values, high_plane
from kvtune.spec import PackedLayout, codec_storage

__all__ = ["LowRows", "decode_blocks", "store_codes"]

LowRows = tuple[torch.Tensor, torch.Tensor]
"""Low planes uint8 [m, plane_bytes] of m blocks, and bool [m]: which blocks have theirs."""


def decode_blocks(
    blocks: torch.Tensor,
    layout: PackedLayout,
    dtype: torch.dtype = torch.float32,
    *,
    k_centre: torch.Tensor | None = None,
    low: Mapping[str, LowRows | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """blocks uint8 [m, arena_bytes] -> (k [m, h, B, Dk], v [m, h, B, Dv]), decoded in float32, then cast.

    `k_centre` [h, Dk]; `low`: by side "k" or "v", the low planes of nested codes to read with the high ones.
    """
    low = low or {}
    centre = None if k_centre is None else k_centre.unsqueeze(1)
    k_codes = _k_codes(_k_words(blocks, layout), layout)
    k_rows = low.get("k")
    if codec_storage(layout.k_codec).low_bits:
        planes = None if k_rows is None else _k_codes(_k_low_words(k_rows[0], layout), layout)
        k_codes = _nested_codes(k_codes, planes, k_rows)
    v_codes = _v_codes(_v_words(blocks, layout), layout)
    v_rows = low.get("v")
    if codec_storage(layout.v_codec).low_bits:
        planes = None if v_rows is None else _v_codes(_v_low_words(v_rows[0], layout), layout)
        v_codes = _nested_codes(v_codes, planes, v_rows)
    k = decode_values(layout.k_codec, k_codes, _strip(blocks, layout, "k"), centre)
    v = decode_values(layout.v_codec, v_codes, _strip(blocks, layout, "v"))
    return k.to(dtype), v.to(dtype)


def store_codes(
    arena: torch.Tensor,
    layout: PackedLayout,
    *,
    k: tuple[torch.Tensor, torch.Tensor],
    v: tuple[torch.Tensor, torch.Tensor],
    block: torch.Tensor,
    offset: torch.Tensor,
    low: Mapping[str, LowPlanes],
) -> None:
    """Write (codes [n, h, d], strip [n, h, s]) of K and V at token `offset` [n] of `block` [n].

    `low`: by side, where low planes of nested codes go; blocks without a row keep the high plane alone.
    """
    k_codes, v_codes = k[0], v[0]
    if "k" in low:
        rows, kept = _rows_of(low["k"], block)
        _store_k(_k_low_words(low["k"].arena, layout), layout, k_codes[kept] & 15, rows[kept], offset[kept])
        k_codes = k_codes >> 4
    if "v" in low:
        rows, kept = _rows_of(low["v"], block)
        _store_v(_v_low_words(low["v"].arena, layout), layout, v_codes[kept] & 15, rows[kept], offset[kept])
        v_codes = v_codes >> 4
    _store_k(_k_words(arena, layout), layout, k_codes, block, offset)
    _store_v(_v_words(arena, layout), layout, v_codes, block, offset)
    for side, strip in (("k", k[1]), ("v", v[1])):
        if strip.shape[-1]:
            _strip_view(arena, layout, side)[block, :, :, offset] = strip


def _rows_of(low: LowPlanes, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = low.row_of[block].long()
    return rows, rows >= 0


def _nested_codes(high: torch.Tensor, low: torch.Tensor | None, rows: LowRows | None) -> torch.Tensor:
    """Codes float32 [m, h, B, d] of high nibbles and, for the blocks that have them, low ones."""
    alone = high_plane(high)
    if low is None or rows is None:
        return alone
    whole = ((high << 4) | low).to(torch.float32)
    return torch.where(rows[1].view(-1, 1, 1, 1), whole, alone)


def _plane_bits(codec: str) -> int:
    """Bits of an element in one packed region."""
    storage = codec_storage(codec)
    return storage.code_bits - storage.low_bits


def _elements_per_word(codec: str) -> int:
    return 32 // _plane_bits(codec)


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


def _k_low_words(rows: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    return rows.view(-1, layout.num_kv_heads, layout.block_size // 16, layout.k_head_dim // 8, 16, 4)


def _v_low_words(rows: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    return rows.view(-1, layout.num_kv_heads, layout.block_size // 8, layout.v_head_dim, 4)


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
    if _plane_bits(codec) == 8:
        return words
    return torch.cat((words & 15, words >> 4), -1)


def _words_of(codes: torch.Tensor, codec: str) -> torch.Tensor:
    """Codes [..., e] -> uint8 [..., 4]."""
    if codec in FLOAT_DTYPES:
        return codes.contiguous().view(torch.uint8)
    if _plane_bits(codec) == 8:
        return codes
    return codes[..., :4] | (codes[..., 4:] << 4)


def _k_codes(words: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    codes = _word_elements(words, layout.k_codec)  # [m, h, B/16, d/e, 16, e]
    shape = (-1, layout.num_kv_heads, layout.block_size, layout.k_head_dim)
    return codes.permute(0, 1, 2, 4, 3, 5).reshape(shape)


def _v_codes(words: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    codes = _word_elements(words, layout.v_codec)  # [m, h, B/e, d, e]
    shape = (-1, layout.num_kv_heads, layout.block_size, layout.v_head_dim)
    return codes.permute(0, 1, 2, 4, 3).reshape(shape)


def _store_k(
    words: torch.Tensor, layout: PackedLayout, codes: torch.Tensor, block: torch.Tensor, offset: torch.Tensor
) -> None:
    """Into words [M, h, B/16, d/e, 16, 4] of an arena or of low planes."""
    e = _elements_per_word(layout.k_codec)
    packed = _words_of(codes.unflatten(-1, (-1, e)), layout.k_codec)  # [n, h, d/e, 4]
    words[block, :, offset // 16, :, offset % 16] = packed


def _store_v(
    words: torch.Tensor, layout: PackedLayout, codes: torch.Tensor, block: torch.Tensor, offset: torch.Tensor
) -> None:
    """Into words [M, h, B/e, d, 4] of an arena or of low planes."""
    if _plane_bits(layout.v_codec) != 4:
        e = _elements_per_word(layout.v_codec)
        elements = words if _plane_bits(layout.v_codec) == 8 else words.view(FLOAT_DTYPES[layout.v_codec])
        elements[block, :, offset // e, :, offset % e] = codes
        return
    # Tokens r and r + 4 of eight share a byte: two passes, so that no byte is written twice in one.
    for high in (False, True):
        rows = ((offset % 8) >= 4) == high
        index = (block[rows], slice(None), offset[rows] // 8, slice(None), offset[rows] % 4)
        old, new = words[index], codes[rows]
        words[index] = (old & 0x0F) | (new << 4) if high else (old & 0xF0) | new
