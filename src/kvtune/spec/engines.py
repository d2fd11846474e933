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
    first_block_bytes,
    group_block_bytes,
    layer_state_bytes,
    layer_token_bytes,
)

__all__ = [
    "ENGINES",
    "AllocatorTerm",
    "Paging",
    "allocator_bytes",
    "allocator_terms",
    "kv_format",
    "kv_formats",
]


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
        "fp8": KVFormat.of("fp8"),
        "int4_rh": KVFormat.of("int4_rh"),
        "n8_rh": KVFormat.of("n8_rh"),
        "n4_rh": KVFormat.of("n4_rh"),
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
    """Storage that `--kv-dtype kv_dtype` means in an engine; `auto` is the checkpoint's own type. vLLM keeps
    recurrent states in the checkpoint's type too, unless the config or the model says otherwise.

    UsageError where that engine has no such KV cache.
    """
    if engine not in _FORMATS:
        raise UsageError(f"unknown engine {engine!r}; known: {', '.join(_FORMATS)}")
    has_index = any(layer.index_bytes for layer in spec.layers)
    if kv_dtype == "auto":  # vLLM serves DeepSeek-V3.2 with an fp8 cache unless told otherwise
        kv_dtype = "fp8" if engine == "vllm" and has_index else spec.dtype
    known = kv_formats(engine, spec)
    if kv_dtype not in known:
        raise UsageError(
            f"engine {engine} has no {kv_dtype!r} KV cache that can be sized for {spec.model_type}; "
            f"it has: auto, {', '.join(known)}"
        )
    if engine == "vllm" and kv_dtype == "fp8" and has_index:
        return _both(_FP8_DS_MLA)
    known_format = _FORMATS[engine][kv_dtype]
    if engine != "vllm":
        return known_format
    return dataclasses.replace(known_format, state_element_bytes=4 if spec.dtype == "fp32" else 2)


def kv_formats(engine: str, spec: ModelSpec) -> tuple[str, ...]:
    """Names of `--kv-dtype` that an engine has and that can be sized for a model, `auto` aside."""
    return tuple(name for name in _FORMATS[engine] if _can_size(engine, name, spec))


