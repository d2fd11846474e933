"""KV layout of a model from its config dict, and the packed layout of a block.

The only place where KV bytes are computed: planner, pool, kernels, tiers and simulator call it.

Notation: n tokens in the sequence, B tokens per block, W window, h KV heads, d head dim.
"""

from __future__ import annotations

from kvtune.spec.arena_plan import FIRST_BLOCK_CODEC, ArenaPlan, plan_arenas
from kvtune.spec.breakdown import AllocatorModel, Breakdown, GroupBytes
from kvtune.spec.engines import (
    ENGINES,
    AllocatorTerm,
    Paging,
    allocator_bytes,
    allocator_terms,
    kv_format,
    kv_formats,
)
from kvtune.spec.layout import (
    BLOCK_ALIGN,
    CODEC_STORAGE,
    CodecStorage,
    KVGroup,
    LayerKind,
    PackedLayout,
    codec_storage,
)
from kvtune.spec.model import LayerSpec, ModelSpec, text_config
from kvtune.spec.parallel import check_tensor_parallel, valid_tensor_parallel
from kvtune.spec.pool_budget import PoolBudget
from kvtune.spec.sizing import (
    KVFormat,
    blocks_per_sequence,
    first_block_bytes,
    fixed_bytes_per_sequence,
    group_block_bytes,
    growth_bytes_per_token,
    layer_state_bytes,
    layer_token_bytes,
    logical_bytes,
    side_bytes,
    split_budget,
)

__all__ = [
    "BLOCK_ALIGN",
    "CODEC_STORAGE",
    "ENGINES",
    "FIRST_BLOCK_CODEC",
    "AllocatorModel",
    "AllocatorTerm",
    "ArenaPlan",
    "Breakdown",
    "CodecStorage",
    "GroupBytes",
    "KVFormat",
    "KVGroup",
    "LayerKind",
    "LayerSpec",
    "ModelSpec",
    "PackedLayout",
    "Paging",
    "PoolBudget",
    "allocator_bytes",
    "allocator_terms",
    "blocks_per_sequence",
    "check_tensor_parallel",
    "codec_storage",
    "first_block_bytes",
    "fixed_bytes_per_sequence",
    "group_block_bytes",
    "growth_bytes_per_token",
    "kv_format",
    "kv_formats",
    "layer_state_bytes",
    "layer_token_bytes",
    "logical_bytes",
    "plan_arenas",
    "side_bytes",
    "split_budget",
    "text_config",
    "valid_tensor_parallel",
]
