"""KV layout of a model from its config dict, and the packed layout of a block.

The only place where KV bytes are computed: planner, pool, kernels, tiers and simulator call it.

Notation: n tokens in the sequence, B tokens per block, W window, h KV heads, d head dim.
"""

from __future__ import annotations

from kvtune.spec.layout import CODEC_STORAGE, CodecStorage, KVGroup, LayerKind, PackedLayout, codec_storage
from kvtune.spec.model import LayerSpec, ModelSpec
from kvtune.spec.sizing import blocks_per_sequence, first_block_bytes, group_block_bytes, split_budget

__all__ = [
    "CODEC_STORAGE",
    "CodecStorage",
    "KVGroup",
    "LayerKind",
    "LayerSpec",
    "ModelSpec",
    "PackedLayout",
    "blocks_per_sequence",
    "codec_storage",
    "first_block_bytes",
    "group_block_bytes",
    "split_budget",
]
