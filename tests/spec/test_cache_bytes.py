"""Predicted bytes against real caches: what Transformers keeps and what our own pool's arenas reference.

Real head geometry, few layers, short windows: the hidden size, the vocabulary and the experts are shrunk,
which no byte of a cache depends on.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from kvtune.cache import cache_manager
from kvtune.config import CacheConfig
from kvtune.plan import find_model
from kvtune.spec import (
    AllocatorModel,
    KVFormat,
    LayerKind,
    ModelSpec,
    Paging,
    growth_bytes_per_token,
    layer_token_bytes,
    logical_bytes,
    plan_arenas,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvtune.engine.arenas import allocate_arenas  # noqa: E402
from kvtune.engine.telemetry import memory_report  # noqa: E402

WINDOW, NUM_TOKENS, BLOCK = 64, 150, 16
BF16 = KVFormat.of("bf16")
SHRUNK = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "vocab_size": 128, "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8, "num_local_experts": 2, "num_experts": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "top_k_experts": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
ALWAYS = {"hidden_size", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
ATTENTION = {
    "meta-llama/Llama-3.1-8B": 2, "Qwen/Qwen3-32B": 2, "Qwen/Qwen2.5-7B-Instruct": 2,
    "Qwen/Qwen3-30B-A3B": 2, "mistralai/Mistral-7B-v0.1": 2, "mistralai/Mixtral-8x7B-v0.1": 2,
    "microsoft/phi-4": 2, "openai/gpt-oss-20b": 4, "google/gemma-2-27b-it": 4, "google/gemma-3-27b-it": 6,
    "google/gemma-4-26B-A4B-it": 6, "allenai/Olmo-3-7B-Instruct": 4, "LGAI-EXAONE/EXAONE-4.0-32B": 4,
    "HuggingFaceTB/SmolLM3-3B": 4, "zai-org/GLM-4.7": 2, "MiniMaxAI/MiniMax-M2.5": 2,
}  # fmt: skip
"""Bundled model -> how many of its layers to build."""


def small(name: str, num_layers: int) -> dict[str, Any]:
    """The model's text config with its own head geometry and the first `num_layers` of its layer kinds."""
    source = copy.deepcopy(dict(find_model(name).config))
    text = {**source.get("text_config", source)}
    spec = ModelSpec.from_config(source)
    text.pop("quantization_config", None)
    text |= {key: value for key, value in SHRUNK.items() if key in text or key in ALWAYS}
    text |= {"num_hidden_layers": num_layers, "torch_dtype": "bfloat16"}
    for listed in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(text.get(listed), list):
            text[listed] = text[listed][:num_layers]
    if text.get("sliding_window"):
        text["sliding_window"] = WINDOW
    if not text.get("head_dim"):
        text["head_dim"] = next(layer.k_head_dim for layer in spec.layers if layer.k_head_dim)
    return text


