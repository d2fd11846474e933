"""What codecs and kernels of this installation do, as numbers two installations can compare.

Versions name what somebody meant to ship; this is what runs. A fixed tensor, made from integers so that every
machine has the same bits, goes through each codec and through attention over what it stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvtune.codecs.codec import CODECS
from kvtune.codecs.write import write_kv
from kvtune.kernels import AttentionBatch, Backend, LayerCache, gather_kv, paged_attention
from kvtune.kernels.rotation import hadamard
from kvtune.spec import PackedLayout, codec_storage

__all__ = ["SAMPLES", "codec_behaviour"]

SAMPLES = 16
"""Attention outputs kept per codec."""

_HEADS, _KV_HEADS, _DIM, _BLOCK = 4, 2, 64, 16
_LENGTHS, _ROWS = (40, 20), (1, 4)
"""Two sequences: one decodes, one is in the middle of its prompt; both end inside a block."""
_OUTLIER = 11
"""A channel eight times as large as the others, as keys of real models have."""


def codec_behaviour(backend: Backend) -> dict[str, Any]:
    """{codecs: name -> digest, attention: name -> [floats], rotation: digest}; digests are hexadecimal.

    A codec's digest covers what its definition encodes and decodes and what `backend` stores and gathers:
    the same on every machine. Attention outputs depend on the kernel path and its instruction set; those of
    a nested codec's high plane alone are listed as `name, 1 plane`.
    """
    with _one_thread():
        codecs: dict[str, str] = {}
        attention: dict[str, list[float]] = {}
        for name in CODECS:
            cache = _written(name, backend)
            codecs[name] = _digest(
                *_defined(name), cache.arena, *_stored_low(cache), *_gathered(cache, backend)
            )
            attention[name] = _attended(cache, backend)
            if codec_storage(name).low_bits:
                cache.k_planes = cache.v_planes = 1
                attention[f"{name}, 1 plane"] = _attended(cache, backend)
        return {"codecs": codecs, "attention": attention, "rotation": _rotation()}


@contextmanager
def _one_thread() -> Generator[None]:
    """Sums over threads may round differently; the caller's number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    """float32 in [-1, 1), multiples of 2^-23, from a linear congruential generator (Knuth's MMIX)."""
    state, out = seed, np.empty(int(np.prod(shape)), dtype=np.float32)
    for i in range(len(out)):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out[i] = (state >> 40) * 2.0**-23 - 1
    return torch.from_numpy(out).view(*shape)


def _keys_and_values() -> tuple[torch.Tensor, torch.Tensor]:
    """[T, h, d] each: an outlier channel in the keys, magnitudes from token to token over nine binades."""
    num_tokens = sum(_LENGTHS)
    k, v = _numbers(1, num_tokens, _KV_HEADS, _DIM), _numbers(2, num_tokens, _KV_HEADS, _DIM)
    k[..., _OUTLIER] *= 8
    steps = torch.arange(num_tokens) % 9 - 6
    return k, v * torch.pow(2.0, steps.float()).view(-1, 1, 1)


def _centre() -> torch.Tensor:
    return _numbers(3, _KV_HEADS, _DIM)


def _defined(name: str) -> list[torch.Tensor]:
    """Codes, strip and decoded values by the codec's definition, centred keys and values."""
    k, v = _keys_and_values()
    out: list[torch.Tensor] = []
    for x, centre in ((k, _centre()), (v, None)):
        encoded = CODECS[name].encode(x, centre)
        out += [encoded.codes, encoded.strip, CODECS[name].decode(encoded, centre)]
    return out


def _tables() -> list[list[int]]:
    """Block ids of each sequence, out of order: what is read must follow the table."""
    return [[4, 0, 2], [3, 1]]


def _written(name: str, backend: Backend) -> LayerCache:
    """A layer's cache that holds both sequences under one codec for keys and values."""
    layout = PackedLayout(
        block_size=_BLOCK, num_kv_heads=_KV_HEADS, k_head_dim=_DIM, v_head_dim=_DIM, k_codec=name,
        v_codec=name,
    )  # fmt: skip
    centre = _centre() if codec_storage(name).is_rotated else None
    cache = LayerCache.allocate(layout, 5, k_centre=centre)
    k, v = _keys_and_values()
    slots = [
        table[position // _BLOCK] * _BLOCK + position % _BLOCK
        for table, length in zip(_tables(), _LENGTHS, strict=True)
        for position in range(length)
    ]
    write_kv(cache, k, v, torch.tensor(slots), backend=backend)
    return cache


def _stored_low(cache: LayerCache) -> list[torch.Tensor]:
    return [low.arena for _, low in sorted(cache.low_planes.items())]


def _gathered(cache: LayerCache, backend: Backend) -> list[torch.Tensor]:
    ids = torch.tensor(_tables()[0], dtype=torch.int32)
    return list(gather_kv(cache, ids, _LENGTHS[0], backend=backend))


def _attended(cache: LayerCache, backend: Backend) -> list[float]:
    """Evenly spread outputs of attention of both sequences' last rows."""
    q = _numbers(4, sum(_ROWS), _HEADS, _DIM)
    width = max(len(table) for table in _tables())
    batch = AttentionBatch(
        query_start=torch.tensor([0, _ROWS[0], sum(_ROWS)], dtype=torch.int32),
        context_len=torch.tensor(_LENGTHS, dtype=torch.int32),
        block_table=torch.tensor([t + [-1] * (width - len(t)) for t in _tables()], dtype=torch.int32),
        slots=torch.full((sum(_ROWS),), -1, dtype=torch.int64),
    )
    out = paged_attention(q, cache, batch, scale=_DIM**-0.5, backend=backend).flatten()
    return [float(x) for x in out[:: -(-len(out) // SAMPLES)].tolist()]


def _rotation() -> str:
    """Digest of the rotation of a unit matrix, at every block length."""
    return _digest(*(hadamard(torch.eye(2**i)) for i in range(3, 9)))


def _digest(*tensors: torch.Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
