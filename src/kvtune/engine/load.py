"""Load a decoder from a folder, or refuse it by name: allow-list of layer kinds, RoPE kind, self-test.

Failures of a model outside the list are silent (masks that only exist in the mask, state outside
the cache, attention that never reaches the registry), so nothing is served on trust.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvtune.config import EngineConfig
from kvtune.engine.attention import ATTENTION_NAME, register_attention
from kvtune.engine.decoder import Decoder, can_pack, fused_decoder
from kvtune.engine.detokenizer import TokenDecoder
from kvtune.engine.rope import fix_rope, rope_regime
from kvtune.engine.self_test import check_packed_equals_eager
from kvtune.errors import InputFileError, UnsupportedModelError, UsageError
from kvtune.model_folder import (
    config_sha256,
    files_sha256,
    has_tokenizer,
    read_config,
    tokenizer_sha256,
    weight_files,
)
from kvtune.spec import LayerKind, ModelSpec

__all__ = ["SERVED_KINDS", "LoadedModel", "load_model", "read_spec"]

SERVED_KINDS = frozenset({LayerKind.FULL, LayerKind.SLIDING})
"""Layer kinds the engine can hold; everything else is refused by name."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError,
               StrictDataclassError)  # fmt: skip
"""What Transformers raises over files that are damaged or do not belong together."""

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that passed the self-test, its weights ready to be shared by several engines.

    The model's attention and, under longrope, its RoPE frequencies are set for kvtune: do not run
    `model.generate` on it. Digests are hexadecimal SHA-256.
    """

    model: PreTrainedModel
    spec: ModelSpec
    path: Path | None
    tokenizer: TokenDecoder | None
    dtype: torch.dtype
    max_model_len: int
    rope_regime: str
    vocab_size: int
    eos_token_ids: frozenset[int]
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str | None
    decoder: Decoder | None = None
    """Its forward pass with merged matrices, where its architecture has one; else Transformers runs it."""

    def check_settings(self, config: EngineConfig) -> None:
        """UsageError unless an engine with these settings can share the model: its dtype, its length and,
        under longrope, its regime are what they were when it was loaded."""
        if config.dtype != "auto" and _DTYPES[config.dtype] != self.dtype:
            raise UsageError(
                f"dtype {config.dtype} asked for, the loaded model is {self.dtype}; load it again"
            )
        length = config.max_model_len or self.max_model_len
        if length > self.max_model_len:
            raise UsageError(f"max_model_len {length} is beyond the loaded model's {self.max_model_len}")
        regime = rope_regime(self.model.config.get_text_config(), length)
        if regime != self.rope_regime:
            raise UsageError(
                f"max_model_len {length} needs RoPE regime {regime}, the loaded model has "
                f"{self.rope_regime}; load it with that max_model_len"
            )


def load_model(
    source: str | Path | PreTrainedModel,
    config: EngineConfig | None = None,
    *,
    tokenizer: TokenDecoder | None = None,
) -> LoadedModel:
    """Load, check and self-test a model folder (safetensors, local files, no remote code) or a model object.

    A model object is changed in place (attention function, RoPE regime). `tokenizer`: instead of the
    folder's own. Raises InputFileError for a folder that is not a model, UnsupportedModelError naming
    layer and kind for a model kvtune cannot serve, UsageError for a `max_model_len` beyond the model's.
    """
    config = config or EngineConfig()
    path = None if isinstance(source, PreTrainedModel) else Path(source)
    raw = cast(PreTrainedModel, source).config.to_dict() if path is None else read_config(path)
    spec = _served_spec(raw)
    register_attention()
    model = cast(PreTrainedModel, source) if path is None else _read_weights(path, config.dtype)
    model.eval()
    model.requires_grad_(False)
    text_config: Any = model.config.get_text_config()
    max_model_len = _model_len(text_config, config.max_model_len)
    regime = rope_regime(text_config, max_model_len)
    fix_rope(model, regime)
    _use_attention(model)
    is_fused = check_packed_equals_eager(model, spec)
    weights_sha256 = _tensors_sha256(model) if path is None else files_sha256(weight_files(path))
    return LoadedModel(
        model=model,
        decoder=_decoder(model, is_ours=path is not None) if is_fused else None,
        spec=spec,
        path=path,
        tokenizer=_read_tokenizer(path) if tokenizer is None and path is not None else tokenizer,
        dtype=model.dtype,
        max_model_len=max_model_len,
        rope_regime=regime,
        vocab_size=int(text_config.vocab_size),
        eos_token_ids=_eos_token_ids(model),
        weights_sha256=weights_sha256,
        config_sha256=config_sha256(raw),
        tokenizer_sha256=None if path is None else tokenizer_sha256(path),
    )


def _decoder(model: PreTrainedModel, *, is_ours: bool) -> Decoder | None:
    """`is_ours`: nobody else holds the model, so its modules need no copies of packed weights."""
    decoder = fused_decoder(model)
    if decoder is not None and can_pack(model.dtype):
        decoder.pack(keep=not is_ours)
    return decoder


def read_spec(path: Path) -> ModelSpec:
    """The KV layout of a model folder, without its weights. UnsupportedModelError names a layer kind the
    engine does not serve."""
    return _served_spec(read_config(path))


def _served_spec(raw: Mapping[str, Any]) -> ModelSpec:
    spec = ModelSpec.from_config(raw)
    for layer in spec.layers:
        if layer.kind not in SERVED_KINDS:
            raise UnsupportedModelError(
                f"{raw.get('model_type')}: layer {layer.index} is {layer.kind}, the engine serves "
                f"{' and '.join(sorted(SERVED_KINDS))} layers; use `kvtune plan` to size this model"
            )
    return spec


def _read_weights(path: Path, dtype: str) -> PreTrainedModel:
    weight_files(path)
    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype="auto" if dtype == "auto" else _DTYPES[dtype],
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except _UNREADABLE as error:
        raise InputFileError(f"Transformers cannot load {path}: {_first_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # Transformers would run them with random values
        raise InputFileError(f"{path} lacks {len(missing)} weights, the first is {missing[0]}")
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        name, found, asked = wrong[0]
        raise InputFileError(
            f"{path}: weight {name} has shape {list(found)}, its config.json asks for {list(asked)}; "
            "put back the config.json that belongs to these weights"
        )
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet_transformers() -> Generator[None]:
    """Without Transformers' progress bars: ours says what happens."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()


