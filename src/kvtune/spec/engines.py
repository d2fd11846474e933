"""How each engine stores and pages KV: storage formats by `--kv-dtype` name, and allocator bytes.

vLLM's rules are those of its 0.32 `v1/core/kv_cache_utils.py` (groups of equal layer count, one page size)
and `platforms/interface.py` (block size of hybrids). SGLang and TensorRT-LLM round to whole blocks per
layer group; what they pad beyond that is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kvtune.errors import UsageError
from kvtune.spec.layout import BLOCK_ALIGN, CODEC_STORAGE, CodecStorage, KVGroup, LayerKind
from kvtune.spec.model import LayerSpec, ModelSpec
from kvtune.spec.sizing import (
    KVFormat,
    blocks_per_sequence,
    first_block_bytes,
    group_block_bytes,
    layer_token_bytes,
)

__all__ = ["ENGINES", "Paging", "allocator_bytes", "kv_format"]


def _both(storage: CodecStorage) -> KVFormat:
    return KVFormat(k=storage, v=storage)


_BF16 = CODEC_STORAGE["bf16"]
_FP8 = CodecStorage("fp8", 8, 0)  # one scale per tensor
_NVFP4 = CodecStorage("nvfp4", 4, 0, scale_group=16)
_FP8_DS_MLA = CodecStorage("fp8_ds_mla", 8, 0, scale_group=128, scale_bytes=4, rope_bits=16)
_WIDE: Final = {name: _both(CODEC_STORAGE[name]) for name in ("bf16", "fp16", "fp32")}

_FORMATS: Final[Mapping[str, Mapping[str, KVFormat]]] = {
    "kvtune": {
        **_WIDE,
        "int8": KVFormat.of("int8"),
        "int4": KVFormat.of("int4"),
        "k8v4": KVFormat.of("int8", "int4"),
    },
    "vllm": {
        **_WIDE,
        "fp8": _both(_FP8),
        # an fp32 scale per token and head beside the codes of K and of V
        "int8": _both(CodecStorage("int8_per_token_head", 8, 2)),
        "int4": _both(CodecStorage("int4_per_token_head", 4, 2)),
        "k8v4": KVFormat(k=_FP8, v=CodecStorage("turboquant_v4", 4, 2)),
        "nvfp4": _both(_NVFP4),
    },
    "sglang": {**_WIDE, "fp8": _both(_FP8)},
    "trtllm": {
        **_WIDE,
        "fp8": _both(_FP8),
        "int8": _both(CodecStorage("int8", 8, 0)),
        "nvfp4": _both(_NVFP4),
    },
}
_MLA_DTYPES: Final = frozenset({"bf16", "fp16", "fp32", "fp8"})
"""What other engines store an MLA latent in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """Allocator settings. `chunk`: tokens of one sequence in one step at most (max_num_batched_tokens)."""

    block_size: int = 16
    tp: int = 1
    chunk: int = 8192
    first_block_codec: str | None = None
    """Our engine only: block 0 of each sequence is kept in this codec."""


def kv_format(engine: str, kv_dtype: str, spec: ModelSpec) -> KVFormat:
    """Storage that `--kv-dtype kv_dtype` means in an engine; `auto` is the checkpoint's own type.

    UsageError where that engine has no such KV cache.
    """
    if engine not in _FORMATS:
        raise UsageError(f"unknown engine {engine!r}; known: {', '.join(_FORMATS)}")
    has_index = any(layer.index_bytes for layer in spec.layers)
    if kv_dtype == "auto":  # vLLM serves DeepSeek-V3.2 with an fp8 cache unless told otherwise
        kv_dtype = "fp8" if engine == "vllm" and has_index else spec.dtype
    known = [name for name in _FORMATS[engine] if _can_size(engine, name, spec)]
    if kv_dtype not in known:
        raise UsageError(
            f"engine {engine} has no {kv_dtype!r} KV cache that can be sized for {spec.model_type}; "
            f"it has: auto, {', '.join(known)}"
        )
    if engine == "vllm" and kv_dtype == "fp8" and has_index:
        return _both(_FP8_DS_MLA)
    return _FORMATS[engine][kv_dtype]


def _can_size(engine: str, kv_dtype: str, spec: ModelSpec) -> bool:
    if engine == "kvtune":
        return True
    if any(layer.kind is LayerKind.MLA for layer in spec.layers):
        return kv_dtype in _MLA_DTYPES
    # vLLM keeps the first and last two layers of models without recurrent layers in 16 bit under k8v4,
    # in pages padded to a shared size we do not model.
    return kv_dtype != "k8v4" or any(layer.state_bytes for layer in spec.layers)


