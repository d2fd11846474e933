"""The plan of a model: bytes per token and sequence, bytes at contexts, what GPUs hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtune.config import SchedulerConfig, format_bytes
from kvtune.errors import UsageError
from kvtune.plan.hardware import GPUS, find_gpu
from kvtune.plan.models import ModelSource
from kvtune.plan.weights import dense_weights_bytes
from kvtune.spec import (
    KVFormat,
    LayerKind,
    LayerSpec,
    ModelSpec,
    Paging,
    allocator_bytes,
    fixed_bytes_per_sequence,
    growth_bytes_per_token,
    kv_format,
    layer_token_bytes,
    logical_bytes,
)

__all__ = ["KV_DTYPES", "PlanRequest", "contexts_from_text", "plan_model"]

SCHEMA_VERSION = 1
KV_DTYPES = ("auto", "bf16", "fp16", "fp32", "fp8", "int8", "int4", "k8v4", "nvfp4")
MEMORY_FRACTION = 0.9
OVERHEAD_BYTES = 2 << 30
"""Per GPU, beside weights and KV: context, activations, graphs. A round figure, named in every plan."""
MAX_CONTEXT = 1 << 27
MAX_TP = 1024
MAX_BLOCK_SIZE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan for. `gpu` None: every listed GPU. UsageError for values outside their range."""

    contexts: Sequence[int] = (8192, 131072)
    kv_dtype: str = "auto"
    block_size: int = 16
    tp: int = 1
    engine: str = "kvtune"
    gpu: str | None = None
    weights_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(f"unknown --kv-dtype {self.kv_dtype!r}; known: {', '.join(KV_DTYPES)}")
        limits = [("--context", n, MAX_CONTEXT) for n in self.contexts]
        limits += [("--tp", self.tp, MAX_TP), ("--block-size", self.block_size, MAX_BLOCK_SIZE)]
        for name, value, high in limits:
            if not 1 <= value <= high:
                raise UsageError(f"{name} must lie between 1 and {high}, found {value}")
        if not self.contexts:
            raise UsageError("--context needs at least one number of tokens")
        if self.weights_bytes is not None and self.weights_bytes < 0:
            raise UsageError(f"--weights-bytes must not be negative, found {self.weights_bytes}")


def plan_model(source: ModelSource, request: PlanRequest) -> dict[str, Any]:
    """The plan as one JSON-ready dict (keys: docs of `kvtune plan`).

    `logical_bytes` are elements and scales of one copy; `allocator_bytes` what the engine's pools hold for
    one sequence over all `tp` ranks. Raises UnsupportedModelError for models and UsageError for settings
    that cannot be sized.
    """
    spec = ModelSpec.from_config(source.config)
    kv = kv_format(request.engine, request.kv_dtype, spec)
    paging = Paging(block_size=request.block_size, tp=request.tp, chunk=_chunk(request.engine))

    def size(num_tokens: int) -> int:
        return allocator_bytes(spec, num_tokens, kv, request.engine, paging)

    weights, basis = _weights(source, spec, request)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": source.name,
        "model_type": spec.model_type,
        "max_model_len": spec.max_model_len,
        "engine": request.engine,
        "kv_dtype": request.kv_dtype,
        "block_size": request.block_size,
        "tp": request.tp,
        "weights_bytes": weights,
        "kv": {
            "k_storage": kv.k.name,
            "v_storage": kv.v.name,
            "growth_bytes_per_token": growth_bytes_per_token(spec, kv),
            "fixed_bytes_per_sequence": fixed_bytes_per_sequence(spec, kv),
            "layers": _layer_rows(spec, kv),
        },
        "at_context": {
            str(n): {"logical_bytes": logical_bytes(spec, n, kv), "allocator_bytes": size(n)}
            for n in request.contexts
        },
        "capacity": _capacity(request, weights, size),
        "assumptions": _assumptions(spec, request, paging, weights, basis),
    }


def _chunk(engine: str) -> int:
    """Tokens of one sequence in one step at most, by default."""
    return SchedulerConfig().max_num_batched_tokens if engine == "kvtune" else Paging().chunk


