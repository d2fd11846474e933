"""Paged attention as it is defined: slow, plain, and the same bits however the rows are batched.

A query row's output depends on its own values, its position and the decoded keys and values of its
sequence, and on nothing else: not on chunking, packing, neighbours, block size or how the blocks came
to be. By construction: keys are taken in tiles of KEY_TILE at fixed absolute positions, query rows sit at
`position % ROW_BLOCK` of a block of ROW_BLOCK rows, so every matrix product of a model has one and the
same shape, and a tile a row does not see leaves that row's running maximum, sum and output untouched.
Bit equality holds in float32 with one torch thread.

Online softmax: Milakov and Gimelshein (2018), as in FlashAttention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtune.kernels.batch import AttentionBatch, LayerCache
from kvtune.kernels.packing import LowRows, decode_blocks

__all__ = ["KEY_TILE", "ROW_BLOCK", "gather_blocks", "gather_tokens", "paged_attention"]

KEY_TILE = 128
"""Keys per step of the online softmax; tile t covers positions [128 t, 128 t + 128)."""

ROW_BLOCK = 16
"""Query rows per matrix product. 16 rows are where float32 products stop depending on the row count."""


@dataclass(frozen=True)
class Masking:
    """What a score goes through besides causality: scale, soft-cap, window, sink logit per head."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def gather_blocks(
    cache: LayerCache, block_ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode blocks by id, int [m] -> (k [m, h, B, Dk], v [m, h, B, Dv]); ids below 0 give zeros."""
    layout = cache.layout
    m, h, B = block_ids.shape[0], layout.num_kv_heads, layout.block_size
    k = torch.zeros(m, h, B, layout.k_head_dim, dtype=dtype)
    v = torch.zeros(m, h, B, layout.v_head_dim, dtype=dtype)
    for arena, part_layout, base in cache.parts():
        inside = (block_ids >= base) & (block_ids < base + arena.shape[0])
        rows = inside.nonzero().squeeze(1)
        if rows.numel():
            ids = block_ids[rows].long() - base
            low = {side: _low_rows(cache, side, ids) for side in ("k", "v")} if base == 0 else {}
            part_k, part_v = decode_blocks(arena[ids], part_layout, dtype, k_centre=cache.k_centre, low=low)
            if rows.numel() == m:
                return part_k, part_v
            k[rows], v[rows] = part_k, part_v
    return k, v


def _low_rows(cache: LayerCache, side: str, ids: torch.Tensor) -> LowRows | None:
    """The low planes that reads of these body blocks use: rows and which of them count; None for none."""
    low = cache.read_planes(side)
    if low is None:
        return None
    rows = low.row_of[ids].long()
    if not low.num_rows:
        return None
    return low.arena[rows.clamp(min=0)], rows >= 0


def gather_tokens(
    cache: LayerCache, block_ids: torch.Tensor, num_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `num_tokens` tokens of a row of blocks -> (k [n, h, Dk], v [n, h, Dv])."""
    k, v = gather_blocks(cache, block_ids, dtype)
    return (
        k.transpose(1, 2).flatten(0, 1)[:num_tokens].contiguous(),
        v.transpose(1, 2).flatten(0, 1)[:num_tokens].contiguous(),
    )


def paged_attention(
    q: torch.Tensor, cache: LayerCache, batch: AttentionBatch, masking: Masking
) -> torch.Tensor:
    """q [N, H, Dk] -> [N, H, Dv] in q.dtype; computed in float32. Padding rows are 0."""
    out = torch.zeros(*q.shape[:2], cache.layout.v_head_dim, dtype=torch.float32)
    starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
    for s, context_len in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        if rows.stop > rows.start:
            out[rows] = _attend_sequence(
                q[rows].to(torch.float32), cache, batch.block_table[s], context_len, masking
            )
    return out.to(q.dtype)


