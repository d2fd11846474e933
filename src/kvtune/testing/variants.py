"""Harder twins of a small model, made when it is loaded: its weights, and a KV cache that is hard to encode.

| variant | what changes | full-precision outputs |
|---|---|---|
| `biased_keys` | a constant of many deviations on one RoPE pair of every key head | bit-equal |
| `heavy_tailed_values` | value channels scaled by powers of two, undone in o_proj | bit-equal |
| `sliding_window` | layers attend within a window | another model's |

The first two keep every bit of the logits in float32 and bfloat16 while K and V are stored as computed, in
prefill and in decode: what a codec then loses is the codec's doing. Large key biases are what makes plain
4-bit keys fail on Qwen2-like models; a wide spread of channel magnitudes is what one scale per token and
head cannot cover.

Comparing bits needs weights that lie equally aligned, for float32 products depend on it; a model in float32
read from a float32 file has them mapped as the file holds them.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvtune.errors import UnsupportedModelError, UsageError
from kvtune.model_folder import TOKENIZER_FILES, read_config, weight_files

__all__ = [
    "VARIANTS",
    "BiasedKeys",
    "HeavyTailedValues",
    "SlidingWindow",
    "Variant",
    "transform_model",
    "write_variant",
]

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

_COPIED_FILES: Final = (
    *TOKENIZER_FILES, "generation_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "merges.txt",
)  # fmt: skip
_PROBE_TOKENS: Final = 512
"""Tokens drawn at random to measure the keys' deviation, where no text is given."""
_FEWEST_TOKENS: Final = 16


