"""How long it takes to compute the keys and values of a prompt again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvtune.errors import UsageError
from kvtune.plan.hardware import GPU
from kvtune.plan.models import ModelSource
from kvtune.plan.weights import dense_parameters
from kvtune.spec import LayerKind, LayerSpec, ModelSpec, text_config

__all__ = ["PREFILL_UTILISATION", "PrefillModel", "prefill_model"]

PREFILL_UTILISATION: Final = 0.5
"""Share of a card's dense 16-bit throughput that prefill reaches: what good engines do on long prompts."""

_MAX_RATE = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillModel:
    """Seconds to prefill n tokens: a measured rate, else FLOPs over throughput. `basis` says which."""

    basis: str
    rate: float | None = None
    throughput: float = 0.0
    parameters: int = 0
    spec: ModelSpec | None = None
    config: Mapping[str, Any] | None = None

    def seconds(self, num_tokens: int) -> float:
        """Time of one prefill of `num_tokens` tokens with nothing cached."""
        if self.rate is not None:
            return num_tokens / self.rate
        assert self.spec is not None
        assert self.config is not None
        heads = self.spec.num_attention_heads or 0
        attention = sum(_attention_flops(layer, heads, self.config, num_tokens) for layer in self.spec.layers)
        return (2 * self.parameters * num_tokens + attention) / self.throughput


def prefill_model(
    source: ModelSource, spec: ModelSpec, gpu: GPU | None, num_gpus: int, rate: float | None
) -> PrefillModel | None:
    """From `rate` (tokens/s, measured) or from the card's throughput; None where neither is known, or
    where it is not known how many parameters a token meets. UsageError for a rate that is none."""
    if rate is not None:
        if not 0 < rate < _MAX_RATE:
            raise UsageError(f"--prefill-rate must be a number of tokens/s above 0, found {rate:g}")
        return PrefillModel(basis=f"{rate:,.0f} tokens/s, as given", rate=rate)
    parameters = source.active_parameters or dense_parameters(source.config, spec)
    if gpu is None or gpu.flops is None or parameters is None or not spec.num_attention_heads:
        return None
    return PrefillModel(
        basis=f"2 x {parameters:,} parameters and attention per token at {PREFILL_UTILISATION:.0%} of "
        f"{num_gpus} x {gpu.flops / 1e12:,.0f} TFLOPS",
        throughput=gpu.flops * num_gpus * PREFILL_UTILISATION,
        parameters=parameters,
        spec=spec,
        config=text_config(source.config)[0],
    )


def _attention_flops(layer: LayerSpec, heads: int, config: Mapping[str, Any], num_tokens: int) -> float:
    """2 multiply-adds per query head, dim and (query, visible key) pair, for QK and for PV."""
    if layer.kind not in (LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED, LayerKind.MLA):
        return 0.0
    if layer.kind is LayerKind.MLA:  # prefill expands the latent to full heads
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        dims = sum(value for name in names if isinstance(value := config.get(name), int))
    else:
        dims = layer.k_head_dim + layer.v_head_dim
    window = num_tokens if layer.window is None else min(layer.window, num_tokens)
    pairs = window * num_tokens - window * (window - 1) / 2
    return 2.0 * heads * dims * pairs
