"""What one token and one sequence cost in each layer of a model, from its config dict."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from kvtune.errors import UnsupportedModelError
from kvtune.spec._families import FAMILIES, TEXT_CONFIG_FIELDS, Family, layer_kinds
from kvtune.spec._fields import MAX_DIM, MAX_HEADS, MAX_TOKENS, Fields, show
from kvtune.spec.layout import KVGroup, LayerKind

__all__ = ["LayerSpec", "ModelSpec", "text_config"]

PAGED_KINDS = frozenset({LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED, LayerKind.MLA})
"""Kinds that store something per token."""
_HEAD_KINDS = PAGED_KINDS - {LayerKind.MLA}
_MAX_NESTING = 4
_STATE_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """KV layout of one layer.

    Attention: `num_kv_heads` heads of `k_head_dim` and `v_head_dim` elements per token; `window` tokens are
    kept (None: all; for chunked attention the chunk). MLA: `k_head_dim` is the latent plus its RoPE part
    (`latent_dim` + `rope_dim`), one head, no V; `index_bytes` per token come on top (DeepSeek-V3.2's fp8
    index). Recurrent layers: `state_elements` of `state_element_bytes` and `conv_elements` of 16 bits per
    sequence, in `state_heads` heads that tensor parallelism splits (0: channels); `state_type_is_open`: the
    config leaves the elements' type to the engine. `beside` names the recurrent kind of a layer that does
    attention as well (Falcon-H1).
    `shared_with` is the layer whose KV a shared layer reads.
    """

    index: int
    kind: LayerKind
    num_kv_heads: int = 0
    k_head_dim: int = 0
    v_head_dim: int = 0
    window: int | None = None
    shared_with: int | None = None
    latent_dim: int = 0
    rope_dim: int = 0
    index_bytes: int = 0
    state_elements: int = 0
    state_element_bytes: int = 0
    conv_elements: int = 0
    state_heads: int = 0
    state_type_is_open: bool = False
    beside: LayerKind | None = None

    @property
    def state_kind(self) -> LayerKind:
        """The kind whose recurrent state the layer holds."""
        return self.beside or self.kind

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state per sequence, whatever its length."""
        return self.state_bytes_as(None)

    def state_bytes_as(self, element_bytes: int | None) -> int:
        """The same in an engine that keeps elements whose type is open in `element_bytes`."""
        own = element_bytes if element_bytes is not None and self.state_type_is_open else None
        return self.state_elements * (own or self.state_element_bytes) + self.conv_elements * 2

    @property
    def geometry(self) -> tuple[LayerKind, int, int, int, int | None]:
        """What layers of one KV group have in common."""
        return (self.kind, self.num_kv_heads, self.k_head_dim, self.v_head_dim, self.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The KV layout of a model: one LayerSpec per decoder layer. Sizes come from `kvtune.spec.sizing`."""

    model_type: str
    layers: tuple[LayerSpec, ...]
    max_model_len: int | None
    dtype: str
    """Codec name of the checkpoint's 16- or 32-bit type: what `auto` stores."""
    num_attention_heads: int | None = None
    """Query heads, which tensor parallelism splits; None where the config does not say."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads a Transformers config dict (config.json).

        Raises UnsupportedModelError, naming field and value, for model types and layer kinds that are not
        in the tables and for values that no model can have.
        """
        raw, model_type = text_config(config)
        family = FAMILIES[model_type]
        fields = Fields(raw, aliases=family.aliases, defaults=family.defaults)
        kinds = layer_kinds(fields, family, model_type)
        return cls(
            model_type=model_type,
            layers=_build_layers(fields, family, kinds),
            max_model_len=_max_model_len(fields),
            dtype=_checkpoint_dtype(fields, config),
            num_attention_heads=fields.optional("num_attention_heads", MAX_HEADS),
        )

    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Layers that store tokens, grouped by kind, window and head geometry, in order of first layer.

        MLA groups have one head of latent + RoPE elements and v_head_dim 0.
        """
        members: dict[tuple[Any, ...], list[LayerSpec]] = {}
        for layer in self.layers:
            if layer.kind in PAGED_KINDS:
                members.setdefault(layer.geometry, []).append(layer)
        return tuple(
            KVGroup(
                index=index,
                kind=group[0].kind,
                layers=tuple(layer.index for layer in group),
                num_kv_heads=group[0].num_kv_heads,
                k_head_dim=group[0].k_head_dim,
                v_head_dim=group[0].v_head_dim,
                window=group[0].window,
            )
            for index, group in enumerate(members.values())
        )


def text_config(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The decoder's own config inside a multimodal one, and its model type (a key of the family table)."""
    raw, outer_type = config, None
    for _ in range(_MAX_NESTING):
        model_type = raw.get("model_type", outer_type)
        inner = next((raw[key] for key in TEXT_CONFIG_FIELDS if isinstance(raw.get(key), Mapping)), None)
        if inner is None:
            break
        raw, outer_type = cast(Mapping[str, Any], inner), model_type
    else:
        raise UnsupportedModelError(
            f"config nests text configs {_MAX_NESTING} deep: is it cyclic? Pass the decoder's own config"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"config field 'model_type': {show(model_type)} is not a model kvtune can size; "
            + _nearest(model_type)
        )
    return raw, model_type


def _nearest(model_type: object) -> str:
    near = difflib.get_close_matches(model_type[:64], FAMILIES, n=5) if isinstance(model_type, str) else []
    return f"nearest known: {', '.join(near)}" if near else f"known: {', '.join(sorted(FAMILIES))}"


def _max_model_len(fields: Fields) -> int | None:
    length = fields.optional("max_position_embeddings", MAX_TOKENS)
    return length if length is not None else fields.optional("n_positions", MAX_TOKENS)


def _checkpoint_dtype(fields: Fields, config: Mapping[str, Any]) -> str:
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    for source in (fields, Fields(config)):
        for name in ("dtype", "torch_dtype"):
            value = source.text(name)
            if value is not None:
                return names.get(value.removeprefix("torch."), "bf16")
    return "bf16"


def _build_layers(fields: Fields, family: Family, kinds: Sequence[LayerKind]) -> tuple[LayerSpec, ...]:
    templates = {kind: _template(fields, family, kind) for kind in dict.fromkeys(kinds)}
    overrides = _per_layer_overrides(fields, len(kinds))
    borrowers = _without_index(fields, len(kinds))
    num_shared = fields.optional("num_kv_shared_layers", len(kinds), low=0) or 0
    first_shared = len(kinds) - num_shared
    layers: list[LayerSpec] = []
    for index, kind in enumerate(kinds):
        if index >= first_shared and kind in PAGED_KINDS:
            layers.append(_shared_layer(index, kind, kinds[:first_shared]))
            continue
        own: Values = dict(overrides.get(index, {})) if kind in _HEAD_KINDS else {}
        if index in borrowers:
            own = {"index_bytes": 0}
        layers.append(LayerSpec(index=index, kind=kind, **{**templates[kind], **own}))
    return tuple(layers)


def _template(fields: Fields, family: Family, kind: LayerKind) -> Values:
    values = _BUILDERS[kind](fields, family, kind)
    if family.beside is not None and kind in _HEAD_KINDS:
        values |= {**_BUILDERS[family.beside](fields, family, family.beside), "beside": family.beside}
    return values


def _without_index(fields: Fields, count: int) -> frozenset[int]:
    """Layers that reuse the selection of an earlier layer's index and store none (GLM-5.2)."""
    types = fields.sequence("indexer_types")
    if types is None:
        return frozenset()
    known = {"full", "shared"}
    wrong = next((word for word in types if not isinstance(word, str) or word not in known), None)
    if wrong is not None or len(types) != count:
        found = show(wrong) if wrong is not None else f"{len(types)} entries"
        raise UnsupportedModelError(
            f"config field 'indexer_types': expected 'full' or 'shared' for {count} layers, found {found}"
        )
    return frozenset(index for index, word in enumerate(types) if word == "shared")


def _shared_layer(index: int, kind: LayerKind, owners: Sequence[LayerKind]) -> LayerSpec:
    """Reads the KV of the last owner of the same kind (Gemma 3n and 4)."""
    if kind not in owners:
        raise UnsupportedModelError(
            f"config field 'num_kv_shared_layers': layer {index} ({kind}) shares KV, "
            f"and no layer of that kind stores any"
        )
    source = len(owners) - 1 - list(reversed(owners)).index(kind)
    return LayerSpec(index=index, kind=LayerKind.SHARED, shared_with=source)


def _per_layer_overrides(fields: Fields, count: int) -> dict[int, dict[str, int]]:
    """`per_layer_config` of a saved heterogeneous config: layer index -> head geometry."""
    listed = fields.get("per_layer_config")
    if listed is None:
        return {}
    if not isinstance(listed, Mapping):
        raise UnsupportedModelError(
            f"config field 'per_layer_config': expected a mapping, found {show(listed)}"
        )
    result: dict[int, dict[str, int]] = {}
    for key, entry in cast(Mapping[Any, Any], listed).items():
        text = str(key) if isinstance(key, (str, int)) else ""
        if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) < count) or not isinstance(
            entry, Mapping
        ):
            raise UnsupportedModelError(
                f"config field 'per_layer_config': {show(key)} is not one of {count} layers with settings"
            )
        layer = Fields(cast(Mapping[str, Any], entry))
        heads, dim = layer.optional("num_key_value_heads", MAX_HEADS), layer.optional("head_dim", MAX_DIM)
        values = {"num_kv_heads": heads, "k_head_dim": dim, "v_head_dim": dim}
        result[int(text)] = {name: value for name, value in values.items() if value is not None}
    return result


