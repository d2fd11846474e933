"""What a configuration is: the fingerprint under which blocks are hashed, and its bytes per token."""

from __future__ import annotations

import hashlib
import json

from kvtune.config import CacheConfig, SchedulerConfig
from kvtune.engine.arenas import FIRST_BLOCK_CODEC
from kvtune.engine.load import LoadedModel
from kvtune.recipe import codec_constants_sha256
from kvtune.spec import KVFormat, ModelSpec, Paging, allocator_bytes, codec_storage, side_bytes

__all__ = ["READ_CONTRACT", "cache_fingerprint", "kv_bytes_per_token", "kv_side_bytes_per_token"]

READ_CONTRACT = "T0"
"""Every token is encoded when it is written, every read decodes: a hit equals a miss."""


def cache_fingerprint(loaded: LoadedModel, cache: CacheConfig, centres_sha256: str = "") -> bytes:
    """SHA-256 over everything the bytes of a block depend on besides its tokens.

    Weights, config, RoPE regime, compute dtype, codec constants, codecs per layer, centres of rotated keys,
    16-bit first block, read contract. The block size is included: it decides where blocks end, so that
    stored blocks are never compared across sizes. The kernel path is not: all backends write the same bytes.
    """
    facts = {
        "weights": loaded.weights_sha256,
        "config": loaded.config_sha256,
        "rope_regime": loaded.rope_regime,
        "dtype": str(loaded.dtype),
        "codec_constants": codec_constants_sha256(),
        "layer_codecs": [list(cache.codecs_of(layer.index)) for layer in loaded.spec.layers],
        "key_centres": centres_sha256,
        "first_block": FIRST_BLOCK_CODEC if cache.first_block_16bit else None,
        "block_size": cache.block_size,
        "read_contract": READ_CONTRACT,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def kv_bytes_per_token(
    spec: ModelSpec, cache: CacheConfig, scheduler: SchedulerConfig, *, context: int
) -> float:
    """Allocator bytes of one sequence of `context` tokens over `context`: blocks, scales, slack."""
    return allocator_bytes(spec, context, *_sized(cache, scheduler)) / context


def kv_side_bytes_per_token(
    spec: ModelSpec, cache: CacheConfig, scheduler: SchedulerConfig, *, context: int
) -> dict[int, tuple[float, float]]:
    """The same by layer and side: (keys, values) with their scales; block padding is left out."""
    kv, _, paging = _sized(cache, scheduler)
    sides = side_bytes(
        spec, context, kv, block_size=paging.block_size, chunk=paging.chunk,
        first_block_codec=paging.first_block_codec,
    )  # fmt: skip
    return {layer: (k / context, v / context) for layer, (k, v) in sides.items()}


def _sized(cache: CacheConfig, scheduler: SchedulerConfig) -> tuple[KVFormat, str, Paging]:
    overrides = {layer: (codec_storage(k), codec_storage(v)) for layer, (k, v) in cache.layer_codecs.items()}
    kv = KVFormat(k=codec_storage(cache.k_codec), v=codec_storage(cache.v_codec), overrides=overrides)
    paging = Paging(
        block_size=cache.block_size,
        chunk=scheduler.chunk,
        first_block_codec=FIRST_BLOCK_CODEC if cache.first_block_16bit else None,
    )
    return kv, "kvtune", paging
