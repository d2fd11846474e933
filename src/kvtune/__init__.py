"""kvtune: the smallest KV cache that serves your traffic without hurting your answers.

Importing this package loads neither torch nor transformers; the names that need them are lazy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtune._version import __version__
from kvtune.config import CacheConfig, EngineConfig, SchedulerConfig
from kvtune.errors import KVTuneError
from kvtune.types import FinishReason, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from kvtune.engine import Engine

__all__ = [
    "CacheConfig",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "KVTuneError",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from kvtune.engine import Engine

        return Engine
    raise AttributeError(f"module 'kvtune' has no attribute {name!r}")
