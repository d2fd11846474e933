"""Model facts as rows: how each family names its fields and which kind each of its layers is.

A row is checked against the Transformers config class of its `model_type` (tests/spec). A family that is
not listed is refused by name: the same field names mean different things in different models, and a guess
would be wrong by a factor, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from kvtune.errors import UnsupportedModelError
from kvtune.spec._fields import MAX_LAYERS, Fields, show
from kvtune.spec.layout import LayerKind

__all__ = ["FAMILIES", "TEXT_CONFIG_FIELDS", "Family", "layer_kinds"]

TEXT_CONFIG_FIELDS: Final = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where a multimodal config keeps the decoder that owns the KV cache."""

_ATTENTION, _RECURRENT = "attention", "recurrent"
_Role = LayerKind | str
_LAYER_WORDS: Final[Mapping[str, _Role]] = MappingProxyType({
    "full_attention": _ATTENTION,
    "attention": _ATTENTION,
    "*": _ATTENTION,
    "sliding_attention": LayerKind.SLIDING,
    "chunked_attention": LayerKind.CHUNKED,
    "indexed_attention": LayerKind.MLA,
    "deepseek_sparse_attention": LayerKind.MLA,
    "linear_attention": _RECURRENT,
    "mamba": _RECURRENT,
    "M": _RECURRENT,
    "conv": LayerKind.CONV,
    "moe": LayerKind.NONE,
    "E": LayerKind.NONE,
    "mlp": LayerKind.NONE,
    "-": LayerKind.NONE,
})  # fmt: skip
"""Transformers' `layer_types` words, their older names, and Nemotron-H's letters. `attention` and
`recurrent` stand for the family's own kind."""

Roles = tuple[_Role, ...]
PatternRule = Callable[[Fields, int], Roles]
"""(config, number of layers) -> one role per layer; used where the config lists no layer types."""


def _all_full(_config: Fields, count: int) -> Roles:
    return (_ATTENTION,) * count


def _all_recurrent(_config: Fields, count: int) -> Roles:
    return (_RECURRENT,) * count


def _uniform_window(config: Fields, count: int) -> Roles:
    """Mistral: one window for all layers, or none."""
    return ((_ATTENTION if config.get("sliding_window") is None else LayerKind.SLIDING),) * count


def _upper_window(config: Fields, count: int) -> Roles:
    """Qwen2/3: layers from max_window_layers on slide, if use_sliding_window says so."""
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        return (_ATTENTION,) * count
    first = config.number("max_window_layers", MAX_LAYERS, low=0)
    return tuple(LayerKind.SLIDING if i >= first else _ATTENTION for i in range(count))


def _full_or_listed(config: Fields, count: int) -> Roles:
    """Families whose window rule differs from version to version: full unless the config switches it on."""
    if config.flag("use_sliding_window"):
        raise UnsupportedModelError(
            "config field 'use_sliding_window' is true and 'layer_types' is missing: which layers slide?"
        )
    return (_ATTENTION,) * count


def _every(period_field: str, other: _Role) -> PatternRule:
    """Every P-th layer is full attention, the others are `other`."""

    def rule(config: Fields, count: int) -> Roles:
        period = config.number(period_field, MAX_LAYERS)
        return tuple(other if (i + 1) % period else _ATTENTION for i in range(count))

    return rule


def _no_rope(config: Fields, count: int) -> Roles:
    """Llama-4: layers with RoPE are chunked, layers without see everything."""
    listed = config.sequence("no_rope_layers")
    if not listed:
        return _every("no_rope_layer_interval", LayerKind.CHUNKED)(config, count)
    if len(listed) != count:
        raise UnsupportedModelError(
            f"config field 'no_rope_layers': expected {count} entries, found {len(listed)}"
        )
    return tuple(LayerKind.CHUNKED if entry else _ATTENTION for entry in listed)


def _letters(config: Fields, count: int) -> Roles:
    """Nemotron-H: one letter per layer (* attention, M Mamba-2, E experts, - MLP)."""
    pattern = config.text("hybrid_override_pattern")
    if pattern is None:
        raise UnsupportedModelError(
            "config has neither 'layers_block_type' nor 'hybrid_override_pattern': layer kinds are unknown"
        )
    if len(pattern) != count:
        raise UnsupportedModelError(
            f"config field 'hybrid_override_pattern': expected {count} letters, found {len(pattern)}"
        )
    return tuple(_role(letter, i, "hybrid_override_pattern") for i, letter in enumerate(pattern))