Values = dict[str, Any]


def _attention(fields: Fields, family: Family, kind: LayerKind) -> Values:
    """MHA, GQA and MQA: heads and head dims; the window for sliding and chunked layers."""
    overrides = family.full_overrides if kind is LayerKind.FULL else {}
    dim = _overridden(fields, family, overrides, "head_dim", MAX_DIM) or _head_dim(fields)
    heads = _overridden(fields, family, overrides, "num_key_value_heads", MAX_HEADS) or _kv_heads(fields)
    v_dim = fields.optional("v_head_dim", MAX_DIM) or dim
    return {"num_kv_heads": heads, "k_head_dim": dim, "v_head_dim": v_dim, "window": _window(fields, kind)}


def _overridden(
    fields: Fields, family: Family, overrides: Mapping[str, str], name: str, high: int
) -> int | None:
    gate = family.gated_overrides.get(name)
    if name not in overrides or (gate is not None and not fields.flag(gate)):
        return None
    return fields.optional(overrides[name], high)


def _head_dim(fields: Fields) -> int:
    dim = fields.optional("head_dim", MAX_DIM)
    if dim is not None:
        return dim
    hidden, heads = fields.number("hidden_size", MAX_DIM), fields.number("num_attention_heads", MAX_HEADS)
    if hidden < heads:
        raise UnsupportedModelError(
            f"config field {fields.name('hidden_size')!r}: {hidden} is less than {heads} attention heads"
        )
    return hidden // heads


