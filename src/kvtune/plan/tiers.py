"""What a host or disk tier holds, and whether loading from it beats computing again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvtune.errors import UsageError
from kvtune.plan.recompute import PrefillModel
from kvtune.spec import AllocatorModel

__all__ = ["DEFAULT_BANDWIDTHS", "TierLoad", "TierPlan", "TierRequest", "plan_tier", "tokens_by_bytes"]

DEFAULT_BANDWIDTHS: Final[Mapping[str, float]] = {"host": 25e9, "disk": 3e9}
"""Bytes/s: pinned memory over PCIe 4 x16, one NVMe drive. Named in the plan; measured ones are better."""
_LATENCY_S: Final[Mapping[str, float]] = {"host": 0.0, "disk": 100e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRequest:
    """`name`: host or disk. `size` in bytes, `bandwidth` in bytes/s (None: the default, said so)."""

    name: str
    size: int
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is not None and self.bandwidth <= 0:
            raise UsageError(f"the {self.name} bandwidth must be above zero, found {self.bandwidth}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierLoad:
    """One context: bytes brought back, seconds to load and to compute again (None: not known), the faster,
    how many such sequences the tier holds, and the bandwidth in bytes/s at which both take equally long."""

    context: int
    stored_bytes: int
    sequences: int
    load_s: float
    recompute_s: float | None
    faster: str | None
    break_even_bandwidth: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """A tier at its bandwidth. `tokens`: of one endless sequence, None where bytes do not grow with it."""

    name: str
    size_bytes: int
    bandwidth: float
    bandwidth_basis: str
    tokens: int | None
    loads: tuple[TierLoad, ...]


def plan_tier(
    tier: TierRequest, model: AllocatorModel, contexts: Sequence[int], prefill: PrefillModel | None
) -> TierPlan:
    """One sequence at a time, nothing else on the link; blocks are stored as the pool holds them."""
    bandwidth = tier.bandwidth or DEFAULT_BANDWIDTHS[tier.name]
    return TierPlan(
        name=tier.name,
        size_bytes=tier.size,
        bandwidth=bandwidth,
        bandwidth_basis="as given" if tier.bandwidth is not None else "assumed",
        tokens=tokens_by_bytes(model, tier.size),
        loads=tuple(_load(tier, bandwidth, model, n, prefill) for n in contexts),
    )


def _load(
    tier: TierRequest, bandwidth: float, model: AllocatorModel, context: int, prefill: PrefillModel | None
) -> TierLoad:
    stored = model.stored_bytes(context)
    load_s = stored / bandwidth + _LATENCY_S[tier.name]
    recompute_s = None if prefill is None else prefill.seconds(context)
    return TierLoad(
        context=context,
        stored_bytes=stored,
        sequences=tier.size // max(1, stored),
        load_s=load_s,
        recompute_s=recompute_s,
        faster=None if recompute_s is None else ("load" if load_s < recompute_s else "recompute"),
        break_even_bandwidth=None if not recompute_s else stored / recompute_s,
    )


def tokens_by_bytes(model: AllocatorModel, size: int) -> int | None:
    """Tokens of growing layers that `size` bytes hold; None where no layer grows."""
    growing = [term for term in model.terms if term.window is None and term.block_bytes]
    per_token = model.paging.tp * sum(term.block_bytes / term.block_size for term in growing)
    return int(size / per_token) if per_token else None
