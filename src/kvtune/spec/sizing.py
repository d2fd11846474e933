"""Bytes of blocks and budgets over KV groups, as the block pool allocates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtune.config import format_bytes
from kvtune.errors import UsageError
from kvtune.spec.layout import BLOCK_ALIGN, KVGroup, LayerKind, PackedLayout, codec_storage

__all__ = [
    "blocks_per_sequence",
    "first_block_bytes",
    "group_block_bytes",
    "layer_block_bytes",
    "split_budget",
]

CodecsOf = Callable[[int], tuple[str, str]]
"""Model layer index -> (K codec, V codec)."""


def layer_block_bytes(group: KVGroup, codecs: tuple[str, str], block_size: int) -> int:
    """Bytes one block of one layer of `group` takes: codes, scale strips and the pad to 64 bytes."""
    if group.kind is LayerKind.MLA:
        latent = block_size * codec_storage(codecs[0]).head_bytes(group.k_head_dim)
        return -(-latent // BLOCK_ALIGN) * BLOCK_ALIGN
    return PackedLayout(
        block_size=block_size,
        num_kv_heads=group.num_kv_heads,
        k_head_dim=group.k_head_dim,
        v_head_dim=group.v_head_dim,
        k_codec=codecs[0],
        v_codec=codecs[1],
    ).block_bytes


def group_block_bytes(group: KVGroup, codecs_of: CodecsOf, block_size: int) -> int:
    """Bytes one block of `group` takes over all its layers (a block id names one block in each layer).

    `codecs_of(layer)` gives the (K, V) codec names of a model layer. UsageError for unknown codecs and for
    shapes the packed layout cannot hold.
    """
    return sum(layer_block_bytes(group, codecs_of(layer), block_size) for layer in group.layers)


def first_block_bytes(group: KVGroup, block_size: int, codec: str = "bf16") -> int:
    """Bytes of one block of the separate arena that keeps block 0 of each sequence in 16 bit."""
    return group_block_bytes(group, lambda _layer: (codec, codec), block_size)


def blocks_per_sequence(group: KVGroup, num_tokens: int, *, chunk: int, block_size: int) -> int:
    """Blocks of `group` that one sequence of `num_tokens` holds at its peak.

    A window needs what the first query of a step of `chunk` tokens still sees plus that step, and one more
    block because neither end need lie on a block boundary (vLLM's admission bound for sliding layers).
    """
    whole = -(-num_tokens // block_size)
    if group.window is None:
        return whole
    return min(whole, -(-min(group.window - 1 + chunk, num_tokens) // block_size) + 1)


def split_budget(
    groups: Sequence[KVGroup],
    block_bytes: Sequence[int],
    kv_budget_bytes: int,
    *,
    max_model_len: int,
    chunk: int,
    block_size: int,
) -> tuple[int, ...]:
    """Blocks per group such that all groups hold about equally many sequences of `max_model_len` tokens.

    `block_bytes[g]` are the bytes of one block of group g over its layers. The blocks never take more than
    `kv_budget_bytes`, and what is left over is less than the dearest block. UsageError if the budget cannot
    hold one block of every group.
    """
    least = sum(block_bytes)
    if kv_budget_bytes < least:
        raise UsageError(
            f"KV budget {format_bytes(kv_budget_bytes)} cannot hold one block of each KV group: "
            f"{format_bytes(least)} needed for {len(groups)} group(s) of {block_size}-token blocks; raise --kv-budget"
        )
    needed = [blocks_per_sequence(g, max_model_len, chunk=chunk, block_size=block_size) for g in groups]
    per_sequence = sum(n * size for n, size in zip(needed, block_bytes, strict=True))
    spare = kv_budget_bytes - least
    counts = [1 + spare * n // per_sequence for n in needed]
    left = kv_budget_bytes - sum(n * size for n, size in zip(counts, block_bytes, strict=True))
    for g in sorted(range(len(groups)), key=lambda g: counts[g] / needed[g]):
        extra = min(1, left // block_bytes[g])
        counts[g] += extra
        left -= extra * block_bytes[g]
    return tuple(counts)
