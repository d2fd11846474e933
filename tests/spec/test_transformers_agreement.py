"""Every row of the family table against the Transformers config class of that model type."""

from __future__ import annotations

from typing import Any

import pytest

from kvtune.plan import bundled_models, find_model
from kvtune.spec import LayerKind, ModelSpec
from kvtune.spec._families import FAMILIES

transformers = pytest.importorskip("transformers")
REMOTE_ONLY = {"kimi_k2"}  # published with its own code, DeepSeek-V3's fields
HEADS = {LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED}
SAME = {"linear_attention": {LayerKind.LINEAR, LayerKind.MAMBA1, LayerKind.MAMBA2}, "moe": {LayerKind.NONE},
        "mlp": {LayerKind.NONE}, "indexed_attention": {LayerKind.MLA},
        "full_attention": {LayerKind.FULL, LayerKind.MLA}, "sliding_attention": {LayerKind.SLIDING},
        "chunked_attention": {LayerKind.CHUNKED}, "conv": {LayerKind.CONV},
        "hybrid": {LayerKind.FULL}}  # fmt: skip
MODEL_TYPES = sorted(set(FAMILIES) - REMOTE_ONLY)


def config_of(model_type: str) -> Any:
    return transformers.CONFIG_MAPPING[model_type]().get_text_config()


def globally(config: Any) -> Any:
    """Lets Gemma 4's config tell the value that layers without one of their own have."""
    config.allow_global_per_layer_attribute_access = True
    return config


def unshared(spec: ModelSpec) -> list[tuple[int, LayerKind]]:
    return [(layer.index, layer.kind) for layer in spec.layers if layer.kind is not LayerKind.SHARED]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layer_kinds_are_those_of_the_config_class(model_type: str) -> None:
    config = config_of(model_type)
    spec = ModelSpec.from_config(config.to_dict())
    assert len(spec.layers) == config.num_hidden_layers
    for index, kind in unshared(spec):
        listed = getattr(config, "layer_types", None)
        if listed is not None:
            assert kind in SAME[listed[index]]


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if "layer_types" in config_of(t).to_dict()])
def test_the_familys_own_rule_gives_the_same_kinds_as_the_saved_list(model_type: str) -> None:
    saved = config_of(model_type).to_dict()
    listed = ModelSpec.from_config(saved)
    bare = ModelSpec.from_config({key: value for key, value in saved.items() if key != "layer_types"})
    assert bare.layers == listed.layers


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_heads_head_dims_and_windows_are_those_of_the_config_class(model_type: str) -> None:
    config = globally(config_of(model_type))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if model_type == "falcon":
        heads = 1  # multi_query
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    overridden = {int(i) for i in (config.to_dict().get("per_layer_config") or {})}
    for layer in ModelSpec.from_config(config.to_dict()).layers:
        if layer.kind in HEADS and layer.index not in overridden:
            assert (layer.num_kv_heads, layer.k_head_dim, layer.v_head_dim) == (heads, dim, dim)
        if layer.kind is LayerKind.SLIDING:
            assert layer.window == config.sliding_window


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_values_that_files_leave_out_are_the_config_classs_defaults(model_type: str) -> None:
    config = globally(config_of(model_type))
    for name, value in FAMILIES[model_type].defaults.items():
        if hasattr(config, name):
            assert getattr(config, name) == value, name


@pytest.mark.parametrize("name", bundled_models())
def test_a_bundled_file_reads_the_same_as_the_config_transformers_makes_of_it(name: str) -> None:
    raw = {key: value for key, value in find_model(name).config.items() if key != "quantization_config"}
    if raw["model_type"] in REMOTE_ONLY:
        pytest.skip("published with its own code")
    made = transformers.CONFIG_MAPPING[raw["model_type"]](**raw)
    assert ModelSpec.from_config(made.to_dict()).layers == ModelSpec.from_config(raw).layers
