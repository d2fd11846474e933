"""What a model's KV cache costs and how much of it a GPU holds. No torch, no weights, no GPU needed."""

from __future__ import annotations

from kvtune.plan.hardware import GPUS, find_gpu
from kvtune.plan.models import ModelSource, bundled_models, find_model
from kvtune.plan.planner import KV_DTYPES, PlanRequest, contexts_from_text, plan_model

__all__ = [
    "GPUS",
    "KV_DTYPES",
    "ModelSource",
    "PlanRequest",
    "bundled_models",
    "contexts_from_text",
    "find_gpu",
    "find_model",
    "plan_model",
]
