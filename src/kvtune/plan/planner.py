"""The plan of a model: bytes per token and sequence, bytes at contexts, what cards and tiers hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtune.config import format_bytes
from kvtune.errors import UsageError
from kvtune.plan.budget import OVERHEAD_BYTES
from kvtune.plan.capacity import CapacityRow, Pick, capacity_row, given_budget_row, pick_cards
from kvtune.plan.explain import explain
from kvtune.plan.findings import Finding, find_problems
from kvtune.plan.hardware import GPU, GPUS, find_gpu
from kvtune.plan.models import ModelSource
from kvtune.plan.recompute import prefill_model
from kvtune.plan.request import PlanRequest
from kvtune.plan.tiers import TierPlan, TierRequest, plan_tier
from kvtune.plan.weights import dense_weights_bytes
from kvtune.spec import (
    AllocatorModel,
    Breakdown,
    KVFormat,
    LayerSpec,
    ModelSpec,
    Paging,
    check_tensor_parallel,
    fixed_bytes_per_sequence,
    growth_bytes_per_token,
    kv_format,
    layer_state_bytes,
    layer_token_bytes,
    valid_tensor_parallel,
)

__all__ = ["LayerRow", "Plan", "Sizing", "plan_model", "size_model"]

SCHEMA_VERSION = 1
_MOST_CARDS = 16
"""The picker looks no further: beyond, a model is split over machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """Layers alike in kind, geometry and bytes (one copy, one rank), counted."""

    kind: str
    count: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    window: int | None
    bytes_per_token: int
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All numbers of a plan. `at_context`: one breakdown per asked context. `prefill_basis`: what the time
    of computing again rests on, None where no tier was asked for or it is not known."""

    model: str
    model_type: str
    max_model_len: int | None
    engine: str
    kv_dtype: str
    block_size: int
    effective_block_size: int
    tp: int
    weights_bytes: int | None
    k_storage: str
    v_storage: str
    growth_bytes_per_token: int
    fixed_bytes_per_sequence: int
    layers: tuple[LayerRow, ...]
    at_context: tuple[Breakdown, ...]
    capacity: tuple[CapacityRow, ...] = ()
    picks: tuple[Pick, ...] = ()
    tiers: tuple[TierPlan, ...] = ()
    prefill_basis: str | None = None
    findings: tuple[Finding, ...] = ()
    assumptions: tuple[str, ...] = ()
    formulas: tuple[str, ...] = field(default=(), repr=False)

    def to_dict(self, *, explain: bool = False) -> dict[str, Any]:
        """The JSON object of `kvtune plan --json`; `explain` adds the formulas under that name."""
        own = dataclasses.asdict(self)
        formulas = own.pop("formulas")
        if explain:
            own["explain"] = list(formulas)
        kv_names = (
            "k_storage", "v_storage", "growth_bytes_per_token", "fixed_bytes_per_sequence", "layers",
        )  # fmt: skip
        kv = {name: own.pop(name) for name in kv_names}
        own["at_context"] = {str(row.pop("num_tokens")): row for row in own["at_context"]}
        return {"schema_version": SCHEMA_VERSION, "model": own.pop("model"), "kv": kv, **own}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """A model under one engine's settings: what every part of a plan computes from."""

    spec: ModelSpec
    kv: KVFormat
    model: AllocatorModel


def size_model(source: ModelSource, request: PlanRequest) -> Sizing:
    """Raises UnsupportedModelError for models and UsageError for settings that cannot be sized."""
    spec = ModelSpec.from_config(source.config)
    check_tensor_parallel(spec, request.tp)
    kv = kv_format(request.engine, request.kv_dtype, spec)
    return Sizing(spec=spec, kv=kv, model=_allocator(spec, kv, request, request.tp))


def _allocator(spec: ModelSpec, kv: KVFormat, request: PlanRequest, tp: int) -> AllocatorModel:
    paging = Paging(block_size=request.block_tokens, tp=tp, chunk=request.in_flight)
    return AllocatorModel(spec, kv, request.engine, paging)


def plan_model(
    source: ModelSource,
    request: PlanRequest,
    *,
    prices: Sequence[tuple[GPU, float]] | None = None,
    tiers: Sequence[TierRequest] = (),
    prefill_rate: float | None = None,
) -> Plan:
    """Size `source` as `request` says.

    `logical_bytes` are elements and scales of one copy; `allocator_bytes` what the engine's pools hold for
    one sequence over all `tp` ranks. With `prices` or `request.concurrency`, cards are picked as well.
    `prefill_rate` in tokens/s prices recomputing, else the card's throughput does. Raises
    UnsupportedModelError for models and UsageError for settings that cannot be sized.
    """
    sizing = size_model(source, request)
    spec, kv, model = sizing.spec, sizing.kv, sizing.model
    weights, basis = _weights(source, spec, request)
    gpu = _one_gpu(request)
    capacity = _capacity(gpu, model, weights, request, spec.max_model_len)
    prefill = prefill_model(source, spec, gpu, request.tp, prefill_rate) if tiers else None
    return Plan(
        model=source.name,
        model_type=spec.model_type,
        max_model_len=spec.max_model_len,
        engine=request.engine,
        kv_dtype=request.kv_dtype,
        block_size=request.block_tokens,
        effective_block_size=model.effective_block_size(),
        tp=request.tp,
        weights_bytes=weights,
        k_storage=kv.k.name,
        v_storage=kv.v.name,
        growth_bytes_per_token=growth_bytes_per_token(spec, kv),
        fixed_bytes_per_sequence=fixed_bytes_per_sequence(spec, kv),
        layers=_layer_rows(spec, kv),
        at_context=tuple(model.breakdown(n) for n in request.contexts),
        capacity=capacity,
        picks=_picks(sizing, weights, request, prices),
        tiers=tuple(plan_tier(tier, model, request.contexts, prefill) for tier in tiers),
        prefill_basis=None if prefill is None else prefill.basis,
        findings=tuple(find_problems(spec, kv, model, request)),
        assumptions=tuple(_assumptions(spec, request, weights, basis)),
        formulas=explain(spec, kv, model, request.contexts, capacity if len(capacity) == 1 else ()),
    )


