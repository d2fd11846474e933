"""The packed self-test every model passes at load, or is refused.

Three probe sequences of different lengths run side by side, in two steps, through the paged reference
attention with full-precision KV, and are compared with the model's own eager run, one by one. This
catches what no config says: masks that carry meaning, layers that mix packed neighbours, attention
that never reaches the registry, positions that get lost.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from kvtune.engine.attention import ATTENTION_NAME
from kvtune.engine.decoder import Decoder, fused_decoder
from kvtune.engine.runner import ModelRunner
from kvtune.errors import UnsupportedModelError
from kvtune.kernels import LayerCache, choose_backend
from kvtune.spec import KVGroup, ModelSpec, PackedLayout
from kvtune.types import RequestId, ScheduledChunk

__all__ = ["check_packed_equals_eager"]

_BLOCK = 16
_LENGTHS = (5, 23)
"""Tokens of the two short probes; the third is long enough to leave a small window."""
_LONGEST_PROBE = 160
_MAX_COPY_BYTES = 8 * 2**30
"""Above this a float32 copy is too expensive and the test runs in the model's dtype."""
_TOLERANCE = 1e-4
"""Largest absolute logit difference in float32."""
_RELATIVE_TOLERANCE = 0.05
"""Root mean square of the difference over that of the logits, in 16 bit (rounding gives about 0.01)."""


def check_packed_equals_eager(model: PreTrainedModel, spec: ModelSpec) -> bool:
    """Raise UnsupportedModelError unless the paged run of `model` equals its own eager run.

    Returns whether its fused decoder does, too; False where its architecture has none. The model must
    already use kvtune's attention; it is left that way.
    """
    probe_model = _float32_copy(model)
    groups = spec.kv_groups()
    probes = _probes(model, groups)
    paged = _run_paged(probe_model, groups, probes)
    probe_model.set_attn_implementation("eager")
    try:
        eager = [_run_eager(probe_model, probe) for probe in probes]
    finally:
        probe_model.set_attn_implementation(ATTENTION_NAME)
    decoder = fused_decoder(probe_model)
    fused = [] if decoder is None else _run_paged(probe_model, groups, probes, decoder)
    for probe, mine, own in zip(probes, paged, eager, strict=True):
        difference, limit = _difference(mine, own, probe_model.dtype)
        if not difference < limit:  # refuses NaN too
            kinds = ", ".join(f"{g.kind} (layers {g.layers[0]}..{g.layers[-1]})" for g in groups)
            raise UnsupportedModelError(
                f"{model.config.model_type}: the packed self-test differs from the model's own run by "
                f"{difference:.2g} on a probe of {len(probe)} tokens (limit {limit:g}); layers: {kinds}; "
                "this family is not supported"
            )
    distances = [_difference(mine, own, probe_model.dtype) for mine, own in zip(fused, eager, strict=False)]
    return bool(distances) and all(difference < limit for difference, limit in distances)


def _float32_copy(model: PreTrainedModel) -> PreTrainedModel:
    if model.dtype == torch.float32 or 4 * model.num_parameters() > _MAX_COPY_BYTES:
        return model
    return copy.deepcopy(model).float()


def _probes(model: PreTrainedModel, groups: Sequence[KVGroup]) -> list[np.ndarray]:
    config = model.config.get_text_config()
    smallest = min((group.window for group in groups if group.window), default=0)
    limit = int(getattr(config, "max_position_embeddings", 0) or _LONGEST_PROBE)
    longest = max(2, min(_LONGEST_PROBE, limit, max(41, smallest + 9)))
    rng = np.random.default_rng(0)
    lengths = [min(length, limit) for length in (*_LENGTHS, longest)]
    return [rng.integers(0, int(config.vocab_size), length, dtype=np.int32) for length in lengths]


def _run_paged(
    model: PreTrainedModel,
    groups: Sequence[KVGroup],
    probes: Sequence[np.ndarray],
    decoder: Decoder | None = None,
) -> list[torch.Tensor]:
    """Logits [len(probe), V] of each probe: all packed, the first halves in one step, then the rest."""
    tables: list[np.ndarray] = []
    num_blocks = 0
    for probe in probes:
        count = -(-len(probe) // _BLOCK)
        tables.append(np.arange(num_blocks, num_blocks + count, dtype=np.int32)[::-1].copy())
        num_blocks += count
    caches = {layer: _probe_cache(group, num_blocks) for group in groups for layer in group.layers}
    runner = ModelRunner(
        model, groups, caches, block_size=_BLOCK, backend=choose_backend("reference"), decoder=decoder
    )
    parts: list[list[torch.Tensor]] = [[] for _ in probes]
    for half in (0, 1):
        chunks = [
            _chunk(probe, half, (table,) * len(groups)) for probe, table in zip(probes, tables, strict=True)
        ]
        logits = runner.forward(chunks, np.arange(sum(chunk.num_tokens for chunk in chunks)))
        for part, rows in zip(parts, logits.split([c.num_tokens for c in chunks]), strict=True):
            part.append(rows.float())
    return [torch.cat(part) for part in parts]


def _chunk(probe: np.ndarray, half: int, tables: tuple[np.ndarray, ...]) -> ScheduledChunk:
    middle = len(probe) // 2 + 1
    start, end = (0, middle) if half == 0 else (middle, len(probe))
    return ScheduledChunk(
        request_id=RequestId("probe"), token_ids=probe[start:end], start=start, block_tables=tables,
        samples=True,
    )  # fmt: skip


def _probe_cache(group: KVGroup, num_blocks: int) -> LayerCache:
    layout = PackedLayout(
        block_size=_BLOCK, num_kv_heads=group.num_kv_heads, k_head_dim=group.k_head_dim,
        v_head_dim=group.v_head_dim, k_codec="fp32", v_codec="fp32",
    )  # fmt: skip
    return LayerCache.allocate(layout, num_blocks)


def _run_eager(model: PreTrainedModel, probe: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(probe.astype(np.int64))[None]
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0].float()


def _difference(paged: torch.Tensor, own: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(difference, its limit): absolute in float32, relative root mean square in 16 bit."""
    if dtype == torch.float32:
        return float((paged - own).abs().max()), _TOLERANCE
    return float((paged - own).square().mean().sqrt() / own.square().mean().sqrt()), _RELATIVE_TOLERANCE
