"""The Target port: what `tune`, `check` and `verify` know of an engine. No torch here.

Bodies: `kvtune.engine.target` (our engine) and `kvtune.adapters.vllm_server` (a real vLLM);
the command line wires them. A target starts one engine per configuration, says which settings took
effect, runs a workload, scores given continuations by prefill, and stops only what it started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

Config = Mapping[str, Any]
"""One point of the search space: knob name -> value. Names: k_codec, v_codec (or kv_dtype where an
engine has one knob for both), block_size, enable_prefix_caching, max_num_seqs, max_num_batched_tokens.
Where the engine allocates layers apart, `layer_codecs` may override k_codec and v_codec: layer index as text
-> [k, v]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One searchable setting: the values this engine offers, the baseline's, and whether reads of
    the cache change with it (then the quality gate must see a difference: INERT otherwise)."""

    name: str
    values: tuple[Any, ...]
    baseline: Any
    is_lossy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One request of a load run: token ids, how many tokens to generate, when to send it."""

    request_id: str
    prompt_token_ids: Sequence[int]
    max_tokens: int
    arrival_s: float = 0.0
    cache_salt: str = ""
    ignore_eos: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What one request of a load run saw. Times in seconds from its arrival; `error` says why it failed."""

    request_id: str
    token_ids: Sequence[int]
    num_cached_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    itl_s: Sequence[float] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A whole load run: per request results, wall time, and the engine's own counters."""

    results: Sequence[LoadResult]
    duration_s: float
    counters: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """A prompt and the continuation whose tokens are to be scored under the candidate's cache.

    `at_ids` [T, k]: token ids whose log-probabilities are wanted (the reference's top k); None asks
    for the engine's own top `num_top`.
    """

    item_id: str
    prompt_token_ids: Sequence[int]
    continuation: Sequence[int]
    at_ids: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probabilities of one item's T continuation tokens.

    `ids` [T, k] int32 (k = vocabulary size: exact), `logprobs` [T, k] float32 natural log,
    `token_logprobs` [T] of the continuation itself, `argmax` [T]. `is_full`: ids cover the vocabulary.
    Missing entries (an engine that cannot be asked at given ids) hold id -1 and -inf.
    """

    item_id: str
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    token_logprobs: npt.NDArray[np.float32]
    argmax: npt.NDArray[np.int32]
    is_full: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMoment:
    """KV memory at one moment, in bytes. `allocated`: the pools' storage; `used`: blocks that live requests
    hold; predicted from sizes and lengths alone, and read from the engine. None where nobody says.

    `num_requests`, `num_tokens`: being held then. `process_bytes`: resident memory of the whole process.
    """

    name: str
    num_requests: int = 0
    num_tokens: int = 0
    predicted_allocated_bytes: int = 0
    allocated_bytes: int | None = 0
    predicted_used_bytes: int = 0
    used_bytes: int | None = 0
    process_bytes: int | None = None


class RunningTarget(Protocol):
    """One started engine under one configuration. Use as a context manager; `close` is idempotent.

    Methods raise TargetError when the engine dies or answers nonsense; nothing is left behind.
    """

    effective: Mapping[str, Any]
    """Settings read back after start, by knob name, plus `kv_bytes_per_token` (allocator bytes at the
    reference context), `kv_capacity_tokens`, `num_blocks`, `read_contract`, `kernel`, `dtype`."""

    def generate(self, requests: Sequence[LoadRequest]) -> Sequence[Sequence[int]]:
        """Greedy continuations, in request order, without timing."""
        ...

    def load(
        self, requests: Sequence[LoadRequest], *, deadline_s: float | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> LoadReport:  # fmt: skip
        """Send requests at their arrival times and measure; the prefix cache is reset first."""
        ...

    def score(
        self, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None = None
    ) -> Sequence[Scores]:
        """Teacher-forced log-probabilities by chunked prefill through the cache, in item order.

        `chunk`: tokens per step (None: as served; 1: decode steps, of several items at once). Prefix
        caching must not skip positions that are scored.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Target(Protocol):
    """An engine kind plus a model: start it under a configuration."""

    name: str
    """`kvtune` or `vllm`."""

    def knobs(self) -> Sequence[Knob]:
        """The search space this engine really offers."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Model (path, config/tokenizer/weights SHA-256), engine and versions, hardware: for the recipe."""
        ...

    def kv_bytes_per_token(self, config: Config, *, context: int) -> float:
        """Predicted allocator bytes per token at a context length: memory is pruned on this first."""
        ...

    def start(self, config: Config, *, kv_budget_bytes: int | None = None) -> RunningTarget:
        """Raises UsageError when the configuration cannot fit (infeasible), EngineUnavailableError or
        TargetError when the engine does not come up."""
        ...


@runtime_checkable
class MeasuresMemory(Protocol):
    """What a target may offer beyond `Target`: looking into its KV memory."""

    def memory_moments(
        self, config: Config, requests: Sequence[LoadRequest], *, kv_budget_bytes: int | None = None
    ) -> Sequence[MemoryMoment]:
        """Start `config`, serve `requests` together without sharing, and tell the memory before load, after
        load, after prefill, in decode and after the run. Raises as `start` and `load`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCodecs:
    """Codecs that each layer may have for itself. `layers`: model indices of those that store KV.

    `stored` names a nested codec among them and `high` the codec whose bytes its high plane is: what a layer
    loses at `high` can be measured by reading `stored` without its low plane. Empty where there is none.
    """

    layers: tuple[int, ...]
    codecs: tuple[str, ...]
    stored: str = ""
    high: str = ""


@runtime_checkable
class AllocatesLayers(Protocol):
    """A target whose configurations may hold `layer_codecs`."""

    def layer_codecs(self) -> LayerCodecs: ...

    def kv_side_bytes_per_token(self, config: Config, *, context: int) -> Mapping[int, tuple[float, float]]:
        """Layer index -> allocator bytes per token of (keys, values), scales included; what is missing to
        `kv_bytes_per_token` is padding."""
        ...


@runtime_checkable
class ReadsPlanes(Protocol):
    """A running target that can read nested codes from their high plane alone."""

    def reading(self, planes: Mapping[int, tuple[int, int]]) -> AbstractContextManager[None]:
        """Read these layers' (keys, values) from 1 or 2 planes while the context lasts. UsageError for a
        side that is not nested."""
        ...
