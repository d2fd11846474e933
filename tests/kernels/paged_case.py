"""Random paged caches for kernel tests, and plain dense attention in float64 as the independent judge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtune.codecs import write_kv
from kvtune.kernels import AttentionBatch, LayerCache, choose_backend, gather_kv
from kvtune.spec import PackedLayout


@dataclass
class Case:
    """A filled cache and its sequences. `tables[s]` int32, `lengths[s]` tokens."""

    cache: LayerCache
    tables: list[torch.Tensor]
    lengths: list[int]
    num_heads: int

    @property
    def scale(self) -> float:
        return self.cache.layout.k_head_dim**-0.5

    def batch(self, rows: list[int], members: list[int] | None = None, ends: list[int] | None = None):
        """The last rows[i] rows of each member, ending at ends[i] (default: its length)."""
        members = list(range(len(self.tables))) if members is None else members
        ends = [self.lengths[s] for s in members] if ends is None else ends
        width = max(len(t) for t in self.tables)
        table = torch.full((len(members), width), -1, dtype=torch.int32)
        for i, s in enumerate(members):
            used = -(-ends[i] // self.cache.layout.block_size)
            table[i, :used] = self.tables[s][:used]
        start = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
        slots = torch.full((int(start[-1]),), -1, dtype=torch.int64)
        return AttentionBatch(start, torch.tensor(ends, dtype=torch.int32), table, slots)

    def dense(self, s: int, q: torch.Tensor, **masking) -> torch.Tensor:
        """float64 attention of q's rows at the end of sequence s over the decoded cache."""
        k, v = gather_kv(self.cache, self.tables[s], self.lengths[s])
        return dense_attention(q, k, v, scale=self.scale, **masking)


def dense_attention(q, k, v, *, scale, window=None, softcap=None, sinks=None):
    n, H, _ = q.shape
    T, h, _ = k.shape
    k, v = (x.double().repeat_interleave(H // h, 1) for x in (k, v))
    scores = torch.einsum("nhd,thd->hnt", q.double(), k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    positions, keys = torch.arange(T - n, T)[:, None], torch.arange(T)[None]
    visible = keys <= positions
    if window:
        visible &= keys > positions - window
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(H, 1, 1).expand(H, n, 1)), -1)
    return torch.einsum("hnt,thd->nhd", scores.softmax(-1)[..., :T], v)


def make_case(
    lengths: list[int],
    *,
    k_codec: str = "fp32",
    v_codec: str = "fp32",
    block_size: int = 16,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    first_codec: str | None = None,
    seed: int = 0,
    shuffle: bool = True,
    centre: torch.Tensor | None = None,
) -> Case:
    """Sequences of the given lengths in a shuffled arena; unused bytes are 0xFF (NaN in every float form).

    Keys are drawn around `centre` [h, Dk], which the cache knows.
    """
    generator = torch.Generator().manual_seed(seed)
    v_dim = v_head_dim or head_dim

    def layout(k: str, v: str) -> PackedLayout:
        return PackedLayout(
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            k_head_dim=head_dim,
            v_head_dim=v_dim,
            k_codec=k,
            v_codec=v,
        )

    first_layout = layout(first_codec, first_codec) if first_codec else None
    blocks = [-(-n // block_size) for n in lengths]
    num_blocks = sum(blocks) + 3
    cache = LayerCache.allocate(
        layout(k_codec, v_codec),
        num_blocks,
        first_layout=first_layout,
        num_first_blocks=len(lengths) if first_codec else 0,
        k_centre=centre,
    )
    for arena, _, _ in cache.parts():
        arena.fill_(0xFF)
    for low in cache.low_planes.values():
        low.arena.fill_(0xFF)
    ids = torch.randperm(num_blocks, generator=generator) if shuffle else torch.arange(num_blocks)
    tables, taken = [], 0
    for s, count in enumerate(blocks):
        table = ids[taken : taken + count].to(torch.int32)
        taken += count
        if first_codec and count:
            table[0] = num_blocks + s
        tables.append(table)
        p = torch.arange(lengths[s])
        slots = table[p // block_size].long() * block_size + p % block_size
        k = torch.randn(lengths[s], num_kv_heads, head_dim, generator=torch.Generator().manual_seed(seed + s))
        k = k if centre is None else k + centre
        v = torch.randn(lengths[s], num_kv_heads, v_dim, generator=torch.Generator().manual_seed(~seed & 255))
        write_kv(cache, k, v, slots, backend=choose_backend("reference"))
    return Case(cache, tables, lengths, num_kv_heads * group)


def random_query(case: Case, rows: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, case.num_heads, case.cache.layout.k_head_dim, generator=generator)
