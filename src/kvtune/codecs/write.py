"""The write side of contract T0: every token is encoded once, when it is written."""

from __future__ import annotations

import torch

from kvtune.kernels import Backend, LayerCache, store_kv

__all__ = ["write_kv"]


def write_kv(
    cache: LayerCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, *, backend: Backend
) -> None:
    """Encode k [N, h, Dk] and v [N, h, Dv] (after RoPE) and store them at `slots` int64 [N].

    A slot is block_id * block_size + offset; -1 writes nothing. Slots of blocks in the first arena are
    stored with its codecs. The bytes are the same on every backend. UsageError on a shape or slot that
    does not fit the cache.
    """
    store_kv(cache, k, v, slots, backend=backend)
