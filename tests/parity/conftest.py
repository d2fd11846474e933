"""One thread, and each model folder loaded once per session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvtune.config import EngineConfig
from kvtune.engine import LoadedModel, load_model
from kvtune.engine.rope import fix_rope
from kvtune.testing.models import write_model_folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[LoadedModel, PreTrainedModel]]:
    """(the engine's model, Transformers' own eager model in the engine's RoPE regime) of a tiny config."""
    cache: dict[Any, tuple[LoadedModel, PreTrainedModel]] = {}

    def make(family: str, *, max_model_len: int | None = None, **settings: Any):
        key = (family, max_model_len, tuple(sorted(settings.items())))
        if key not in cache:
            folder = write_model_folder(tmp_path_factory.mktemp(family), family, **settings)
            loaded = load_model(folder, EngineConfig(max_model_len=max_model_len))
            reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
            reference.generation_config.eos_token_id = None
            fix_rope(reference, loaded.rope_regime)
            cache[key] = (loaded, reference)
        return cache[key]

    return make