class Variant(ABC):
    """A transform of (config.json, weights). `families`: values of `model_type` it knows."""

    families: ClassVar[frozenset[str]]

    def apply(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[Config, Tensors]:
        """The variant's config and weights; the arguments are left alone. UnsupportedModelError names what
        the model lacks."""
        if config.get("model_type") not in self.families:
            raise UnsupportedModelError(
                f"{type(self).__name__} knows {', '.join(sorted(self.families))}; "
                f"the model is {config.get('model_type')}"
            )
        return self._apply(dict(config), dict(tensors))

    @abstractmethod
    def _apply(self, config: Config, tensors: Tensors) -> tuple[Config, Tensors]: ...


@dataclass(frozen=True, kw_only=True)
class BiasedKeys(Variant):
    """A k_proj bias of `sigma` standard deviations of the head's keys, on the slowest RoPE pair alone.

    RoPE would turn a bias elsewhere into a change of the scores. On this pair (elements head_dim / 2 - 1 and
    head_dim - 1) every query is zero, before and after rotation, so the bias adds exact zeros to each score.
    Needs a model whose q rows of that pair are zero, as the bundled one is trained; refused otherwise.
    Written as Llama's `attention_bias`, with zero biases on q, v and o. The deviation is measured over
    `token_ids`, or over tokens drawn with `seed`.
    """

    families: ClassVar[frozenset[str]] = frozenset({"llama"})
    sigma: float = 10.0
    """Around 20 the range is so wide that int8 keys, too, come near a gate's margin."""
    token_ids: Sequence[int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise UsageError(f"sigma must be finite and at least 0, found {self.sigma}")
        if self.token_ids is not None and len(self.token_ids) < _FEWEST_TOKENS:
            raise UsageError(
                f"a deviation needs at least {_FEWEST_TOKENS} token_ids, found {len(self.token_ids)}"
            )

    def _apply(self, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        if config.get("attention_bias"):
            raise UnsupportedModelError("the model's attention has biases already, biased keys need none")
        heads, kv_heads, dim = _geometry(config)
        pair = [dim // 2 - 1, dim - 1]
        for name in _names(tensors, "self_attn.q_proj.weight"):
            if tensors[name].view(heads, dim, -1)[:, pair].count_nonzero():
                raise UnsupportedModelError(
                    f"{name}: rows {pair} of a head are not zero, so a key bias there would change the "
                    "outputs; train the model with the slowest RoPE pair of its queries held at zero"
                )
        deviations = self._key_deviations(config, tensors, kv_heads)
        config["attention_bias"] = True
        for side in ("q", "k", "v", "o"):
            for name in _names(tensors, f"self_attn.{side}_proj.weight"):
                weight = tensors[name]
                bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
                if side == "k":
                    amount = self.sigma * deviations[name]
                    bias.view(kv_heads, dim)[:, pair] = amount.to(weight.dtype)[:, None]
                tensors[name.removesuffix("weight") + "bias"] = bias
        return config, tensors

    @torch.no_grad()
    def _key_deviations(self, config: Config, tensors: Tensors, kv_heads: int) -> Tensors:
        """Per k_proj weight name: each head's deviation over tokens, root mean square over elements [h]."""
        ids = self.token_ids
        if ids is None:
            ids = np.random.default_rng(self.seed).integers(config["vocab_size"], size=_PROBE_TOKENS).tolist()
        if not 0 <= min(ids) <= max(ids) < config["vocab_size"]:
            raise UsageError(
                f"token_ids must lie in 0..{config['vocab_size'] - 1}, found {min(ids)}..{max(ids)}"
            )
        model = _build(config, tensors, torch.float32)
        found: Tensors = {}

        def measure(name: str) -> Any:
            def hook(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
                keys = out[0].unflatten(-1, (kv_heads, -1))  # [T, h, d]
                found[f"{name}.weight"] = keys.var(0).mean(-1).sqrt()

            return hook

        for name, module in model.named_modules():
            if name.endswith("self_attn.k_proj"):
                module.register_forward_hook(measure(name))
        limit = int(config["max_position_embeddings"])
        model(torch.tensor([list(ids)[:limit]]), use_cache=False)
        return found


@dataclass(frozen=True, kw_only=True)
class HeavyTailedValues(Variant):
    """Value channels scaled by 2^e, e geometric: P(e >= n) = 2^-(n / spread), the binary exponent of a Pareto
    variable of tail index 1 / `spread`. v_proj is multiplied, the columns of o_proj are divided.

    Products with powers of two are exact in binary floating point, so v, the attention's output and o_proj's
    products carry the factor or its inverse without a rounding of their own: logits keep every bit, as long
    as nothing over- or underflows (`max_exponent` keeps bfloat16 and float32 far from that; float16 is not
    promised). A codec with one scale per token and head spends its range on the large channels.
    """

    families: ClassVar[frozenset[str]] = frozenset({"llama", "mistral", "ministral", "qwen2"})
    spread: float = 1.0
    max_exponent: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.spread > 0 or not 0 <= self.max_exponent <= 16:
            raise UsageError(
                f"spread must be above 0 and max_exponent in 0..16, found {self.spread}, {self.max_exponent}"
            )

    def _apply(self, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        heads, kv_heads, dim = _geometry(config)
        rng = np.random.default_rng(self.seed)
        for name in _names(tensors, "self_attn.v_proj.weight"):
            drawn = np.floor(rng.exponential(self.spread / np.log(2), size=(kv_heads, dim)))
            factor = torch.from_numpy(np.exp2(np.minimum(drawn, self.max_exponent)))
            scaled = [name, name.removesuffix("weight") + "bias"]
            for side in scaled[: 1 + (scaled[1] in tensors)]:
                rows = tensors[side]
                tensors[side] = rows * factor.flatten().to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
            output = name.replace("v_proj", "o_proj")
            columns = factor.repeat_interleave(heads // kv_heads, dim=0).flatten().to(tensors[output].dtype)
            tensors[output] = tensors[output] / columns
        return config, tensors


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Variant):
    """The same weights as a Ministral: every other layer, first layer included, or all layers attend to the
    last `window` tokens only. With `every_other` an engine holds two KV cache groups."""

    families: ClassVar[frozenset[str]] = frozenset({"llama"})
    window: int = 256
    every_other: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"window must be at least 1 token, found {self.window}")

    def _apply(self, config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise UnsupportedModelError("a sliding-window twin has no biases, the model has")
        count = int(config["num_hidden_layers"])
        config |= {
            "model_type": "ministral", "architectures": ["MinistralForCausalLM"],
            "sliding_window": self.window,
            "layer_types": ["full_attention" if self.every_other and i % 2 else "sliding_attention"
                            for i in range(count)],
        }  # fmt: skip
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            config.pop(name, None)
        return config, tensors


VARIANTS: Final[Mapping[str, type[Variant]]] = MappingProxyType(
    {"biased_keys": BiasedKeys, "heavy_tailed_values": HeavyTailedValues, "sliding_window": SlidingWindow}
)


def write_variant(source: Path, out: Path, variant: Variant) -> Path:
    """Write the variant of a model folder as another model folder, tokenizer included; returns `out`.

    Weights keep their dtype. InputFileError if `source` is no model folder, UsageError if `out` holds files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"the variant needs a new or empty folder, found files in {out}")
    tensors: Tensors = {}
    for file in weight_files(source):
        tensors |= load_file(file)
    config, tensors = variant.apply(read_config(source), tensors)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return out


def transform_model(model: PreTrainedModel, variant: Variant) -> PreTrainedModel:
    """The variant of a loaded model, in its dtype, as a new model; weights that do not change are shared."""
    config, tensors = variant.apply(model.config.to_dict(), model.state_dict())
    built = _build(config, tensors, model.dtype)
    built.generation_config = model.generation_config
    return built


def _build(config: Config, tensors: Tensors, dtype: torch.dtype) -> PreTrainedModel:
    """A model from memory, eager attention, in eval mode."""
    settings = {name: value for name, value in config.items() if name not in ("model_type", "dtype")}
    made = AutoConfig.for_model(config["model_type"], **settings)
    model: Any = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="eager")
    report = model.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, strict=False, assign=True)
    model.tie_weights()
    missing = set(report.missing_keys) - ({"lm_head.weight"} if made.tie_word_embeddings else set[str]())
    if missing or report.unexpected_keys:
        odd = sorted(missing or report.unexpected_keys)[0]
        raise UnsupportedModelError(f"{config['model_type']}: the variant's weights do not fit, first {odd}")
    return model.eval().requires_grad_(False)


def _geometry(config: Config) -> tuple[int, int, int]:
    """(query heads, KV heads, head dim)."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return heads, kv_heads, int(config.get("head_dim") or config["hidden_size"] // heads)


def _names(tensors: Tensors, suffix: str) -> list[str]:
    """Weights of all layers with this suffix; UnsupportedModelError where there is none."""
    names = sorted(name for name in tensors if name.endswith(suffix))
    if not names:
        raise UnsupportedModelError(f"the model has no weights {suffix}")
    return names
