"""The formulas of a plan with the numbers in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvtune.config import format_bytes
from kvtune.plan.capacity import CapacityRow
from kvtune.spec import (
    AllocatorModel,
    AllocatorTerm,
    KVFormat,
    LayerKind,
    LayerSpec,
    ModelSpec,
    layer_state_bytes,
    layer_token_bytes,
)

__all__ = ["explain"]


def explain(
    spec: ModelSpec,
    kv: KVFormat,
    model: AllocatorModel,
    contexts: Sequence[int],
    capacity: Sequence[CapacityRow],
) -> tuple[str, ...]:
    """One line per formula: bytes per token and layer kind, bytes at each context, capacity of each row."""
    return (
        *_per_token(spec, kv),
        *(line for n in contexts for line in _at_context(model, n)),
        *(line for row in capacity for line in _capacity(row, model, contexts)),
    )


def _per_token(spec: ModelSpec, kv: KVFormat) -> Iterator[str]:
    growing, kept = 0, 0
    for layers in _alike(spec, kv):
        first, count = layers[0], len(layers)
        per_token = layer_token_bytes(first, kv)
        if per_token:
            size = f"{count * per_token:,} B per token"
            yield f"{first.kind}: {count} layers x {_one_layer(first, kv)} = {size}"
        if first.window is not None:
            kept += count * per_token * first.window
            yield f"  of the last {first.window:,} tokens: {format_bytes(count * per_token * first.window)}"
        else:
            growing += count * per_token
        state = layer_state_bytes(first, kv)
        if state:
            kept += count * state
            element = (state - 2 * first.conv_elements) // max(1, first.state_elements)
            each = f"{first.state_elements:,} x {element} B + {first.conv_elements:,} x 2 B"
            size = f"{format_bytes(count * state)} per sequence"
            yield f"{first.state_kind}: {count} layers x ({each}) = {size}"
    yield f"growth = {growing:,} B per token; fixed = {format_bytes(kept)} per sequence"


def _alike(spec: ModelSpec, kv: KVFormat) -> list[list[LayerSpec]]:
    """Layers of the same geometry, bytes and state, in order of first appearance."""
    groups: dict[tuple[object, ...], list[LayerSpec]] = {}
    for layer in spec.layers:
        key = (*layer.geometry, layer_token_bytes(layer, kv), layer_state_bytes(layer, kv))
        groups.setdefault(key, []).append(layer)
    return [g for g in groups.values() if g[0].kind not in (LayerKind.NONE, LayerKind.SHARED)]


def _one_layer(layer: LayerSpec, kv: KVFormat) -> str:
    k, v = kv.codecs(layer.index)
    if layer.kind is LayerKind.MLA:
        latent = f"{k.latent_bytes(layer.latent_dim, layer.rope_dim):,} B"
        index = f" + {layer.index_bytes} B of index" if layer.index_bytes else ""
        return f"({layer.latent_dim} latent + {layer.rope_dim} RoPE in {k.name} = {latent}{index})"
    k_bytes, v_bytes = k.head_bytes(layer.k_head_dim), v.head_bytes(layer.v_head_dim)
    return (
        f"{layer.num_kv_heads} heads x (K {layer.k_head_dim} in {k.name} = {k_bytes} B "
        f"+ V {layer.v_head_dim} in {v.name} = {v_bytes} B)"
    )


def _at_context(model: AllocatorModel, num_tokens: int) -> Iterator[str]:
    parts = model.breakdown(num_tokens)
    yield f"at {num_tokens:,} tokens:"
    for term in model.terms:
        yield f"  {term.kind}: {_term(term, num_tokens)}"
    if model.paging.tp > 1:
        yield f"  x {model.paging.tp} ranks"
    yield (
        f"  = {format_bytes(parts.allocator_bytes)}: {format_bytes(parts.logical_bytes)} logical "
        f"+ {format_bytes(parts.replication_bytes)} copies + {format_bytes(parts.window_slack_bytes)} window "
        f"slack + {format_bytes(parts.rounding_bytes)} rounding + {format_bytes(parts.padding_bytes)} padding"
    )


def _term(term: AllocatorTerm, num_tokens: int) -> str:
    size = format_bytes(term.bytes(num_tokens))
    if not term.block_bytes:
        return f"{term.num_layers} layers hold {size} of state"
    blocks = f"ceil({num_tokens:,} / {term.block_size:,})"
    if term.max_blocks is not None:
        blocks = f"min({blocks}, {term.max_blocks:,})"
    return f"{blocks} = {term.blocks(num_tokens):,} blocks x {term.block_bytes:,} B = {size}"


def _capacity(row: CapacityRow, model: AllocatorModel, contexts: Sequence[int]) -> Iterator[str]:
    yield f"{row.num_gpus} x {row.gpu}: KV budget = {row.kv_budget_formula}"
    for n in contexts:
        yield (
            f"  at {n:,} tokens: floor({row.kv_budget_bytes:,} / {model.bytes(n):,}) = "
            f"{row.max_concurrency[str(n)]:,} sequences"
        )