def allocator_bytes(spec: ModelSpec, num_tokens: int, kv: KVFormat, engine: str, paging: Paging) -> int:
    """Bytes an engine's pools hold for one sequence at its peak, summed over the tensor-parallel ranks.

    Includes block rounding, scales, the slack of windows, page padding, replicated heads and recurrent state.
    UsageError for impossible settings.
    """
    for name, value in (("block size", paging.block_size), ("tp", paging.tp), ("context", num_tokens)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, found {value}")
    return paging.tp * ENGINES[engine](spec, num_tokens, kv, paging)


def _rank_group(group: KVGroup, tp: int) -> KVGroup:
    return dataclasses.replace(group, num_kv_heads=-(-group.num_kv_heads // tp))


def _rank_state_bytes(layer: LayerSpec, tp: int) -> int:
    return -(-layer.state_bytes // tp)


def _kvtune(spec: ModelSpec, num_tokens: int, kv: KVFormat, paging: Paging) -> int:
    """Packed blocks, one table per group; state arrays start on a cache line."""
    total = sum(-(-_rank_state_bytes(layer, paging.tp) // BLOCK_ALIGN) * BLOCK_ALIGN for layer in spec.layers)
    for whole in spec.kv_groups():
        group = _rank_group(whole, paging.tp)
        blocks = blocks_per_sequence(group, num_tokens, chunk=paging.chunk, block_size=paging.block_size)
        body = group_block_bytes(group, kv.names, paging.block_size)
        total += blocks * body
        if paging.first_block_codec is not None:
            total += first_block_bytes(group, paging.block_size, paging.first_block_codec) - body
    return total + _index_bytes(spec, num_tokens, paging)


def _index_bytes(spec: ModelSpec, num_tokens: int, paging: Paging) -> int:
    """DeepSeek-V3.2's index beside the latent blocks."""
    tokens = -(-num_tokens // paging.block_size) * paging.block_size
    return tokens * sum(layer.index_bytes for layer in spec.layers)


def _grouped(spec: ModelSpec, num_tokens: int, kv: KVFormat, paging: Paging) -> int:
    """Whole blocks per layer group, nothing else."""
    total = sum(_rank_state_bytes(layer, paging.tp) for layer in spec.layers)
    for group in spec.kv_groups():
        blocks = blocks_per_sequence(group, num_tokens, chunk=paging.chunk, block_size=paging.block_size)
        per_token = sum(layer_token_bytes(spec.layers[i], kv, tp=paging.tp) for i in group.layers)
        total += blocks * paging.block_size * per_token
    return total


def _vllm(spec: ModelSpec, num_tokens: int, kv: KVFormat, paging: Paging) -> int:
    """vLLM's hybrid KV cache manager on one rank (see `vllm_pages`)."""
    pages = vllm_pages(spec, num_tokens, kv, paging)
    if len({bucket.kind for bucket in pages}) <= 1:
        return sum(bucket.num_layers * bucket.blocks * bucket.page_bytes for bucket in pages)
    counts = [bucket.num_layers for bucket in pages]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    page = max(bucket.page_bytes for bucket in pages)
    return sum(-(-bucket.num_layers // size) * size * bucket.blocks * page for bucket in pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmBucket:
    """Layers of one kind and geometry in vLLM: block size in tokens, page bytes, blocks per sequence."""

    kind: LayerKind
    num_layers: int
    block_size: int
    page_bytes: int
    blocks: int


def vllm_pages(spec: ModelSpec, num_tokens: int, kv: KVFormat, paging: Paging) -> list[VllmBucket]:
    """vLLM's pages for one sequence on one rank.

    Hybrids: the attention block grows until its page holds a recurrent layer's whole state
    (B' = B ceil(state / (B t)), t bytes per token and layer), which takes one page. Windows: pages of
    smaller layers grow in tokens where they divide the largest page, else they are padded to it.
    """
    states = [_rank_state_bytes(layer, paging.tp) for layer in spec.layers if layer.state_bytes]
    groups = spec.kv_groups()
    per_token = [layer_token_bytes(spec.layers[g.layers[0]], kv, tp=paging.tp) for g in groups]
    block_size = paging.block_size
    if states and groups:
        block_size *= -(-max(states) // (block_size * per_token[0]))
    largest = max([block_size * size for size in per_token], default=max(states, default=0))
    buckets: list[VllmBucket] = []
    one_kind = len({g.kind for g in groups}) == 1
    for group, size in zip(groups, per_token, strict=True):
        page = block_size * size
        grows = not one_kind and largest % page == 0
        tokens = block_size * (largest // page) if grows else block_size
        buckets.append(
            VllmBucket(
                kind=group.kind,
                num_layers=len(group.layers),
                block_size=tokens,
                page_bytes=page if one_kind else largest,
                blocks=_vllm_blocks(group, num_tokens, paging.chunk, tokens),
            )
        )
    if states:
        buckets.append(
            VllmBucket(
                kind=LayerKind.LINEAR, num_layers=len(states), block_size=block_size,
                page_bytes=largest, blocks=1,
            )
        )  # fmt: skip
    return buckets


def _vllm_blocks(group: KVGroup, num_tokens: int, chunk: int, block_size: int) -> int:
    if group.kind is LayerKind.CHUNKED and group.window is not None:  # chunks start on block boundaries
        return -(-min(num_tokens, group.window + chunk) // block_size)
    return blocks_per_sequence(group, num_tokens, chunk=chunk, block_size=block_size)


ENGINES: Final[Mapping[str, Callable[[ModelSpec, int, KVFormat, Paging], int]]] = {
    "kvtune": _kvtune,
    "vllm": _vllm,
    "sglang": _grouped,
    "trtllm": _grouped,
}
"""Engine -> allocator bytes of one sequence on one tensor-parallel rank."""
