"""Rotary embeddings whose frequencies do not depend on who else is in the batch.

Transformers' `longrope` and `dynamic` variants choose their frequencies from the largest position of
the whole packed batch: a long neighbour would change a short request's logits and, worse, mix two
geometries inside one cache. LongRoPE (Ding et al., 2024) has two regimes, so one is fixed per engine;
dynamic NTK scaling has infinitely many and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvtune.errors import UnsupportedModelError

__all__ = ["fix_rope", "rope_regime"]

_FIXED = "longrope_fixed"
"""The rope type of a module after `fix_rope`: any name that Transformers' update hook ignores."""


def rope_regime(config: Any, max_model_len: int) -> str:
    """`plain`, `longrope_short` or `longrope_long`: which frequencies an engine of this length uses.

    Raises UnsupportedModelError for rope types whose frequencies follow the sequence length.
    """
    regime = "plain"
    for where, parameters in _rope_parameters(config):
        kind = str(parameters.get("rope_type", "default"))
        if "dynamic" in kind:
            raise UnsupportedModelError(
                f"{where} uses {kind!r} RoPE, whose frequencies change with the longest sequence in the "
                "batch; a paged cache cannot hold such keys. Remove rope scaling or use another model"
            )
        if kind == "longrope":
            original = _original_length(config, parameters)
            regime = "longrope_long" if max_model_len > original else "longrope_short"
    return regime


def fix_rope(model: PreTrainedModel, regime: str) -> None:
    """Give every longrope module of `model` the frequencies of `regime` for all positions, in place."""
    if regime == "plain":
        return
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            if kinds in ("longrope", _FIXED):
                _set_frequencies(module, None, regime)
                module.rope_type = _FIXED  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if kind in ("longrope", _FIXED):
                    _set_frequencies(module, str(layer_type), regime)
                    kinds[layer_type] = _FIXED


def _set_frequencies(module: Any, layer_type: str | None, regime: str) -> None:
    parameters = module.config.rope_parameters
    original = _original_length(module.config, parameters[layer_type] if layer_type else parameters)
    prefix = f"{layer_type}_" if layer_type else ""
    buffer: torch.Tensor = getattr(module, f"{prefix}inv_freq")
    extra = {"layer_type": layer_type} if layer_type else {}
    seq_len = original + 1 if regime == "longrope_long" else original
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, buffer.device, seq_len=seq_len, **extra)
    buffer.copy_(frequencies)


def _original_length(config: Any, parameters: Any) -> int:
    for source in (parameters.get("original_max_position_embeddings"),
                   getattr(config, "original_max_position_embeddings", None)):  # fmt: skip
        if source is not None:
            return int(source)
    return int(config.max_position_embeddings)


def _rope_parameters(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, parameters) of each RoPE in the config; per-layer-type dicts hold several."""
    parameters: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters or "type" in parameters:
        kind = parameters.get("rope_type", parameters.get("type"))
        yield f"model type {config.model_type!r}", {**parameters, "rope_type": kind}
        return
    for layer_type, inner in parameters.items():
        if isinstance(inner, dict):
            yield f"layer type {layer_type!r} of {config.model_type!r}", inner