def _attend_sequence(
    q: torch.Tensor, cache: LayerCache, table: torch.Tensor, context_len: int, masking: Masking
) -> torch.Tensor:
    """q [n, H, Dk], whose last row is at position context_len - 1 -> [n, H, Dv]."""
    n, H, Dk = q.shape
    h = cache.layout.num_kv_heads
    first = context_len - n
    start = first // ROW_BLOCK * ROW_BLOCK
    stop = -(-context_len // ROW_BLOCK) * ROW_BLOCK
    padded = q.new_zeros(stop - start, H, Dk)
    padded[first - start : context_len - start] = q
    grouped = padded.view(-1, ROW_BLOCK, h, H // h, Dk).permute(0, 2, 3, 1, 4)  # [blocks, h, G, 16, Dk]
    tiles = _KeyTiles(cache, table, context_len)
    outputs = [
        _attend_row_block(grouped[i], tiles, start + i * ROW_BLOCK, masking) for i in range(len(grouped))
    ]
    out = torch.stack(outputs).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)  # [rows, H, Dv]
    return out[first - start : context_len - start]


class _KeyTiles:
    """Decoded key tiles of one sequence, each decoded once; positions past the context are zeros."""

    def __init__(self, cache: LayerCache, table: torch.Tensor, context_len: int) -> None:
        self._cache, self._table, self.context_len = cache, table, context_len
        self._tiles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getitem__(self, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k transposed [h, Dk, KEY_TILE], v [h, KEY_TILE, Dv])."""
        if tile not in self._tiles:
            self._tiles[tile] = self._decode(tile)
        return self._tiles[tile]

    def _decode(self, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        layout, B = self._cache.layout, self._cache.layout.block_size
        low = tile * KEY_TILE
        high = min(low + KEY_TILE, self.context_len)
        first_block = low // B
        ids = self._table[first_block : -(-high // B)]
        k, v = gather_tokens(self._cache, ids, high - first_block * B)
        skip = low - first_block * B
        tile_k = torch.zeros(layout.num_kv_heads, layout.k_head_dim, KEY_TILE)
        tile_v = torch.zeros(layout.num_kv_heads, KEY_TILE, layout.v_head_dim)
        tile_k[:, :, : high - low] = k[skip:].permute(1, 2, 0)
        tile_v[:, : high - low] = v[skip:].transpose(0, 1)
        return tile_k, tile_v


def _attend_row_block(q: torch.Tensor, tiles: _KeyTiles, position: int, masking: Masking) -> torch.Tensor:
    """q [h, G, 16, Dk] at positions position..position+15 -> [h, G, 16, Dv].

    Rows without a query (positions outside the chunk) are computed like others and dropped by the caller.
    """
    h, G, _, Dk = q.shape
    flat = q.reshape(h, G * ROW_BLOCK, Dk)
    positions = torch.arange(position, position + ROW_BLOCK).repeat(G).unsqueeze(1)  # [G*16, 1]
    maximum = torch.full((h, G * ROW_BLOCK, 1), -torch.inf)
    total = torch.zeros(h, G * ROW_BLOCK, 1)
    acc: torch.Tensor | None = None
    lowest = 0 if masking.window is None else max(0, position - masking.window + 1)
    highest = min(position + ROW_BLOCK, tiles.context_len)
    for tile in range(lowest // KEY_TILE, -(-highest // KEY_TILE)):
        k, v = tiles[tile]
        scores = _scores(flat, k, masking)
        keys = torch.arange(tile * KEY_TILE, (tile + 1) * KEY_TILE)
        visible = (keys <= positions) & (keys < tiles.context_len)
        if masking.window is not None:
            visible &= keys > positions - masking.window
        scores = torch.where(visible, scores, -torch.inf)
        new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        shift = torch.where(new_maximum == -torch.inf, 0.0, new_maximum)
        weights = torch.exp(scores - shift)
        keep = torch.exp(maximum - shift)
        total = total * keep + weights.sum(-1, keepdim=True)
        product = torch.bmm(weights, v)
        acc = product if acc is None else acc * keep + product
        maximum = new_maximum
    assert acc is not None  # a row sees at least its own key
    return _finish(acc, maximum, total, masking.sinks, (h, G))


def _scores(q: torch.Tensor, k: torch.Tensor, masking: Masking) -> torch.Tensor:
    scores = torch.bmm(q, k) * masking.scale
    if masking.softcap is not None:
        scores = torch.tanh(scores / masking.softcap) * masking.softcap
    return scores


def _finish(
    acc: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    sinks: torch.Tensor | None,
    heads: tuple[int, int],
) -> torch.Tensor:
    """Divide by the softmax sum; a sink is one more logit whose value vector is zero (GPT-OSS)."""
    if sinks is not None:
        sink = sinks.to(torch.float32).view(*heads, 1).expand(*heads, ROW_BLOCK).reshape(heads[0], -1, 1)
        with_sink = torch.maximum(maximum, sink)
        keep = torch.exp(maximum - with_sink)
        acc, total = acc * keep, total * keep + torch.exp(sink - with_sink)
    return (acc / total).view(*heads, ROW_BLOCK, -1)