def _offset_period(config: Fields, count: int) -> Roles:
    """Jamba: attention where i mod attn_layer_period = attn_layer_offset."""
    period = config.number("attn_layer_period", MAX_LAYERS)
    offset = config.number("attn_layer_offset", MAX_LAYERS, low=0)
    return tuple(_ATTENTION if i % period == offset else _RECURRENT for i in range(count))


def _chosen(indices_field: str, other: _Role, *, without: _Role) -> PatternRule:
    """Attention where the config lists the layer's index, `other` elsewhere; `without` a list, one role."""

    def rule(config: Fields, count: int) -> Roles:
        listed = config.sequence(indices_field)
        if listed is None:
            return (without,) * count
        wrong = next((i for i in listed if not isinstance(i, int) or not 0 <= i < count), None)
        if wrong is not None:
            raise UnsupportedModelError(
                f"config field {indices_field!r}: {show(wrong)} is not one of {count} layers"
            )
        return tuple(_ATTENTION if i in listed else other for i in range(count))

    return rule


def _kimi_layers(config: Fields, count: int) -> Roles:
    """Kimi Linear: two lists of layers, counted from 1, that cover every layer once."""
    full = config.sequence("linear_attn_config.full_attn_layers")
    linear = config.sequence("linear_attn_config.kda_layers")
    if full is None and linear is None:
        return tuple(_ATTENTION if i and i % 4 == 0 else _RECURRENT for i in range(count))
    named = [*(full or ()), *(linear or ())]
    if len(named) != count or any(i not in named for i in range(1, count + 1)):
        raise UnsupportedModelError(
            f"config field 'linear_attn_config': 'full_attn_layers' and 'kda_layers' must name each of "
            f"{count} layers once, found {len(named)} entries"
        )
    return tuple(_ATTENTION if i + 1 in (full or ()) else _RECURRENT for i in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row. `defaults` are values that published config files of the family leave out.

    `full_overrides`: geometry field -> field that replaces it in full-attention layers.
    `gated_overrides`: those of them that count only where the named flag is set.
    `state_dtype`: the type of recurrent states that every engine keeps for this family. `beside`: a recurrent
    kind that every attention layer holds as well (Falcon-H1).
    """

    pattern: PatternRule = _all_full
    attention: LayerKind = LayerKind.FULL
    recurrent: LayerKind | None = None
    beside: LayerKind | None = None
    state_dtype: str | None = None
    layer_types_field: str = "layer_types"
    aliases: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict[str, str | tuple[str, ...]])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    full_overrides: Mapping[str, str] = field(default_factory=dict[str, str])
    gated_overrides: Mapping[str, str] = field(default_factory=dict[str, str])


def _role(word: object, index: int, source: str) -> _Role:
    role = _LAYER_WORDS.get(word) if isinstance(word, str) else None
    if role is None:
        raise UnsupportedModelError(
            f"config field {source!r}: layer {index} has kind {show(word)}, which kvtune cannot size; "
            f"known: {', '.join(_LAYER_WORDS)}"
        )
    return role


def _resolve(role: _Role, family: Family, index: int, model_type: str) -> LayerKind:
    if role == _ATTENTION:
        return family.attention
    if role == _RECURRENT:
        if family.recurrent is None:
            raise UnsupportedModelError(
                f"layer {index} of {model_type!r} is recurrent: kvtune knows no state of that family"
            )
        return family.recurrent
    if role is LayerKind.MLA and family.attention is not LayerKind.MLA:
        raise UnsupportedModelError(
            f"layer {index} of {model_type!r} has an attention index, which kvtune knows for MLA models only"
        )
    return LayerKind(role)


def layer_kinds(config: Fields, family: Family, model_type: str) -> tuple[LayerKind, ...]:
    """The kind of each layer, from the config's list where it has one, else from the family's rule."""
    listed = config.sequence(family.layer_types_field)
    counted = config.optional("num_hidden_layers", MAX_LAYERS)
    if listed is None:
        pattern = config.text("hybrid_override_pattern")
        count = counted if counted is not None else len(pattern or "")
        roles = family.pattern(
            config, min(count, MAX_LAYERS) or config.number("num_hidden_layers", MAX_LAYERS)
        )
    else:
        roles = tuple(_role(word, i, family.layer_types_field) for i, word in enumerate(listed))
        if not roles or (counted is not None and counted != len(roles)):
            raise UnsupportedModelError(
                f"config field {family.layer_types_field!r} lists {len(roles)} layers, "
                f"'num_hidden_layers' says {show(counted)}"
            )
    return tuple(_resolve(role, family, i, model_type) for i, role in enumerate(roles))


_PLAIN = Family()
_WINDOWED = Family(pattern=_uniform_window)
_QWEN = Family(pattern=_upper_window, defaults={"max_window_layers": 28})
_QWEN3 = Family(pattern=_upper_window, defaults={"max_window_layers": 28, "head_dim": 128})
_LISTED = Family(pattern=_full_or_listed)
_HEAD_DIM_128 = Family(defaults={"head_dim": 128})
_GDN_DEFAULTS: Final = {
    "full_attention_interval": 4, "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_GATED_DELTA = Family(
    pattern=_every("full_attention_interval", _RECURRENT),
    recurrent=LayerKind.LINEAR,
    defaults=_GDN_DEFAULTS,
)
_MLA = Family(attention=LayerKind.MLA)
_GEMMA3 = Family(
    pattern=_every("sliding_window_pattern", LayerKind.SLIDING),
    aliases={"sliding_window_pattern": "_sliding_window_pattern"},
    # the 4B and 12B files leave these out
    defaults={
        "sliding_window_pattern": 6, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
)  # fmt: skip
_GEMMA3N = Family(
    pattern=_every("sliding_window_pattern", LayerKind.SLIDING),
    defaults={
        "sliding_window_pattern": 5, "num_hidden_layers": 35, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "sliding_window": 512, "num_kv_shared_layers": 15,
    },
)  # fmt: skip
_GEMMA4 = Family(
    pattern=_every("sliding_window_pattern", LayerKind.SLIDING),
    defaults={
        "sliding_window_pattern": 6, "num_hidden_layers": 30, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 512, "global_head_dim": 512,
    },
    full_overrides={"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"},
    gated_overrides={"num_key_value_heads": "attention_k_eq_v"},
)  # fmt: skip
_LLAMA4 = Family(
    pattern=_no_rope,
    defaults={"no_rope_layer_interval": 4, "head_dim": 128, "attention_chunk_size": 8192},
)
_GPT2_NAMES: Final = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
}
_SLIDES_3_OF_4 = Family(
    pattern=_every("sliding_window_pattern", LayerKind.SLIDING),
    defaults={"sliding_window_pattern": 4, "sliding_window": 4096},
)

_MAMBA2_NAMES: Final = {
    "mamba_num_heads": "mamba_n_heads", "mamba_head_dim": "mamba_d_head", "ssm_state_size": "mamba_d_state",
    "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv",
}  # fmt: skip
_KIMI_HEADS = ("linear_num_heads", "linear_attn_config.num_heads")
_KIMI_DIM = ("linear_head_dim", "linear_attn_config.head_dim")
_KIMI_LINEAR = Family(
    pattern=_kimi_layers, attention=LayerKind.MLA, recurrent=LayerKind.LINEAR, state_dtype="float32",
    aliases={
        "linear_num_key_heads": _KIMI_HEADS, "linear_num_value_heads": _KIMI_HEADS,
        "linear_key_head_dim": _KIMI_DIM, "linear_value_head_dim": _KIMI_DIM,
        "linear_conv_kernel_dim": "linear_attn_config.short_conv_kernel_size",
        "max_position_embeddings": "model_max_length",
    },
)  # fmt: skip
_SHORT_CONV = Family(pattern=_chosen("full_attn_idxs", LayerKind.CONV, without=_ATTENTION))

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({
    "llama": _PLAIN, "gemma": Family(defaults={"head_dim": 256}), "olmo": _PLAIN, "olmo2": _PLAIN,
    "granite": _PLAIN, "granitemoe": _PLAIN, "glm": _HEAD_DIM_128,
    "glm4": _HEAD_DIM_128, "phi": _PLAIN, "stablelm": _PLAIN, "arcee": _PLAIN,
    "apertus": _PLAIN, "gpt_neox": _PLAIN, "seed_oss": _HEAD_DIM_128,
    "cohere": _PLAIN, "ernie4_5": _HEAD_DIM_128, "ernie4_5_moe": _PLAIN, "glm4_moe": _PLAIN,
    "granitemoeshared": _PLAIN, "minimax_m2": _HEAD_DIM_128, "nemotron": _PLAIN, "olmoe": _PLAIN,
    "opt": _PLAIN, "persimmon": _PLAIN, "hunyuan_v1_dense": _PLAIN, "flex_olmo": _PLAIN,
    "solar_open": _HEAD_DIM_128, "hy_v3": _HEAD_DIM_128,
    "phimoe": _WINDOWED,
    "mistral": _WINDOWED, "mixtral": _WINDOWED, "phi3": _WINDOWED, "starcoder2": _WINDOWED,
    "ministral": _WINDOWED, "ministral3": _WINDOWED,
    "qwen2": _QWEN, "qwen3": _QWEN3,
    "qwen2_moe": _LISTED, "qwen3_moe": _LISTED, "smollm3": _LISTED,
    "qwen2_vl": _LISTED, "qwen2_vl_text": _LISTED, "qwen2_5_vl": _LISTED, "qwen2_5_vl_text": _LISTED,
    "qwen3_vl_text": _HEAD_DIM_128, "qwen3_vl_moe_text": _PLAIN,
    "gpt2": Family(aliases=_GPT2_NAMES), "gptj": Family(aliases=_GPT2_NAMES),
    "gpt_bigcode": Family(aliases=_GPT2_NAMES, defaults={"multi_query": True}),
    "falcon": Family(
        aliases={"num_key_value_heads": "num_kv_heads"}, defaults={"multi_query": True}
    ),
    "gemma2": Family(
        pattern=_every("sliding_window_pattern", LayerKind.SLIDING),
        defaults={"sliding_window_pattern": 2, "head_dim": 256, "sliding_window": 4096},
    ),
    "gemma3": _GEMMA3, "gemma3_text": _GEMMA3, "gemma3n": _GEMMA3N, "gemma3n_text": _GEMMA3N,
    "gemma4": _GEMMA4, "gemma4_text": _GEMMA4,
    "cohere2": _SLIDES_3_OF_4, "olmo3": _SLIDES_3_OF_4, "exaone4": _SLIDES_3_OF_4,
    "exaone_moe": _SLIDES_3_OF_4,
    "gpt_oss": Family(
        pattern=_every("sliding_window_pattern", LayerKind.SLIDING),
        defaults={"sliding_window_pattern": 2, "head_dim": 64, "sliding_window": 128},
    ),
    "llama4": _LLAMA4, "llama4_text": _LLAMA4,
    "deepseek_v2": _MLA, "deepseek_v3": _MLA, "deepseek_v32": _MLA, "kimi_k2": _MLA, "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA, "mistral4": _MLA, "kimi_linear": _KIMI_LINEAR,
    "qwen3_next": _GATED_DELTA, "olmo_hybrid": Family(
        pattern=_every("full_attention_interval", _RECURRENT), recurrent=LayerKind.LINEAR,
        defaults={"full_attention_interval": 4},
    ),
    "qwen3_5": _GATED_DELTA, "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe": _GATED_DELTA, "qwen3_5_moe_text": _GATED_DELTA,
    "lfm2": _SHORT_CONV, "lfm2_moe": _SHORT_CONV,
    "bamba": Family(
        pattern=_chosen("attn_layer_indices", _RECURRENT, without=_RECURRENT),
        recurrent=LayerKind.MAMBA2, aliases=_MAMBA2_NAMES,
    ),
    "granitemoehybrid": Family(
        pattern=_all_recurrent, recurrent=LayerKind.MAMBA2, aliases=_MAMBA2_NAMES,
    ),
    "falcon_h1": Family(beside=LayerKind.MAMBA2, aliases=_MAMBA2_NAMES),
    "jamba": Family(
        pattern=_offset_period, recurrent=LayerKind.MAMBA1,
        defaults={
            "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_expand": 2, "mamba_d_state": 16,
            "mamba_d_conv": 4,
        },
    ),
    "nemotron_h": Family(
        pattern=_letters, recurrent=LayerKind.MAMBA2, layer_types_field="layers_block_type",
        state_dtype="float32",
        aliases={
            "head_dim": "attention_head_dim", "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv",
        },
    ),
})  # fmt: skip