def _use_attention(model: PreTrainedModel) -> None:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if model.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise UnsupportedModelError(
            f"{model.config.model_type}: its attention layers (layer 0, full_attention) do not go through "
            "Transformers' attention registry; this family is not supported"
        )


def _model_len(config: Any, asked: int | None) -> int:
    limit = int(getattr(config, "max_position_embeddings", 0) or 0)
    if asked is not None and limit and asked > limit:
        raise UsageError(f"max_model_len {asked} is beyond the model's {limit} positions; ask for less")
    if asked is None and not limit:
        raise UsageError("the config states no max_position_embeddings; set max_model_len")
    return asked or limit


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """From generation_config.json, else config.json; an id or a list of ids."""
    for source in (model.generation_config, model.config):
        ids: Any = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(int(i) for i in (ids if isinstance(ids, (list, tuple)) else (ids,)))
    return frozenset()


def _read_tokenizer(path: Path) -> TokenDecoder | None:
    if not has_tokenizer(path):
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except _UNREADABLE as error:
        raise InputFileError(f"cannot read the tokenizer in {path}: {_first_line(error)}") from error
    return cast(TokenDecoder, tokenizer)


def _tensors_sha256(model: PreTrainedModel) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model that came without files."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        total.update(f"{name}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode())
        for part in flat.split(_CHUNK_BYTES):
            total.update(part.numpy().tobytes())
    return total.hexdigest()