def _layer_rows(spec: ModelSpec, kv: KVFormat) -> tuple[LayerRow, ...]:
    def key(layer: LayerSpec) -> tuple[Any, ...]:
        return (*layer.geometry, layer_token_bytes(layer, kv), layer_state_bytes(layer, kv))

    counts: dict[tuple[Any, ...], int] = {}
    for layer in spec.layers:
        counts[key(layer)] = counts.get(key(layer), 0) + 1
    names = (
        "kind", "num_kv_heads", "k_head_dim", "v_head_dim", "window", "bytes_per_token", "state_bytes",
    )  # fmt: skip
    return tuple(LayerRow(count=count, **dict(zip(names, row, strict=True))) for row, count in counts.items())


def _weights(source: ModelSource, spec: ModelSpec, request: PlanRequest) -> tuple[int | None, str]:
    if request.weights_bytes is not None:
        return request.weights_bytes, "as given"
    if source.weights_bytes is not None:
        return source.weights_bytes, source.weights_basis
    return dense_weights_bytes(source.config, spec), "counted from the config's sizes"


def _one_gpu(request: PlanRequest) -> GPU | None:
    """The card asked for, None where all or none is."""
    if request.gpu_memory is not None:
        return GPU(name=f"{format_bytes(request.gpu_memory)} card", memory_bytes=request.gpu_memory)
    return None if request.gpu is None else find_gpu(request.gpu)


def _capacity(
    gpu: GPU | None,
    model: AllocatorModel,
    weights: int | None,
    request: PlanRequest,
    max_model_len: int | None,
) -> tuple[CapacityRow, ...]:
    """What `tp` cards of each kind hold; empty where the weights' size is unknown."""
    if request.kv_budget is not None:
        return (given_budget_row(request.kv_budget, model, request, max_model_len),)
    if weights is None:
        return ()
    cards = [gpu] if gpu is not None else GPUS.values()
    return tuple(capacity_row(card, model, weights, request, max_model_len) for card in cards)


def _picks(
    sizing: Sizing, weights: int | None, request: PlanRequest, prices: Sequence[tuple[GPU, float]] | None
) -> tuple[Pick, ...]:
    if prices is None and request.concurrency is None:
        return ()
    if weights is None:
        raise UsageError("picking cards needs the size of the weights; pass --weights-bytes")
    cards = [(gpu, None) for gpu in GPUS.values()] if prices is None else prices
    sizes = valid_tensor_parallel(sizing.spec, _MOST_CARDS)
    models: Mapping[int, AllocatorModel] = {
        tp: _allocator(sizing.spec, sizing.kv, request, tp) for tp in sizes
    }
    return tuple(pick_cards(cards, models, weights, request))


def _assumptions(spec: ModelSpec, request: PlanRequest, weights: int | None, basis: str) -> list[str]:
    notes = [
        "logical: elements and scales of one copy; allocator: what the engine's pools hold for one sequence "
        f"at its peak, summed over {request.tp} tensor-parallel rank(s); both hold for this config and these "
        "settings, whatever the traffic"
    ]
    if any(layer.window is not None for layer in spec.layers):
        notes.append(
            f"windows: {request.in_flight:,} tokens in flight are held on top of the window at the peak; "
            "capacity counts every sequence at its peak"
        )
    if any(layer.state_bytes for layer in spec.layers):
        notes.append("recurrent state: one copy per sequence, no state kept for prefix reuse")
    if request.engine in ("sglang", "trtllm"):
        notes.append(f"{request.engine}: whole blocks per layer group; further padding is not modelled")
    if spec.max_model_len is not None and max(request.contexts) > spec.max_model_len:
        notes.append(
            f"contexts beyond the model's own limit of {spec.max_model_len} tokens are sized as asked"
        )
    return [*notes, *_capacity_notes(request, weights, basis)]


def _capacity_notes(request: PlanRequest, weights: int | None, basis: str) -> list[str]:
    if request.kv_budget is not None:
        return ["capacity: of the KV budget as given; sequences share no prefix"]
    if weights is None:
        return ["no capacity: the size of the weights is unknown; pass --weights-bytes"]
    return [
        f"capacity: GPU memory under {request.engine}'s own rule, weights {format_bytes(weights)} ({basis}), "
        f"for everything else {_overhead_note(request)}; sequences share no prefix; holds until driver, "
        "engine version or batch limits change"
    ]


def _overhead_note(request: PlanRequest) -> str:
    if request.overhead is not None:
        return f"{format_bytes(request.overhead)} per card as given"
    if request.engine == "sglang":
        return "what mem_fraction_static leaves"
    default = format_bytes(OVERHEAD_BYTES)
    return f"{default} per card, a round figure (measured ones: 2.1 to 7.4 GiB; see --overhead)"
