"""The embedded engine: Transformers decoders over a paged, prefix-sharing, encoded KV cache.

`Engine` is the facade; `EngineTarget` is the engine as `tune`, `check` and `verify` see it.
"""

from kvtune.engine.engine import Engine
from kvtune.engine.load import LoadedModel, load_model
from kvtune.engine.planes import reading_planes
from kvtune.engine.target import EngineTarget
from kvtune.engine.telemetry import EngineStats, MemoryReport

__all__ = [
    "Engine",
    "EngineStats",
    "EngineTarget",
    "LoadedModel",
    "MemoryReport",
    "load_model",
    "reading_planes",
]
