"""The attention function kvtune registers with Transformers, and the step record it reads.

Transformers calls it once per attention layer with packed queries, keys and values of shape
[1, heads, N, dim] (after RoPE) and hands through any keyword given to the model's forward: the step
travels in `kvtune_step`. Nothing is ever carried through `position_ids`, which some models drop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from kvtune.codecs import write_kv
from kvtune.errors import InvariantError, UnsupportedModelError
from kvtune.kernels import AttentionBatch, Backend, LayerCache, paged_attention

__all__ = ["ATTENTION_NAME", "AttentionLayer", "AttentionStep", "attend", "register_attention", "store"]

ATTENTION_NAME = "kvtune_paged"


@dataclass(slots=True)
class AttentionLayer:
    """What one layer's attention needs in every step. `group` indexes `AttentionStep.batches`.

    `attend` reads the cache; what stands in for it takes the arguments of `kernels.paged_attention`.
    """

    index: int
    group: int
    cache: LayerCache
    window: int | None
    attend: Callable[..., torch.Tensor] = paged_attention


@dataclass(slots=True)
class AttentionStep:
    """One packed step: a batch per KV group; `calls[i]` counts the calls of layer i.

    `tails`: the same batches with nobody's rows but those whose logits are wanted, where these are the last
    of each sequence: all that a last layer has to attend with.
    """

    batches: tuple[AttentionBatch, ...]
    layers: dict[int, AttentionLayer]
    backend: Backend
    tails: tuple[AttentionBatch, ...] | None = None
    calls: dict[int, int] = field(default_factory=dict[int, int])


def register_attention() -> None:
    """Make `attn_implementation="kvtune_paged"` known to Transformers. Idempotent.

    No mask function is registered under that name, so Transformers builds no mask.
    """
    AttentionInterface.register(ATTENTION_NAME, _attention_forward)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kvtune_step: AttentionStep | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write this step's K and V, then attend through the block tables. Returns ([1, N, H, Dv], None)."""
    if kvtune_step is None:
        raise InvariantError("this model's attention belongs to a kvtune engine: run it through the engine")
    index = int(module.layer_idx)  # type: ignore[arg-type]
    layer = kvtune_step.layers.get(index)
    if layer is not None and sliding_window != layer.window:
        raise UnsupportedModelError(
            f"layer {index} attends with a window of {sliding_window}, its config says {layer.window}: "
            "the model code and config.json disagree"
        )
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = attend(
        kvtune_step, index, q, k, v, softcap=softcap, sinks=s_aux,
        scale=scaling if scaling is not None else q.shape[-1] ** -0.5,
    )  # fmt: skip
    return out.unsqueeze(0), None


def attend(
    step: AttentionStep,
    index: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    is_tail: bool = False,
) -> torch.Tensor:
    """Write k [N, h, Dk] and v [N, h, Dv] of layer `index`, then attend with q [n, H, Dk]: [n, H, Dv].

    `is_tail`: the rows of q are those of `step.tails`, else all N of the step.
    """
    layer = store(step, index, k, v)
    batches = step.tails if is_tail and step.tails is not None else step.batches
    return layer.attend(
        q, layer.cache, batches[layer.group], scale=scale, window=layer.window, softcap=softcap,
        sinks=sinks, backend=step.backend,
    )  # fmt: skip


def store(step: AttentionStep, index: int, k: torch.Tensor, v: torch.Tensor) -> AttentionLayer:
    """Write k [N, h, Dk] and v [N, h, Dv] of layer `index`; the layer."""
    layer = step.layers.get(index)
    if layer is None:
        raise UnsupportedModelError(f"layer {index} attends, but config.json gives it no KV cache of its own")
    step.calls[index] = step.calls.get(index, 0) + 1
    write_kv(layer.cache, k, v, step.batches[layer.group].slots, backend=step.backend)
    return layer
