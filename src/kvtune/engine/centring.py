"""The centre that rotated key codecs take from every key of a layer: one constant vector per KV head.

Keys of many models sit far from zero in a few channels: an offset the codec spends its range on and softmax
does not see (llama.cpp #21385; Qwen2's key biases). A bias of k_proj is one part of it, known exactly:
carried through RoPE and averaged over positions, fast pairs come to nothing and slow ones stay.
What keys share beside it is measured: the mean key of random tokens. Both are constants of the weights: no
user's text, the same for every request, so prefixes stay shareable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kvtune.config import CacheConfig
from kvtune.engine.arenas import packed_layout
from kvtune.engine.load import LoadedModel
from kvtune.engine.runner import ModelRunner
from kvtune.errors import UsageError
from kvtune.kernels import AttentionBatch, LayerCache, choose_backend, gather_kv
from kvtune.spec import codec_storage
from kvtune.types import RequestId, ScheduledChunk

__all__ = ["centres_sha256", "key_centres"]

BIAS_POSITIONS = 4096
"""Positions a bias is averaged over: where most traffic is. Beyond, a slow pair turns away from its mean."""
_BIAS_SAMPLES = 512
_PROBE_TOKENS = 512
_BLOCK = 16


def key_centres(loaded: LoadedModel, cache: CacheConfig, *, max_model_len: int) -> dict[int, torch.Tensor]:
    """Layer index -> centre float32 [h, Dk] of each layer whose key codec is rotated.

    Follows `cache.key_centring`: "bias", "probe" (mean key of random tokens at the first positions) or
    "auto", the probe with its part of the biases, where all these layers have one, taken over many more.
    UsageError where "bias" is asked for and a layer's keys have no bias of their own. Values are rounded to
    bfloat16, so that machines and thread counts agree on them but for rare ties.
    """
    layers = [
        layer
        for group in loaded.spec.kv_groups()
        for layer in group.layers
        if codec_storage(cache.codecs_of(layer)[0]).is_rotated
    ]
    if not layers or cache.key_centring == "off":
        return {}
    biases = _key_biases(loaded.model)
    missing = [layer for layer in layers if layer not in biases]
    if missing and cache.key_centring == "bias":
        raise UsageError(
            f"key_centring bias: layer {missing[0]} of {loaded.spec.model_type} has no k_proj bias that "
            "reaches the cache as it is; use auto, probe or off"
        )
    probe = _sequence(loaded.vocab_size, min(_PROBE_TOKENS, max_model_len))
    has_bias = cache.key_centring != "probe" and not missing
    bias = _mean_biases(loaded, biases, _scattered(min(BIAS_POSITIONS, max_model_len))) if has_bias else {}
    if cache.key_centring == "bias":
        means = bias
    else:
        means = _mean_keys(loaded, probe)
        if has_bias:
            near = _mean_biases(loaded, biases, probe)
            means = {layer: means[layer] - near[layer] + bias[layer] for layer in layers}
    return {layer: means[layer].bfloat16().float().contiguous() for layer in layers}


def centres_sha256(centres: Mapping[int, torch.Tensor]) -> str:
    """Digest of all centres: bytes written with others cannot be read. "" without any."""
    if not centres:
        return ""
    digest = hashlib.sha256()
    for layer in sorted(centres):
        digest.update(f"{layer}:{list(centres[layer].shape)}:".encode())
        digest.update(centres[layer].numpy().tobytes())
    return digest.hexdigest()


def _key_biases(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Layer index -> k_proj, where it has a bias and no norm stands between it and RoPE."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        index, projection = getattr(module, "layer_idx", None), getattr(module, "k_proj", None)
        if not isinstance(projection, torch.nn.Module) or not isinstance(index, int):
            continue
        if getattr(projection, "bias", None) is not None and not hasattr(module, "k_norm"):
            found[index] = projection
    return found


@contextmanager
def _only_biases(projections: Mapping[int, torch.nn.Module]) -> Generator[None]:
    """While it lasts, k_proj gives its bias whatever comes in."""

    def to_bias(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(module.bias).expand_as(out)

    handles = [projection.register_forward_hook(to_bias) for projection in projections.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_biases(
    loaded: LoadedModel, projections: Mapping[int, torch.nn.Module], chunks: list[ScheduledChunk]
) -> dict[int, torch.Tensor]:
    """Mean over the chunks' positions of what k_proj's bias becomes after RoPE, float32 [h, Dk] per layer."""
    with _only_biases(projections):
        return _mean_keys(loaded, chunks, attends=False)


def _sequence(vocab_size: int, length: int) -> list[ScheduledChunk]:
    """One sequence of random tokens."""
    ids = np.random.default_rng(0).integers(0, vocab_size, length, dtype=np.int32)
    return [_chunk(ids, 0, np.arange(-(-length // _BLOCK), dtype=np.int32))]


def _scattered(num_positions: int) -> list[ScheduledChunk]:
    """One-token sequences, one at a random position of each of equal strata: even steps would be in step
    with a RoPE frequency."""
    count = min(_BIAS_SAMPLES, num_positions)
    edges = np.linspace(0, num_positions, count + 1).astype(np.int64)
    positions = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    chunks: list[ScheduledChunk] = []
    for block, position in enumerate(positions.tolist()):
        table = np.full(position // _BLOCK + 1, -1, dtype=np.int32)
        table[-1] = block
        chunks.append(_chunk(np.zeros(1, dtype=np.int32), position, table))
    return chunks


def _chunk(token_ids: np.ndarray, start: int, table: np.ndarray) -> ScheduledChunk:
    return ScheduledChunk(
        request_id=RequestId("centre"), token_ids=token_ids, start=start, block_tables=(table,), samples=False
    )


def _mean_keys(
    loaded: LoadedModel, chunks: list[ScheduledChunk], *, attends: bool = True
) -> dict[int, torch.Tensor]:
    """Mean key after RoPE over all tokens of the chunks, float32 [h, Dk] per layer, in float32 arenas.

    Without `attends` attention returns zeros: keys that are biases alone do not depend on it.
    """
    groups = loaded.spec.kv_groups()
    num_blocks = 1 + max(int(chunk.block_tables[0].max()) for chunk in chunks)
    caches = {
        layer: LayerCache.allocate(packed_layout(group, "fp32", "fp32", _BLOCK), num_blocks)
        for group in groups
        for layer in group.layers
    }
    runner = ModelRunner(
        loaded.model, groups, caches, block_size=_BLOCK, backend=choose_backend("auto"), pad_rows=_BLOCK
    )
    if not attends:
        for layer in runner.layers.values():
            layer.attend = _attend_to_nothing
    shared = [
        ScheduledChunk(
            request_id=chunk.request_id, token_ids=chunk.token_ids, start=chunk.start,
            block_tables=chunk.block_tables * len(groups), samples=False,
        )
        for chunk in chunks
    ]  # fmt: skip
    runner.forward(shared, np.zeros(0, dtype=np.int64))
    slots = _slots(chunks)
    ids = torch.arange(num_blocks)
    return {
        layer: gather_kv(cache, ids, num_blocks * _BLOCK)[0][slots].double().mean(0).float()
        for layer, cache in caches.items()
    }


def _slots(chunks: list[ScheduledChunk]) -> torch.Tensor:
    positions = [(chunk, chunk.start + i) for chunk in chunks for i in range(chunk.num_tokens)]
    return torch.tensor(
        [int(chunk.block_tables[0][p // _BLOCK]) * _BLOCK + p % _BLOCK for chunk, p in positions]
    )


def _attend_to_nothing(q: torch.Tensor, cache: LayerCache, batch: AttentionBatch, **_: Any) -> torch.Tensor:
    return q.new_zeros(*q.shape[:2], cache.layout.v_head_dim)
