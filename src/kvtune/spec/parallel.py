"""Which tensor-parallel sizes a model's heads allow."""

from __future__ import annotations

from kvtune.errors import UsageError
from kvtune.spec.layout import LayerKind
from kvtune.spec.model import ModelSpec

__all__ = ["check_tensor_parallel", "valid_tensor_parallel"]


def check_tensor_parallel(spec: ModelSpec, tp: int) -> None:
    """UsageError unless `tp` ranks can share the heads: query and state heads split evenly, KV heads split
    evenly or, where there are fewer of them than ranks, are copied evenly (the rule of vLLM's models). An
    MLA latent is copied to every rank, whatever `tp`.
    """
    problem = _problem(spec, tp)
    if problem is not None:
        fitting = ", ".join(str(size) for size in valid_tensor_parallel(spec, 64))
        raise UsageError(
            f"tensor parallelism over {tp} ranks does not divide {problem}; use one of {fitting}"
        )


def valid_tensor_parallel(spec: ModelSpec, high: int) -> tuple[int, ...]:
    """The sizes from 1 to `high` that `check_tensor_parallel` allows."""
    return tuple(tp for tp in range(1, high + 1) if _problem(spec, tp) is None)


def _problem(spec: ModelSpec, tp: int) -> str | None:
    """The heads that `tp` ranks cannot share."""
    heads = spec.num_attention_heads
    if heads is not None and heads % tp:
        return f"{heads} attention heads"
    for layer in spec.layers:
        if layer.state_heads % tp:
            return f"{layer.state_heads} {layer.state_kind} heads"
        count = layer.num_kv_heads
        if count and layer.kind is not LayerKind.MLA and count % tp and tp % count:
            return f"{count} KV heads, nor do those divide it"
    return None
