"""Filled paged caches and torch's SDPA over the same shapes, for the attention benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from harness import Call

from kvtune.codecs import write_kv
from kvtune.kernels import AttentionBatch, Backend, LayerCache, paged_attention
from kvtune.spec import PackedLayout

CODECS = [("bf16", "bf16"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("fp32", "fp32"),
          ("n8_rh", "n8_rh"), ("n8_rh one plane", "n8_rh one plane"), ("int4_rh", "int4_rh"),
          ("fp8", "fp8")]  # fmt: skip
ONE_PLANE = " one plane"
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """`kv_heads` with `group` query heads each; `rows` new tokens of each sequence end its `context`.

    The first `shared` tokens of all sequences lie in the same blocks.
    """

    kv_heads: int
    group: int
    head_dim: int
    num_seqs: int
    context: int
    rows: int = 1
    shared: int = 0

    @property
    def flop(self) -> float:
        """Products of scores and values under the causal mask, multiply and add counted apart."""
        keys = self.rows * (self.context - self.rows) + self.rows * (self.rows + 1) / 2
        return 4.0 * self.num_seqs * self.kv_heads * self.group * self.head_dim * keys


def make_cache(codecs: tuple[str, str], shape: Shape, backend: Backend) -> tuple[LayerCache, torch.Tensor]:
    """A cache filled with normal K and V through shuffled blocks, and its block table."""
    layout = PackedLayout(
        block_size=BLOCK_SIZE,
        num_kv_heads=shape.kv_heads,
        k_head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        k_codec=codecs[0].removesuffix(ONE_PLANE),
        v_codec=codecs[1].removesuffix(ONE_PLANE),
    )
    common, per_seq = shape.shared // BLOCK_SIZE, -(-shape.context // BLOCK_SIZE)
    num_blocks = common + shape.num_seqs * (per_seq - common)
    cache = LayerCache.allocate(layout, num_blocks)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    shared, own = order[:common].expand(shape.num_seqs, -1), order[common:].view(shape.num_seqs, -1)
    table = torch.cat((shared, own), 1)
    positions = torch.arange(shape.context)
    size = (2, shape.context, shape.kv_heads, shape.head_dim)
    for s in range(shape.num_seqs):
        k, v = torch.randn(size, generator=torch.Generator().manual_seed(s)).unbind(0)
        slots = table[s][positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        write_kv(cache, k, v, slots, backend=backend)
    cache.k_planes = 1 if codecs[0].endswith(ONE_PLANE) else 2
    cache.v_planes = 1 if codecs[1].endswith(ONE_PLANE) else 2
    return cache, table


def read_bytes(cache: LayerCache, shape: Shape) -> float:
    """Bytes of K and V a call has to read: one plane where reads take one."""
    layout = cache.layout
    skipped = (layout.k_low_bytes if cache.k_planes == 1 else 0) + (
        layout.v_low_bytes if cache.v_planes == 1 else 0
    )
    tokens = shape.shared + shape.num_seqs * (shape.context - shape.shared)
    return (layout.block_bytes - skipped) / BLOCK_SIZE * tokens


def paged_call(
    q: torch.Tensor, cache: LayerCache, table: torch.Tensor, shape: Shape, backend: Backend
) -> Call:
    batch = AttentionBatch(
        torch.arange(shape.num_seqs + 1, dtype=torch.int32) * shape.rows,
        torch.full((shape.num_seqs,), shape.context, dtype=torch.int32),
        table,
        torch.full((len(q),), -1),
    )
    return lambda: paged_attention(q, cache, batch, scale=shape.head_dim**-0.5, backend=backend)


def pairs_named(names: Sequence[str] | None) -> list[tuple[str, str]]:
    """`["int8/int4", "bf16"]` as pairs of K and V codecs; all of CODECS if None."""
    return [(pair[0], pair[-1]) for pair in (name.split("/") for name in names or [])] or CODECS


def paged_contenders(
    q: torch.Tensor, shape: Shape, codecs: Sequence[tuple[str, str]], backend: Backend
) -> tuple[dict[str, Call], dict[str, tuple[float, float]]]:
    """Name -> call over a cache of these codecs, and name -> (bytes of K and V it has to read, flop)."""
    calls: dict[str, Call] = {}
    work: dict[str, tuple[float, float]] = {}
    for pair in codecs:
        cache, table = make_cache(pair, shape, backend)
        name = "/".join(pair) if pair[0] != pair[1] else pair[0]
        calls[name] = paged_call(q, cache, table, shape, backend)
        work[name] = (read_bytes(cache, shape), shape.flop)
    return calls, work


def queries(shape: Shape) -> torch.Tensor:
    """bf16 [sequences x rows, H, d]."""
    heads = shape.kv_heads * shape.group
    q = torch.randn(
        shape.num_seqs * shape.rows, heads, shape.head_dim, generator=torch.Generator().manual_seed(7)
    )
    return q.to(torch.bfloat16)
