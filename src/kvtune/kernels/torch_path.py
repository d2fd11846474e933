"""The faster torch path: gather and decode blocks, then dense attention in the model's dtype.

Serves where there is no native library. Same meaning as `reference`, other rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from kvtune.kernels.batch import AttentionBatch, LayerCache
from kvtune.kernels.reference import Masking, gather_blocks

__all__ = ["paged_attention"]

GATHER_ELEMENTS = 1 << 24
"""Most K elements gathered at once (64 MB in float32): longer decode batches run in slices."""


def paged_attention(
    q: torch.Tensor, cache: LayerCache, batch: AttentionBatch, masking: Masking
) -> torch.Tensor:
    """q [N, H, Dk] -> [N, H, Dv] in q.dtype. Sequences with equally many rows run together."""
    out = q.new_zeros(*q.shape[:2], cache.layout.v_head_dim)
    starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
    by_rows: dict[int, list[int]] = {}
    for s in range(len(lengths)):
        by_rows.setdefault(starts[s + 1] - starts[s], []).append(s)
    for num_rows, members in by_rows.items():
        if num_rows == 0:
            continue
        for part in _slices(sorted(members, key=lengths.__getitem__), lengths, cache):
            rows = torch.tensor([starts[s] for s in part]).unsqueeze(1) + torch.arange(num_rows)
            index = torch.tensor(part)
            seqs = (batch.block_table[index], batch.context_len[index].long())
            out[rows] = _attend(q[rows], cache, *seqs, masking)
    return out


def _slices(members: list[int], lengths: list[int], cache: LayerCache) -> list[list[int]]:
    """Cut sequences sorted by length so that padding to the longest stays within GATHER_ELEMENTS."""
    per_token = cache.layout.num_kv_heads * cache.layout.k_head_dim
    parts: list[list[int]] = [[]]
    for s in members:
        if parts[-1] and (len(parts[-1]) + 1) * lengths[s] * per_token > GATHER_ELEMENTS:
            parts.append([])
        parts[-1].append(s)
    return parts


def _attend(
    q: torch.Tensor, cache: LayerCache, table: torch.Tensor, context_len: torch.Tensor, masking: Masking
) -> torch.Tensor:
    """q [S, n, H, Dk], table [S, M], context_len [S] -> [S, n, H, Dv]."""
    S, n = q.shape[:2]
    B = cache.layout.block_size
    longest = int(context_len.max())
    first_block = 0
    if masking.window is not None:
        first_block = max(0, int(context_len.min()) - n - masking.window + 1) // B
    ids = table[:, first_block : -(-longest // B)]
    k, v = gather_blocks(cache, ids.flatten(), q.dtype)  # [S*M, h, B, D]
    k, v = (x.unflatten(0, (S, -1)).transpose(1, 2).flatten(2, 3) for x in (k, v))  # [S, h, T, D]
    keys = torch.arange(first_block * B, first_block * B + k.shape[2])
    inside = keys < context_len.unsqueeze(1)  # [S, T]
    v = torch.where(inside[:, None, :, None], v, 0.0)  # masked weights are 0, and 0 * NaN is NaN
    positions = context_len.unsqueeze(1) - n + torch.arange(n)  # [S, n]
    visible = (keys <= positions.unsqueeze(-1)) & inside.unsqueeze(1)  # [S, n, T]
    if masking.window is not None:
        visible &= keys > positions.unsqueeze(-1) - masking.window
    query = q.transpose(1, 2)  # [S, H, n, Dk]
    if masking.softcap is None and masking.sinks is None:
        k = torch.where(inside[:, None, :, None], k, 0.0)
        out = F.scaled_dot_product_attention(
            query, k, v, attn_mask=visible.unsqueeze(1), scale=masking.scale, enable_gqa=True
        )
    else:
        out = _dense_attention(query, k, v, visible, masking)
    return out.transpose(1, 2)


def _dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, masking: Masking
) -> torch.Tensor:
    """Soft-capped or sink attention: q [S, H, n, Dk], k and v [S, h, T, D]; softmax in float32."""
    S, H, n, _ = q.shape
    h = k.shape[1]
    grouped = q.reshape(S, h, H // h * n, -1)
    scores = (grouped @ k.transpose(-1, -2)).to(torch.float32).view(S, H, n, -1) * masking.scale
    if masking.softcap is not None:
        scores = torch.tanh(scores / masking.softcap) * masking.softcap
    scores = torch.where(visible.unsqueeze(1), scores, -torch.inf)
    if masking.sinks is not None:
        sink = masking.sinks.to(torch.float32).view(1, H, 1, 1).expand(S, H, n, 1)
        scores = torch.cat((scores, sink), -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]].to(q.dtype)
    return (weights.view(S, h, H // h * n, -1) @ v).view(S, H, n, -1)
