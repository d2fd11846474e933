"""Kernels over packed KV blocks: encode and store, attention, gather, copy; one dispatch with a reason."""

from kvtune.kernels.batch import AssignedRows, AttentionBatch, LayerCache
from kvtune.kernels.dispatch import (
    Backend,
    choose_backend,
    copy_blocks,
    gather_kv,
    paged_attention,
    store_kv,
)
from kvtune.kernels.planes import LowPlanes
from kvtune.kernels.reservation import Reservation

__all__ = [
    "AssignedRows",
    "AttentionBatch",
    "Backend",
    "LayerCache",
    "LowPlanes",
    "Reservation",
    "choose_backend",
    "copy_blocks",
    "gather_kv",
    "paged_attention",
    "store_kv",
]