def _layer_rows(spec: ModelSpec, kv: KVFormat) -> list[dict[str, Any]]:
    """Layers alike in kind, geometry and bytes, counted."""

    def key(layer: LayerSpec) -> tuple[Any, ...]:
        return (*layer.geometry, layer_token_bytes(layer, kv), layer.state_bytes)

    counts: dict[tuple[Any, ...], int] = {}
    for layer in spec.layers:
        counts[key(layer)] = counts.get(key(layer), 0) + 1
    names = (
        "kind", "num_kv_heads", "k_head_dim", "v_head_dim", "window", "bytes_per_token", "state_bytes",
    )  # fmt: skip
    return [{**dict(zip(names, row, strict=True)), "count": count} for row, count in counts.items()]


def _weights(source: ModelSource, spec: ModelSpec, request: PlanRequest) -> tuple[int | None, str]:
    if request.weights_bytes is not None:
        return request.weights_bytes, "as given"
    if source.weights_bytes is not None:
        return source.weights_bytes, source.weights_basis
    return dense_weights_bytes(source.config, spec), "counted from the config's sizes"


def _capacity(request: PlanRequest, weights: int | None, size: Callable[[int], int]) -> list[dict[str, Any]]:
    """What `tp` GPUs of each kind hold; empty where the weights' size is unknown."""
    gpus = list(GPUS.values()) if request.gpu is None else [find_gpu(request.gpu)]
    if weights is None:
        return []
    rows: list[dict[str, Any]] = []
    for gpu in gpus:
        budget = _kv_budget(gpu.memory_bytes, weights, request)
        fits = {str(n): budget // max(1, size(n)) for n in request.contexts}
        rows.append(
            {
                "gpu": gpu.name,
                "num_gpus": request.tp,
                "kv_budget_bytes": budget,
                "max_tokens": _longest(size, budget),
                "max_concurrency": fits,
            }
        )
    return rows


def _kv_budget(memory: int, weights: int, request: PlanRequest) -> int:
    """KV bytes over all ranks. TensorRT-LLM takes its fraction of what is left, the others of the whole."""
    other = weights + OVERHEAD_BYTES * request.tp
    total = memory * request.tp
    if request.engine == "trtllm":
        return max(0, int((total - other) * MEMORY_FRACTION))
    return max(0, int(total * MEMORY_FRACTION) - other)


def _longest(size: Callable[[int], int], budget: int) -> int | None:
    """The longest single sequence a budget holds; None where bytes stop growing before MAX_CONTEXT does."""
    if size(MAX_CONTEXT) <= budget:
        return None
    low, high = 0, MAX_CONTEXT  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low


def _assumptions(
    spec: ModelSpec, request: PlanRequest, paging: Paging, weights: int | None, basis: str
) -> list[str]:
    notes = [
        "logical: elements and scales of one copy; allocator: what the engine's pools hold for one sequence "
        f"at its peak, summed over {request.tp} tensor-parallel rank(s)"
    ]
    if any(layer.window is not None for layer in spec.layers):
        notes.append(
            f"windows: a prefill step of {paging.chunk} tokens is held on top of the window at the peak; "
            "capacity counts every sequence at its peak"
        )
    if any(layer.state_bytes for layer in spec.layers):
        notes.append("recurrent state: one copy per sequence, no state kept for prefix reuse")
    if request.engine in ("sglang", "trtllm"):
        notes.append(f"{request.engine}: whole blocks per layer group; further padding is not modelled")
    runs = {LayerKind.FULL, LayerKind.SLIDING}
    if request.engine == "kvtune" and not {layer.kind for layer in spec.layers} <= runs:
        notes.append("sized only: kvtune's own engine runs full and sliding attention layers")
    if spec.max_model_len is not None and max(request.contexts) > spec.max_model_len:
        notes.append(
            f"contexts beyond the model's own limit of {spec.max_model_len} tokens are sized as asked"
        )
    if weights is None:
        notes.append("no capacity: the size of the weights is unknown; pass --weights-bytes")
    else:
        notes.append(
            f"capacity: {MEMORY_FRACTION:.0%} of GPU memory, weights {format_bytes(weights)} ({basis}), "
            f"{format_bytes(OVERHEAD_BYTES)} per GPU for everything else"
        )
    return notes


def contexts_from_text(text: str) -> tuple[int, ...]:
    """`"8192,131072"` -> (8192, 131072), repeats dropped. UsageError on anything but whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 12 for part in parts):
        raise UsageError(f"--context expects token counts such as 8192,131072, found {text[:80]!r}")
    return tuple(sorted({int(part) for part in parts}))
