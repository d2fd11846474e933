"""Tiny random-weight model folders, one per family, for tests and demonstrations.

Weights are initialised wider than Transformers does, so that greedy outputs are diverse: a decoder
whose residual stream is dominated by its last token repeats itself and would hide a wrong cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtune.errors import UsageError

__all__ = ["REFUSED_FAMILIES", "SERVED_FAMILIES", "tiny_config", "write_model_folder"]

SERVED_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_oss")
"""Families the engine serves."""

REFUSED_FAMILIES = ("falcon", "gptj", "qwen3_next", "llama4", "deepseek_v3")
"""Families whose attention the engine cannot reach or whose layers it cannot hold."""

_FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"new_decoder_architecture": True, "alibi": False},
    "gptj": {"rotary_dim": 16},
    "qwen3_next": {
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "llama4": {
        "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 32,
    },
    "deepseek_v3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    },
}  # fmt: skip

_MODEL_TYPES = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
_WINDOWED = {"mistral", "gemma2", "gemma3", "phi3", "gpt_oss"}


def tiny_config(
    family: str,
    *,
    head_dim: int = 32,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    num_layers: int = 2,
    hidden_size: int = 64,
    vocab_size: int = 211,
    window: int | None = 24,
    max_position_embeddings: int = 512,
    **overrides: Any,
) -> PreTrainedConfig:
    """A small config of `family`. `window` [tokens] applies to the families that have one; families
    with mixed layers alternate sliding and full attention. `overrides` win over everything else."""
    if family not in _FAMILY_SETTINGS:
        raise UsageError(f"unknown model family {family!r}; known: {', '.join(_FAMILY_SETTINGS)}")
    settings: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers, "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads, "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family in _WINDOWED:
        settings["sliding_window"] = window
    if family in ("gemma2", "gemma3", "gpt_oss"):
        settings["layer_types"] = [
            "sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(num_layers)
        ]
    if family in ("gemma2", "gemma3"):
        settings["query_pre_attn_scalar"] = head_dim
    if family == "gpt_oss":
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "phi3":
        settings["hidden_size"] = num_heads * head_dim  # Transformers checks the factors against this
        settings |= _longrope(head_dim, max_position_embeddings)
    if family == "deepseek_v3":
        settings["num_key_value_heads"] = num_heads
    if family == "qwen3_next":
        settings["layer_types"] = ["linear_attention", "full_attention"] * (num_layers // 2)
    if family == "falcon":
        settings["num_kv_heads"] = settings.pop("num_key_value_heads")
    if family in ("falcon", "gptj", "deepseek_v3"):
        settings.pop("head_dim")
    settings |= _FAMILY_SETTINGS[family] | overrides
    return AutoConfig.for_model(_MODEL_TYPES.get(family, family), **settings)


def _longrope(head_dim: int, max_position_embeddings: int) -> dict[str, Any]:
    """LongRoPE whose long and short factors differ visibly; the original length is a quarter."""
    pairs = head_dim // 2
    return {
        "original_max_position_embeddings": max_position_embeddings // 4,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.02 * pair for pair in range(pairs)],
            "long_factor": [1.5 + 0.1 * pair for pair in range(pairs)],
            "original_max_position_embeddings": max_position_embeddings // 4,
        },
    }


def write_model_folder(
    path: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Write config.json and model.safetensors of a random `tiny_config(family, **settings)` model."""
    config = tiny_config(family, **settings)
    generator = torch.Generator().manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _widen(model, generator)
    model.generation_config.eos_token_id = config.eos_token_id
    model.to(dtype).save_pretrained(path)
    return path


@torch.no_grad()
def _widen(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Unit-gain matrices, a wide attention and noisy norms, biases and sinks.

    A residual branch writes about as much as it reads, so the next token depends on the context and
    not only on the last token.
    """
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "embed" in name or "wte" in name:
            weight.copy_(0.5 * noise)
        elif weight.ndim >= 2:
            fan_in = weight.shape[-2] if weight.ndim == 3 else weight.shape[-1]
            gain = 3.0 if "lm_head" in name else 1.6
            weight.copy_(noise * gain / fan_in**0.5)
        elif "norm" in name or "ln_" in name:
            weight.add_(0.1 * noise)
        else:
            weight.copy_(0.5 * noise)