def built(text: dict[str, Any]) -> Any:
    fields = {key: value for key, value in text.items() if key != "model_type"}
    config = transformers.CONFIG_MAPPING[text["model_type"]](**fields)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def cached_bytes(model: Any) -> int:
    """Bytes of keys and values in Transformers' own cache after one prefill of NUM_TOKENS tokens."""
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.arange(NUM_TOKENS)[None] % 120 + 3
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("name", ATTENTION)
def test_transformers_own_cache_holds_the_planned_bytes(name: str) -> None:
    """A window of W is kept as min(n, W - 1) tokens there: the newest token's own key is the W-th."""
    text = small(name, ATTENTION[name])
    spec = ModelSpec.from_config(text)
    bundled = ModelSpec.from_config(find_model(name).config)
    for layer, whole in zip(spec.layers, bundled.layers, strict=False):
        assert (layer.kind, layer.num_kv_heads) == (whole.kind, whole.num_kv_heads)
        assert (layer.k_head_dim, layer.v_head_dim) == (whole.k_head_dim, whole.v_head_dim)
    newest = sum(layer_token_bytes(layer, BF16) for layer in spec.layers if layer.window is not None)
    planned = logical_bytes(spec, NUM_TOKENS, BF16) - newest
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cached_bytes(built(text)) == planned
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("k", "v"), [("bf16", "bf16"), ("int8", "int4")])
@pytest.mark.parametrize("name", ATTENTION)
def test_our_pool_references_the_allocator_bytes_at_its_peak_and_keeps_what_left_a_window_idle(
    name: str, k: str, v: str
) -> None:
    """One sequence, prefilled in steps of `chunk` after a first one that leaves the window off a block
    boundary, which is when a window spans the most blocks."""
    spec = ModelSpec.from_config(small(name, ATTENTION[name]))
    chunk = 128
    num_tokens = WINDOW - 2 + 11 * chunk
    cache = CacheConfig(kv_budget="256MiB", k_codec=k, v_codec=v, block_size=BLOCK)
    arenas_plan = plan_arenas(spec, cache, max_model_len=2048, max_num_seqs=1, chunk=chunk)
    arenas = allocate_arenas(arenas_plan, cache)
    manager = cache_manager(arenas_plan, cache, fingerprint=b"")
    model = AllocatorModel(spec, KVFormat.of(k, v), "kvtune", Paging(block_size=BLOCK, chunk=chunk))
    ids = tuple(range(num_tokens))
    done, peak, step = 0, 0, WINDOW - 2
    while done < num_tokens:
        done = min(num_tokens, done + step)
        assert manager.allocate("a", done, token_ids=ids if not peak else None) is not None
        report = memory_report(manager, arenas_plan, arenas)
        assert report.referenced_bytes == report.predicted_referenced_bytes
        peak, step = max(peak, report.referenced_bytes), chunk
        manager.commit("a", ids, done)
    assert peak == model.bytes(num_tokens)
    report = memory_report(manager, arenas_plan, arenas)
    has_window = any(layer.window is not None for layer in spec.layers)
    assert (report.idle_bytes > 0) is has_window
    assert report.referenced_bytes <= model.bytes(num_tokens)
    assert report.allocated_bytes == arenas_plan.total_bytes


HYBRID = {"Qwen/Qwen3-Next-80B-A3B-Instruct": 4, "Qwen/Qwen3.5-27B": 4, "tiiuae/Falcon-H1-7B-Instruct": 2}


@pytest.mark.parametrize("name", HYBRID)
def test_the_attention_layers_of_a_hybrid_and_its_state_are_what_transformers_keeps(name: str) -> None:
    text = small(name, HYBRID[name])
    spec = ModelSpec.from_config(text)
    model = built(text)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(NUM_TOKENS)[None] % 120 + 3, past_key_values=cache, use_cache=True)
    grown = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    kept = sum(t.numel() * t.element_size() for layer in grown for t in (layer.keys, layer.values))
    assert kept == NUM_TOKENS * growth_bytes_per_token(spec, BF16)
    states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
    recurrent = [layer for layer in spec.layers if layer.state_bytes]
    assert [state.numel() for state in states] == [layer.state_elements for layer in recurrent]
    convolutions = [layer.conv_states[0] for layer in cache.layers if hasattr(layer, "conv_states")]
    for convolution, layer in zip(convolutions, recurrent, strict=True):
        channels, taps = convolution.shape[1:]  # Transformers keeps the newest input as well
        assert layer.conv_elements in (channels * taps, channels * (taps - 1))


def test_kinds_a_layer_list_mixes_are_sized_one_by_one() -> None:
    spec = ModelSpec.from_config(small("google/gemma-3-27b-it", 6))
    assert [layer.kind for layer in spec.layers] == [LayerKind.SLIDING] * 5 + [LayerKind.FULL]
    wide = KVFormat.of("bf16")
    narrow = dataclasses.replace(wide, overrides={5: (KVFormat.of("int8").k, KVFormat.of("int8").v)})
    saved = layer_token_bytes(spec.layers[5], wide) - layer_token_bytes(spec.layers[5], narrow)
    assert logical_bytes(spec, 1000, wide) - logical_bytes(spec, 1000, narrow) == 1000 * saved
