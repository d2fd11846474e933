"""How many blocks of each KV group a budget buys: what engine and simulator build their caches from."""

from __future__ import annotations

from dataclasses import dataclass

from kvtune.config import CacheConfig
from kvtune.errors import UsageError
from kvtune.spec.layout import KVGroup, codec_storage
from kvtune.spec.model import ModelSpec
from kvtune.spec.sizing import first_block_bytes, group_block_bytes, split_budget

__all__ = ["FIRST_BLOCK_CODEC", "ArenaPlan", "plan_arenas"]

FIRST_BLOCK_CODEC = "bf16"
"""How block 0 of each sequence is stored with `first_block_16bit`."""

_FIRST_SHARE = 4
"""The 16-bit first blocks take at most 1 / this of the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaPlan:
    """Blocks per group, in the body and (0 without `first_block_16bit`) in the 16-bit first arena.

    `block_bytes[g]` and `first_block_bytes[g]`: bytes of one block of group g over all its layers.
    """

    groups: tuple[KVGroup, ...]
    num_blocks: tuple[int, ...]
    num_first_blocks: tuple[int, ...]
    block_bytes: tuple[int, ...]
    first_block_bytes: tuple[int, ...]
    block_size: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all arenas, as spec predicts them."""
        rows = zip(self.num_blocks, self.block_bytes, self.num_first_blocks, self.first_block_bytes,
                   strict=True)  # fmt: skip
        return sum(n * size + first * first_size for n, size, first, first_size in rows)

    @property
    def capacity_tokens(self) -> int:
        """Tokens the smallest group with full attention can hold (of all groups if none has)."""
        blocks = [n + first for n, first in zip(self.num_blocks, self.num_first_blocks, strict=True)]
        full = [n for group, n in zip(self.groups, blocks, strict=True) if group.window is None]
        return min(full or blocks) * self.block_size


def plan_arenas(
    spec: ModelSpec, cache: CacheConfig, *, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int
) -> ArenaPlan:
    """Spend the KV budget on blocks. UsageError for an unknown codec or layer and for a budget that
    cannot hold one block of each group."""
    _check_codecs(spec, cache)
    groups = spec.kv_groups()
    block = tuple(group_block_bytes(g, cache.codecs_of, cache.block_size) for g in groups)
    first = tuple(first_block_bytes(g, cache.block_size, FIRST_BLOCK_CODEC) for g in groups)
    budget = cache.kv_budget_bytes
    num_first = (0,) * len(groups)
    if cache.first_block_16bit:
        # twice the running sequences, so that idle first blocks of cached prefixes survive them
        count = max(1, min(2 * max_num_seqs, budget // _FIRST_SHARE // sum(first)))
        num_first = (count,) * len(groups)
        budget -= count * sum(first)
        if budget < sum(block):
            raise UsageError(f"KV budget {cache.kv_budget} cannot hold a 16-bit first block and one more")
    num_blocks = split_budget(
        groups, block, budget, max_model_len=max_model_len, chunk=max_num_batched_tokens,
        block_size=cache.block_size,
    )  # fmt: skip
    return ArenaPlan(
        groups=groups,
        num_blocks=num_blocks,
        num_first_blocks=num_first,
        block_bytes=block,
        first_block_bytes=first,
        block_size=cache.block_size,
    )


def _check_codecs(spec: ModelSpec, cache: CacheConfig) -> None:
    for name in (cache.k_codec, cache.v_codec):
        codec_storage(name)
    for layer, pair in cache.layer_codecs.items():
        for name in pair:
            codec_storage(name)
        if not 0 <= layer < len(spec.layers):
            raise UsageError(
                f"layer_codecs names layer {layer}; the model has layers 0..{len(spec.layers) - 1}"
            )
