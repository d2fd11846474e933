"""How many bytes each engine gives to KV on a set of cards: its own rule, with its own defaults.

    kvtune   total x fraction - weights - overhead          (0.90)
    vllm     total x fraction - weights - overhead          gpu_memory_utilization, 0.92 in vLLM 0.32
    sglang   total x fraction - weights                     mem_fraction_static; its default leaves room for
                                                            activations and graphs, see `sglang_fraction`
    trtllm   (total - weights - overhead) x fraction        free_gpu_memory_fraction, 0.90

Overhead is context, activations and graphs. No formula gives it: measured figures run from 2.1 to 7.4 GiB
per model family on one H100. The default is a round figure, named in every plan; `--overhead` takes a
measured one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvtune.config import SchedulerConfig, format_bytes
from kvtune.plan.hardware import GPU
from kvtune.plan.request import PlanRequest

__all__ = ["OVERHEAD_BYTES", "KVBudget", "default_max_num_seqs", "kv_budget", "sglang_fraction"]

OVERHEAD_BYTES: Final = 2 << 30
"""Per card, beside weights and KV."""
_FRACTIONS: Final[Mapping[str, float]] = MappingProxyType({"kvtune": 0.90, "vllm": 0.92, "trtllm": 0.90})
_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBudget:
    """KV bytes over all `num_gpus` cards; `formula` is the engine's rule with the numbers in it."""

    gpu: str
    num_gpus: int
    memory_bytes: int
    memory_basis: str
    weights_bytes: int
    overhead_bytes: int
    fraction: float
    kv_bytes: int
    formula: str


def kv_budget(gpu: GPU, num_gpus: int, weights_bytes: int, request: PlanRequest) -> KVBudget:
    """What `request.engine` leaves for KV on `num_gpus` cards; 0 where the weights alone do not fit."""
    total = gpu.memory_bytes * num_gpus
    fraction = request.memory_fraction
    if fraction is None:
        is_sglang = request.engine == "sglang"
        fraction = sglang_fraction(gpu, num_gpus) if is_sglang else _FRACTIONS[request.engine]
    overhead = num_gpus * (
        _default_overhead(request.engine) if request.overhead is None else request.overhead
    )
    other = weights_bytes + overhead
    taken = f"{format_bytes(weights_bytes)} weights"
    if overhead:
        taken += f" - {format_bytes(overhead)} overhead"
    size = f"{num_gpus} x {format_bytes(gpu.memory_bytes)}"
    if request.engine == "trtllm":
        left, formula = (total - other) * fraction, f"({size} - {taken}) x {fraction:g}"
    else:
        left, formula = total * fraction - other, f"{size} x {fraction:g} - {taken}"
    kv_bytes = max(0, int(left))
    return KVBudget(
        gpu=gpu.name,
        num_gpus=num_gpus,
        memory_bytes=total,
        memory_basis=gpu.memory_basis,
        weights_bytes=weights_bytes,
        overhead_bytes=overhead,
        fraction=fraction,
        kv_bytes=kv_bytes,
        formula=f"{formula} = {format_bytes(kv_bytes)}",
    )


def _default_overhead(engine: str) -> int:
    return 0 if engine == "sglang" else OVERHEAD_BYTES


def sglang_fraction(gpu: GPU, num_gpus: int) -> float:
    """SGLang's default mem_fraction_static (its `server_args.py`): what is left after reserving, in MiB, 512
    for metadata, 1.5 per token of a prefill chunk, 2 per sequence of the largest captured batch and 128 per
    rank; at least 10 GiB on cards above 60 GiB.
    """
    memory = gpu.memory_bytes / _MIB
    chunk, graphs = _sglang_sizes(memory, num_gpus)
    reserved = 512 + 1.5 * max(chunk, 2048) + 2 * graphs + num_gpus / 8 * 1024
    if memory > 60 * 1024:
        reserved = max(reserved, 10 * 1024)
    return max(0.0, round((memory - reserved) / memory, 3))


def _sglang_sizes(memory_mib: float, tp: int) -> tuple[int, int]:
    """(chunked_prefill_size, cuda_graph_max_bs) by memory of one card."""
    few = tp < 4
    for below_gib, sizes in (
        (20, (2048, 8)),
        (35, (2048, 24 if few else 80)),
        (60, (4096, 32 if few else 160)),
        (160, (8192, 256 if few else 512)),
    ):
        if memory_mib < below_gib * 1024:
            return sizes
    return 16384, 512


def default_max_num_seqs(engine: str, gpu: GPU | None) -> int | None:
    """Sequences an engine runs at once unless told otherwise; None where it derives that from memory.

    vLLM's server: 1,024 on cards of at least 70 GiB but the A100, else 256. TensorRT-LLM: 2,048.
    """
    if engine == "kvtune":
        return SchedulerConfig().max_num_seqs
    if engine == "vllm":
        is_large = gpu is not None and gpu.memory_bytes >= 70 * _GIB and "A100" not in gpu.name
        return 1024 if is_large else 256
    return 2048 if engine == "trtllm" else None
