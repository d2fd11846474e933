"""What a model's KV cache costs and how much of it a GPU holds. No torch, no weights, no GPU needed.

What plans for a trace is imported when first asked for: it reads workloads, which a bare plan has no need of.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvtune.plan.budget import KVBudget, kv_budget
from kvtune.plan.capacity import CapacityRow, Pick
from kvtune.plan.findings import Finding
from kvtune.plan.hardware import GPU, GPUS, find_gpu
from kvtune.plan.models import ModelSource, bundled_models, find_model
from kvtune.plan.planner import LayerRow, Plan, Sizing, plan_model, size_model
from kvtune.plan.prices import read_prices
from kvtune.plan.request import KV_DTYPES, PlanRequest, contexts_from_text
from kvtune.plan.tiers import TierLoad, TierPlan, TierRequest

if TYPE_CHECKING:
    from kvtune.plan.trace_plan import CacheLevel, PrefixReuse, TracePlan, plan_trace
    from kvtune.plan.whatif import Change, Holding, WhatIf, changes_from_text

__all__ = [
    "GPU",
    "GPUS",
    "KV_DTYPES",
    "CacheLevel",
    "CapacityRow",
    "Change",
    "Finding",
    "Holding",
    "KVBudget",
    "LayerRow",
    "ModelSource",
    "Pick",
    "Plan",
    "PlanRequest",
    "PrefixReuse",
    "Sizing",
    "TierLoad",
    "TierPlan",
    "TierRequest",
    "TracePlan",
    "WhatIf",
    "bundled_models",
    "changes_from_text",
    "contexts_from_text",
    "find_gpu",
    "find_model",
    "kv_budget",
    "plan_model",
    "plan_trace",
    "read_prices",
    "size_model",
]

_ON_TRACES = {
    **dict.fromkeys(("CacheLevel", "PrefixReuse", "TracePlan", "plan_trace"), "kvtune.plan.trace_plan"),
    **dict.fromkeys(("Change", "Holding", "WhatIf", "changes_from_text"), "kvtune.plan.whatif"),
}


def __getattr__(name: str) -> Any:
    if name not in _ON_TRACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_TRACES[name]), name)