def _kv_heads(fields: Fields) -> int:
    # Falcon and GPT-BigCode: one KV head unless the newer decoder is on.
    if fields.flag("multi_query") and not fields.flag("new_decoder_architecture"):
        return 1
    heads = fields.optional("num_key_value_heads", MAX_HEADS)
    return heads if heads is not None else fields.number("num_attention_heads", MAX_HEADS)


def _window(fields: Fields, kind: LayerKind) -> int | None:
    if kind is LayerKind.SLIDING:
        return fields.number("sliding_window", MAX_TOKENS)
    if kind is LayerKind.CHUNKED:
        return fields.number("attention_chunk_size", MAX_TOKENS)
    return None


def _latent(fields: Fields, _family: Family, _kind: LayerKind) -> Values:
    """MLA (DeepSeek-V2): the latent and one shared RoPE key per token; V3.2 adds an fp8 index with
    one fp32 scale per 128 elements."""
    latent, rope = fields.number("kv_lora_rank", MAX_DIM), fields.number("qk_rope_head_dim", MAX_DIM)
    index_dim = fields.optional("index_head_dim", MAX_DIM) or 0
    return {
        "num_kv_heads": 1, "k_head_dim": latent + rope, "latent_dim": latent, "rope_dim": rope,
        "index_bytes": index_dim + 4 * -(-index_dim // 128),
    }  # fmt: skip


def _state_type(fields: Fields, family: Family) -> Values:
    """Bytes per element of a recurrent state: what the config says, else what the family always takes, else
    float32, and then open to the engine."""
    stated = fields.text("mamba_ssm_dtype") or fields.text("mamba_ssm_cache_dtype") or family.state_dtype
    name = stated or "float32"
    if name not in _STATE_DTYPE_BYTES:
        raise UnsupportedModelError(
            f"config field 'mamba_ssm_dtype': {show(name)} is unknown; known: {', '.join(_STATE_DTYPE_BYTES)}"
        )
    return {"state_element_bytes": _STATE_DTYPE_BYTES[name], "state_type_is_open": stated is None}


def _gated_delta(fields: Fields, family: Family, _kind: LayerKind) -> Values:
    """Gated delta net (Qwen3-Next): a key x value matrix per value head, and a short convolution."""
    key_heads = fields.number("linear_num_key_heads", MAX_HEADS)
    value_heads = fields.number("linear_num_value_heads", MAX_HEADS)
    key_dim = fields.number("linear_key_head_dim", MAX_DIM)
    value_dim = fields.number("linear_value_head_dim", MAX_DIM)
    taps = fields.number("linear_conv_kernel_dim", MAX_HEADS) - 1
    return {
        "state_heads": value_heads,
        "state_elements": value_heads * key_dim * value_dim,
        **_state_type(fields, family),
        "conv_elements": (2 * key_heads * key_dim + value_heads * value_dim) * taps,
    }


def _mamba1(fields: Fields, family: Family, _kind: LayerKind) -> Values:
    """Mamba-1 (Jamba): `mamba_d_state` values per inner channel, and a short convolution."""
    inner = fields.number("mamba_expand", MAX_HEADS) * fields.number("hidden_size", MAX_DIM)
    return {
        "state_elements": inner * fields.number("mamba_d_state", MAX_DIM),
        **_state_type(fields, family),
        "conv_elements": inner * (fields.number("mamba_d_conv", MAX_HEADS) - 1),
    }


def _mamba2(fields: Fields, family: Family, _kind: LayerKind) -> Values:
    """Mamba-2 (Nemotron-H): head dim x state values per head, and a convolution over x, B and C."""
    heads = fields.number("mamba_num_heads", MAX_HEADS)
    inner = heads * fields.number("mamba_head_dim", MAX_DIM)
    state = fields.number("ssm_state_size", MAX_DIM)
    channels = inner + 2 * fields.number("n_groups", MAX_HEADS) * state
    return {
        "state_heads": heads,
        "state_elements": inner * state,
        **_state_type(fields, family),
        "conv_elements": channels * (fields.number("conv_kernel", MAX_HEADS) - 1),
    }


def _short_conv(fields: Fields, _family: Family, _kind: LayerKind) -> Values:
    """LFM2: the last inputs of a short convolution, per channel."""
    taps = fields.number("conv_L_cache", MAX_HEADS) - 1
    return {"conv_elements": fields.number("hidden_size", MAX_DIM) * taps}


def _nothing(_fields: Fields, _family: Family, _kind: LayerKind) -> Values:
    return {}


_BUILDERS: Mapping[LayerKind, Callable[[Fields, Family, LayerKind], Values]] = {
    LayerKind.FULL: _attention,
    LayerKind.SLIDING: _attention,
    LayerKind.CHUNKED: _attention,
    LayerKind.MLA: _latent,
    LayerKind.LINEAR: _gated_delta,
    LayerKind.MAMBA1: _mamba1,
    LayerKind.MAMBA2: _mamba2,
    LayerKind.CONV: _short_conv,
    LayerKind.NONE: _nothing,
}
