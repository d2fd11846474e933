"""Context x concurrency on a set of cards, what binds first, and which cards to take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from kvtune.plan.budget import KVBudget, default_max_num_seqs, kv_budget
from kvtune.plan.hardware import GPU
from kvtune.plan.request import MAX_CONTEXT, PlanRequest
from kvtune.spec import AllocatorModel

__all__ = ["CapacityRow", "Pick", "capacity_row", "given_budget_row", "longest_sequence", "pick_cards"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityRow:
    """What `num_gpus` cards hold. Keys of the mappings are contexts as text.

    `max_concurrency`: sequences of that length at once, by memory. `running`: the same, not more than the
    engine's limit of sequences at once. `binds`: what stops there being more: `weights` (they do not fit),
    `kv_memory`, `max_num_seqs`, `model_length` (longer than the model was made for).
    `step_floor_s`: seconds below which no decode step of that many sequences can be, because every weight
    and every visible key and value is read once; None where the card's bandwidth is not known.
    `max_tokens`: the longest single sequence, None where bytes stop growing first.
    """

    gpu: str
    num_gpus: int
    memory_basis: str
    kv_budget_bytes: int
    kv_budget_formula: str
    max_tokens: int | None
    max_concurrency: Mapping[str, int]
    running: Mapping[str, int]
    binds: Mapping[str, str]
    step_floor_s: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """The fewest cards of one kind that hold what is asked. `price` in the unit of the price file, for all
    of them; `held`: sequences of the longest context."""

    gpu: str
    num_gpus: int
    memory_bytes: int
    kv_budget_bytes: int
    held: int
    price: float | None
    price_per_sequence: float | None


def longest_sequence(model: AllocatorModel, budget: int) -> int | None:
    """Tokens of the longest single sequence a budget holds; None where bytes stop growing before
    MAX_CONTEXT does."""
    if model.bytes(MAX_CONTEXT) <= budget:
        return None
    low, high = 0, MAX_CONTEXT  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if model.bytes(middle) <= budget else (low, middle)
    return low


def capacity_row(
    gpu: GPU, model: AllocatorModel, weights: int, request: PlanRequest, max_model_len: int | None
) -> CapacityRow:
    """What `request.tp` cards of one kind hold."""
    budget = kv_budget(gpu, request.tp, weights, request)
    limit = request.max_num_seqs or default_max_num_seqs(request.engine, gpu)
    bandwidth = None if gpu.bandwidth is None else gpu.bandwidth * request.tp
    return _row(budget, model, request, limit=limit, max_model_len=max_model_len, bandwidth=bandwidth)


def given_budget_row(
    kv_bytes: int, model: AllocatorModel, request: PlanRequest, max_model_len: int | None
) -> CapacityRow:
    """What a KV budget the user names holds."""
    budget = KVBudget(
        gpu="given budget", num_gpus=request.tp, memory_bytes=kv_bytes, memory_basis="given", weights_bytes=0,
        overhead_bytes=0, fraction=1.0, kv_bytes=kv_bytes, formula="as given",
    )  # fmt: skip
    limit = request.max_num_seqs or default_max_num_seqs(request.engine, None)
    return _row(budget, model, request, limit=limit, max_model_len=max_model_len, bandwidth=None)


def _row(
    budget: KVBudget,
    model: AllocatorModel,
    request: PlanRequest,
    *,
    limit: int | None,
    max_model_len: int | None,
    bandwidth: float | None,
) -> CapacityRow:
    held = {n: budget.kv_bytes // max(1, model.bytes(n)) for n in request.contexts}
    running = {n: count if limit is None else min(count, limit) for n, count in held.items()}
    floors = {
        n: None
        if bandwidth is None or not count
        else (budget.weights_bytes + count * model.read_bytes(n)) / bandwidth
        for n, count in running.items()
    }
    binds = {n: _binding(n, held[n], budget, limit, max_model_len) for n in request.contexts}
    return CapacityRow(
        gpu=budget.gpu,
        num_gpus=budget.num_gpus,
        memory_basis=budget.memory_basis,
        kv_budget_bytes=budget.kv_bytes,
        kv_budget_formula=budget.formula,
        max_tokens=longest_sequence(model, budget.kv_bytes),
        max_concurrency=_as_text(held),
        running=_as_text(running),
        binds=_as_text(binds),
        step_floor_s=_as_text(floors),
    )


def _as_text(values: Mapping[int, _T]) -> dict[str, _T]:
    return {str(context): value for context, value in values.items()}


def _binding(context: int, held: int, budget: KVBudget, limit: int | None, max_model_len: int | None) -> str:
    if not budget.kv_bytes:
        return "weights"
    if max_model_len is not None and context > max_model_len:
        return "model_length"
    return "max_num_seqs" if limit is not None and held > limit else "kv_memory"


def pick_cards(
    cards: Iterable[tuple[GPU, float | None]],
    models: Mapping[int, AllocatorModel],
    weights: int,
    request: PlanRequest,
) -> list[Pick]:
    """For each card the fewest that hold `request.concurrency` sequences of the longest context, cheapest
    first, then least memory first.

    `cards`: each with the price of one, or None. `models`: allocator by tensor-parallel size, the sizes the
    heads allow. Cards of which not even the most hold it are left out.
    """
    picks = [pick for gpu, price in cards if (pick := _fewest(gpu, price, models, weights, request))]
    return sorted(picks, key=lambda p: (p.price is None, p.price or 0.0, p.memory_bytes, p.num_gpus))


def _fewest(
    gpu: GPU, price: float | None, models: Mapping[int, AllocatorModel], weights: int, request: PlanRequest
) -> Pick | None:
    for num_gpus in sorted(models):
        budget = kv_budget(gpu, num_gpus, weights, request)
        held = budget.kv_bytes // models[num_gpus].bytes(max(request.contexts))
        if held < (request.concurrency or 1):
            continue
        total = None if price is None else price * num_gpus
        return Pick(
            gpu=gpu.name,
            num_gpus=num_gpus,
            memory_bytes=budget.memory_bytes,
            kv_budget_bytes=budget.kv_bytes,
            held=held,
            price=total,
            price_per_sequence=None if total is None else total / held,
        )
    return None