def _can_size(engine: str, kv_dtype: str, spec: ModelSpec) -> bool:
    if engine == "kvtune":
        return True
    if any(layer.kind is LayerKind.MLA for layer in spec.layers):
        return kv_dtype in _MLA_DTYPES
    # vLLM keeps the first and last two layers of models without recurrent layers in 16 bit under k8v4,
    # in pages padded to a shared size we do not model.
    return kv_dtype != "k8v4" or any(layer.state_bytes for layer in spec.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorTerm:
    """One layer group of one tensor-parallel rank: blocks(n) = min(ceil(n / block_size), max_blocks).

    `num_layers` layers store KV, `padded_layers` are allocated for; `token_bytes` of the stored layers per
    token; `block_bytes` of one block id over the padded layers. `held_beyond_window`: tokens a step may hold
    on top of the window. `state_bytes` is what the group's recurrent layers need per sequence and
    `fixed_bytes` what is allocated for them.
    """

    kind: LayerKind
    num_layers: int
    padded_layers: int
    block_size: int = 1
    block_bytes: int = 0
    token_bytes: int = 0
    window: int | None = None
    held_beyond_window: int = 0
    max_blocks: int | None = None
    state_bytes: int = 0
    fixed_bytes: int = 0

    def kept(self, num_tokens: int) -> int:
        """Tokens that later tokens can still see."""
        return num_tokens if self.window is None else min(num_tokens, self.window)

    def held(self, num_tokens: int) -> int:
        """Tokens in the pool at the peak, before they are rounded to blocks."""
        if self.window is None:
            return num_tokens
        return min(num_tokens, self.window + self.held_beyond_window)

    def blocks(self, num_tokens: int) -> int:
        """Blocks of one sequence at its peak."""
        whole = -(-num_tokens // self.block_size) if self.block_bytes else 0
        return whole if self.max_blocks is None else min(whole, self.max_blocks)

    def bytes(self, num_tokens: int) -> int:
        """Bytes the pool holds for one sequence of `num_tokens` tokens on one rank."""
        return self.blocks(num_tokens) * self.block_bytes + self.fixed_bytes


def allocator_terms(spec: ModelSpec, kv: KVFormat, engine: str, paging: Paging) -> tuple[AllocatorTerm, ...]:
    """What an engine's pools hold for one sequence on one rank, per layer group.

    UsageError for impossible settings.
    """
    for name, value in (("block size", paging.block_size), ("tp", paging.tp), ("chunk", paging.chunk)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, found {value}")
    return ENGINES[engine](spec, kv, paging)


def allocator_bytes(spec: ModelSpec, num_tokens: int, kv: KVFormat, engine: str, paging: Paging) -> int:
    """Bytes an engine's pools hold for one sequence at its peak, summed over the tensor-parallel ranks.

    Includes block rounding, scales, the slack of windows, page padding, replicated heads and recurrent state.
    UsageError for impossible settings.
    """
    if num_tokens < 1:
        raise UsageError(f"context must be at least 1, found {num_tokens}")
    terms = allocator_terms(spec, kv, engine, paging)
    return paging.tp * sum(term.bytes(num_tokens) for term in terms)


def _rank_group(group: KVGroup, tp: int) -> KVGroup:
    return dataclasses.replace(group, num_kv_heads=-(-group.num_kv_heads // tp))


def _rank_state_bytes(layer: LayerSpec, kv: KVFormat, tp: int) -> int:
    return -(-layer_state_bytes(layer, kv) // tp)


def _token_bytes(spec: ModelSpec, group: KVGroup, kv: KVFormat, tp: int) -> int:
    return sum(layer_token_bytes(spec.layers[i], kv, tp=tp) for i in group.layers)


def _window_blocks(group: KVGroup, chunk: int, block_size: int) -> int | None:
    """Most blocks a window ever holds: what the first query of a step still sees, the step, and one more
    because the window need not start on a block boundary (vLLM's admission bound for sliding layers)."""
    return None if group.window is None else -(-(group.window - 1 + chunk) // block_size) + 1


def _paged(spec: ModelSpec, group: KVGroup, kv: KVFormat, paging: Paging, block_bytes: int) -> AllocatorTerm:
    """The term of one group that rounds to whole blocks and pads no layers."""
    return AllocatorTerm(
        kind=group.kind,
        num_layers=len(group.layers),
        padded_layers=len(group.layers),
        block_size=paging.block_size,
        block_bytes=block_bytes,
        token_bytes=_token_bytes(spec, group, kv, paging.tp),
        window=group.window,
        held_beyond_window=paging.chunk - 1,
        max_blocks=_window_blocks(group, paging.chunk, paging.block_size),
    )


def _state_terms(spec: ModelSpec, kv: KVFormat, tp: int, align: int) -> list[AllocatorTerm]:
    """Recurrent layers whose state lies in arrays of its own, by kind."""
    terms: list[AllocatorTerm] = []
    for kind in dict.fromkeys(layer.state_kind for layer in spec.layers if layer.state_bytes):
        sizes = [_rank_state_bytes(layer, kv, tp) for layer in spec.layers if layer.state_kind is kind]
        allocated = sum(-(-size // align) * align for size in sizes)
        terms.append(
            AllocatorTerm(
                kind=kind, num_layers=len(sizes), padded_layers=len(sizes),
                state_bytes=sum(sizes), fixed_bytes=allocated,
            )
        )  # fmt: skip
    return terms


def _kvtune(spec: ModelSpec, kv: KVFormat, paging: Paging) -> tuple[AllocatorTerm, ...]:
    """Packed blocks, one table per group; state arrays start on a cache line."""
    terms = _state_terms(spec, kv, paging.tp, BLOCK_ALIGN)
    for whole in spec.kv_groups():
        group = _rank_group(whole, paging.tp)
        body = group_block_bytes(group, kv.names, paging.block_size)
        index = paging.block_size * sum(spec.layers[i].index_bytes for i in group.layers)
        term = _paged(spec, group, kv, paging, body + index)  # DeepSeek-V3.2's index lies beside the latent
        if paging.first_block_codec is not None:
            first = first_block_bytes(group, paging.block_size, paging.first_block_codec)
            term = dataclasses.replace(term, fixed_bytes=first - body)
        terms.append(term)
    return tuple(terms)


def _grouped(spec: ModelSpec, kv: KVFormat, paging: Paging) -> tuple[AllocatorTerm, ...]:
    """Whole blocks per layer group, nothing else."""
    terms = _state_terms(spec, kv, paging.tp, 1)
    for group in spec.kv_groups():
        per_token = _token_bytes(spec, group, kv, paging.tp)
        terms.append(_paged(spec, group, kv, paging, paging.block_size * per_token))
    return tuple(terms)


def _vllm(spec: ModelSpec, kv: KVFormat, paging: Paging) -> tuple[AllocatorTerm, ...]:
    """vLLM's hybrid KV cache manager on one rank (see `vllm_pages`): groups of equally many layers."""
    pages = vllm_pages(spec, 1, kv, paging)
    several = len({bucket.kind for bucket in pages}) > 1
    counts = [bucket.num_layers for bucket in pages]
    size = 1
    if several:
        size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = spec.kv_groups()
    terms: list[AllocatorTerm] = []
    for index, bucket in enumerate(pages):
        padded = -(-bucket.num_layers // size) * size
        if index < len(groups):
            at = dataclasses.replace(paging, block_size=bucket.block_size)
            block_bytes = padded * bucket.page_bytes
            if not several:  # one group whose layers may differ: an index in some of them only (GLM-5.2)
                block_bytes = bucket.block_size * _token_bytes(spec, groups[index], kv, paging.tp)
            term = _paged(spec, groups[index], kv, at, block_bytes)
            terms.append(
                dataclasses.replace(
                    term, padded_layers=padded, max_blocks=_vllm_window_blocks(groups[index], at)
                )
            )
            continue
        states = sum(_rank_state_bytes(layer, kv, paging.tp) for layer in spec.layers)
        terms.append(
            AllocatorTerm(
                kind=bucket.kind, num_layers=bucket.num_layers, padded_layers=padded,
                state_bytes=states, fixed_bytes=padded * bucket.page_bytes,
            )
        )  # fmt: skip
    return tuple(terms)


def _vllm_window_blocks(group: KVGroup, paging: Paging) -> int | None:
    if group.kind is LayerKind.CHUNKED and group.window is not None:  # chunks start on block boundaries
        return -(-(group.window + paging.chunk) // paging.block_size)
    return _window_blocks(group, paging.chunk, paging.block_size)


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
    states = [_rank_state_bytes(layer, kv, paging.tp) for layer in spec.layers if layer.state_bytes]
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
                blocks=_vllm_blocks(group, num_tokens, dataclasses.replace(paging, block_size=tokens)),
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


def _vllm_blocks(group: KVGroup, num_tokens: int, paging: Paging) -> int:
    whole, most = -(-num_tokens // paging.block_size), _vllm_window_blocks(group, paging)
    return whole if most is None else min(whole, most)


ENGINES: Final[Mapping[str, Callable[[ModelSpec, KVFormat, Paging], tuple[AllocatorTerm, ...]]]] = {
    "kvtune": _kvtune,
    "vllm": _vllm,
    "sglang": _grouped,
    "trtllm": _grouped,
}
"""Engine -> what its pools hold for one sequence on one tensor-parallel rank."""
