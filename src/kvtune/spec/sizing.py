"""Bytes of a model's KV cache: what the numbers need, and what our block pool allocates for them.

Two numbers everywhere. *Logical* bytes are the stored elements with their scales. *Allocator* bytes add
what paging costs: whole blocks, the slack of a sliding window, padding (`kvtune.spec.engines`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from kvtune.config import format_bytes
from kvtune.errors import UsageError
from kvtune.spec.layout import BLOCK_ALIGN, CodecStorage, KVGroup, LayerKind, PackedLayout, codec_storage
from kvtune.spec.model import LayerSpec, ModelSpec

__all__ = [
    "KVFormat",
    "blocks_per_sequence",
    "first_block_bytes",
    "fixed_bytes_per_sequence",
    "group_block_bytes",
    "growth_bytes_per_token",
    "layer_state_bytes",
    "layer_token_bytes",
    "logical_bytes",
    "side_bytes",
    "split_budget",
]

CodecsOf = Callable[[int], tuple[str, str]]
"""Model layer index -> (K codec, V codec)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How K and V are stored, for all layers and, in `overrides`, for single layers (model layer index).

    `state_element_bytes`: how the engine keeps recurrent states whose type a config leaves open.
    """

    k: CodecStorage
    v: CodecStorage
    overrides: Mapping[int, tuple[CodecStorage, CodecStorage]] = field(
        default_factory=dict[int, tuple[CodecStorage, CodecStorage]]
    )
    state_element_bytes: int | None = None

    @classmethod
    def of(cls, k_codec: str, v_codec: str | None = None) -> Self:
        """From codec names of our engine; V like K unless given. UsageError for unknown names."""
        return cls(k=codec_storage(k_codec), v=codec_storage(v_codec or k_codec))

    def codecs(self, layer: int) -> tuple[CodecStorage, CodecStorage]:
        """(K, V) storage of one model layer."""
        return self.overrides.get(layer, (self.k, self.v))

    def names(self, layer: int) -> tuple[str, str]:
        """(K, V) codec names of one model layer."""
        k, v = self.codecs(layer)
        return k.name, v.name


def layer_token_bytes(layer: LayerSpec, kv: KVFormat, *, tp: int = 1) -> int:
    """Bytes one rank of `tp` stores per token in one layer (0 for layers without paged KV).

    Heads are split over ranks and replicated beyond one head each; MLA's latent is replicated on all.
    """
    k, v = kv.codecs(layer.index)
    if layer.kind is LayerKind.MLA:
        return k.latent_bytes(layer.latent_dim, layer.rope_dim) + layer.index_bytes
    heads = -(-layer.num_kv_heads // tp)
    return heads * (k.head_bytes(layer.k_head_dim) + v.head_bytes(layer.v_head_dim)) if heads else 0


def layer_state_bytes(layer: LayerSpec, kv: KVFormat) -> int:
    """Bytes of recurrent state one sequence takes in one layer."""
    return layer.state_bytes_as(kv.state_element_bytes)


def growth_bytes_per_token(spec: ModelSpec, kv: KVFormat) -> int:
    """Logical bytes each further token adds once all windows are full."""
    return sum(layer_token_bytes(layer, kv) for layer in spec.layers if layer.window is None)


def fixed_bytes_per_sequence(spec: ModelSpec, kv: KVFormat) -> int:
    """Logical bytes of a long sequence that do not grow with it: full windows and recurrent state."""
    windows = sum((layer.window or 0) * layer_token_bytes(layer, kv) for layer in spec.layers)
    return windows + _state_bytes(spec, kv)


def logical_bytes(spec: ModelSpec, num_tokens: int, kv: KVFormat) -> int:
    """Bytes of elements, scales and recurrent state of one sequence of `num_tokens` tokens."""
    total = _state_bytes(spec, kv)
    for layer in spec.layers:
        kept = num_tokens if layer.window is None else min(num_tokens, layer.window)
        total += kept * layer_token_bytes(layer, kv)
    return total


def _state_bytes(spec: ModelSpec, kv: KVFormat) -> int:
    return sum(layer_state_bytes(layer, kv) for layer in spec.layers)


def _aligned(size: int) -> int:
    return -(-size // BLOCK_ALIGN) * BLOCK_ALIGN


def _layer_block_bytes(group: KVGroup, codecs: tuple[str, str], block_size: int) -> int:
    if group.kind is LayerKind.MLA:  # no packed layout yet: plan only
        return _aligned(block_size * codec_storage(codecs[0]).head_bytes(group.k_head_dim))
    return _layout(group, codecs, block_size).block_bytes


def _layout(group: KVGroup, codecs: tuple[str, str], block_size: int) -> PackedLayout:
    return PackedLayout(
        block_size=block_size,
        num_kv_heads=group.num_kv_heads,
        k_head_dim=group.k_head_dim,
        v_head_dim=group.v_head_dim,
        k_codec=codecs[0],
        v_codec=codecs[1],
    )


def group_block_bytes(group: KVGroup, codecs_of: CodecsOf, block_size: int) -> int:
    """Bytes one block of `group` takes over all its layers (a block id names one block in each layer).

    `codecs_of(layer)` gives the (K, V) codec names of a model layer. UsageError for unknown codecs and for
    shapes the packed layout cannot hold.
    """
    return sum(_layer_block_bytes(group, codecs_of(layer), block_size) for layer in group.layers)


def first_block_bytes(group: KVGroup, block_size: int, codec: str = "bf16") -> int:
    """Bytes of one block of the separate arena that keeps block 0 of each sequence in 16 bit."""
    return group_block_bytes(group, lambda _layer: (codec, codec), block_size)


def blocks_per_sequence(group: KVGroup, num_tokens: int, *, chunk: int, block_size: int) -> int:
    """Blocks of `group` that one sequence of `num_tokens` holds at its peak.

    A window needs what the first query of a step of `chunk` tokens still sees plus that step, and one more
    block because the window need not start on a block boundary (vLLM's admission bound for sliding layers).
    """
    whole = -(-num_tokens // block_size)
    if group.window is None:
        return whole
    return min(whole, -(-min(group.window - 1 + chunk, num_tokens) // block_size) + 1)


def side_bytes(
    spec: ModelSpec, num_tokens: int, kv: KVFormat, *, block_size: int, chunk: int,
    first_block_codec: str | None = None,
) -> dict[int, tuple[int, int]]:  # fmt: skip
    """Model layer index -> bytes of (keys, values) in the blocks a sequence of `num_tokens` holds at most.

    Codes, all planes and scales; the padding of a block belongs to neither side. `first_block_codec`: block 0
    lies in this codec. UsageError for shapes the packed layout cannot hold, MLA among them.
    """
    out: dict[int, tuple[int, int]] = {}
    for group in spec.kv_groups():
        if group.kind is LayerKind.MLA:
            raise UsageError("an MLA latent is keys and values in one: it has no sides to tell apart")
        count = blocks_per_sequence(group, num_tokens, chunk=chunk, block_size=block_size)
        first = (0, 0)
        if first_block_codec is not None:
            count -= 1
            first = _layout(group, (first_block_codec, first_block_codec), block_size).side_bytes
        for layer in group.layers:
            k, v = _layout(group, kv.names(layer), block_size).side_bytes
            out[layer] = (count * k + first[0], count * v + first[1])
    return out


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
            f"{format_bytes(least)} needed for {len(groups)} group(s) at block size {block_size}"
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
