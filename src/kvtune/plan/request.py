"""What to plan for: every setting of `kvtune plan`, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtune.config import CacheConfig, SchedulerConfig
from kvtune.errors import UsageError
from kvtune.spec import ENGINES

__all__ = ["KV_DTYPES", "MAX_CONTEXT", "PlanRequest", "contexts_from_text"]

KV_DTYPES = (
    "auto", "bf16", "fp16", "fp32", "fp8", "int8", "int4", "k8v4", "int4_rh", "n8_rh", "n4_rh", "nvfp4",
)  # fmt: skip
MAX_CONTEXT = 1 << 27
MAX_TP = 1024
MAX_BLOCK_SIZE = 1 << 16
MAX_COUNT = 1 << 20
_BLOCK_TOKENS = {"kvtune": CacheConfig().block_size, "vllm": 16, "sglang": 1, "trtllm": 32}
"""What each engine takes unless told otherwise: block_size, page_size, tokens_per_block."""
_CHUNK = 8192
"""Tokens other engines compute per step on a data-centre card, by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan for. UsageError for values outside their range.

    `block_size` None: the engine's own (`block_tokens`). `gpu` None: every card of the first table.
    `gpu_memory`: bytes of a card that no table knows. `kv_budget`: bytes for KV over all cards, instead of
    an engine's own rule. `overhead`: bytes per card beside weights and KV. `max_num_batched_tokens`: tokens
    of one sequence in one step at most. `concurrency`: sequences of the longest context that picked cards
    must hold.
    """

    contexts: Sequence[int] = (8192, 131072)
    kv_dtype: str = "auto"
    block_size: int | None = None
    tp: int = 1
    engine: str = "kvtune"
    gpu: str | None = None
    gpu_memory: int | None = None
    kv_budget: int | None = None
    memory_fraction: float | None = None
    overhead: int | None = None
    weights_bytes: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise UsageError(f"unknown --kv-dtype {self.kv_dtype!r}; known: {', '.join(KV_DTYPES)}")
        if self.engine not in ENGINES:
            raise UsageError(f"unknown engine {self.engine!r}; known: {', '.join(ENGINES)}")
        if not self.contexts:
            raise UsageError("--context needs at least one number of tokens")
        for name, value, high in self._limits():
            if value is not None and not 1 <= value <= high:
                raise UsageError(f"{name} must lie between 1 and {high}, found {value}")
        for name, value in (("--weights-bytes", self.weights_bytes), ("--overhead", self.overhead)):
            if value is not None and value < 0:
                raise UsageError(f"{name} must not be negative, found {value}")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise UsageError(f"--memory-fraction must lie in (0, 1], found {self.memory_fraction}")
        given = [self.gpu is not None, self.gpu_memory is not None, self.kv_budget is not None]
        if sum(given) > 1:
            raise UsageError("--gpu, --gpu-memory and --kv-budget name the memory three ways: give one")

    def _limits(self) -> list[tuple[str, int | None, int]]:
        return [
            *(("--context", n, MAX_CONTEXT) for n in self.contexts),
            ("--tp", self.tp, MAX_TP),
            ("--block-size", self.block_size, MAX_BLOCK_SIZE),
            ("--max-num-seqs", self.max_num_seqs, MAX_COUNT),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, MAX_COUNT),
            ("--concurrency", self.concurrency, MAX_COUNT),
        ]

    @property
    def block_tokens(self) -> int:
        """Tokens per block before an engine enlarges them for a model."""
        return _BLOCK_TOKENS[self.engine] if self.block_size is None else self.block_size

    @property
    def in_flight(self) -> int:
        """Tokens of one sequence computed but not yet settled at most: what a window holds on top. vLLM's
        asynchronous scheduling (its default) keeps two steps in flight."""
        return self.step_tokens * (2 if self.engine == "vllm" else 1)

    @property
    def step_tokens(self) -> int:
        """Tokens of one sequence computed in one step at most."""
        if self.engine == "kvtune":
            given = self.max_num_batched_tokens
            return (
                SchedulerConfig() if given is None else SchedulerConfig(max_num_batched_tokens=given)
            ).chunk
        return self.max_num_batched_tokens or _CHUNK


def contexts_from_text(text: str) -> tuple[int, ...]:
    """`"8192,131072"` -> (8192, 131072), repeats dropped. UsageError on anything but whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 12 for part in parts):
        raise UsageError(f"--context expects token counts such as 8192,131072, found {text[:80]!r}")
    return tuple(sorted({int(part) for part in parts}))
