"""One thread; tiny models loaded once; a word-level tokenizer made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvtune import CacheConfig, EngineConfig, SchedulerConfig
from kvtune.engine import Engine, LoadedModel, load_model
from kvtune.testing.models import write_model_folder

VOCAB = 211


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_tokenizer(folder: Path) -> None:
    """Word-level: token 5 is the word "w5"; decoding joins words with spaces."""
    vocab = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("llama"), "llama", vocab_size=VOCAB)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> LoadedModel:
    return load_model(llama_folder)


@pytest.fixture(scope="session")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_model_folder(tmp_path_factory.mktemp("gemma2"), "gemma2", vocab_size=VOCAB))


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Engines that are closed when the test ends. Keywords of all three settings classes, mixed."""
    engines: list[Engine] = []

    def make(loaded, *, cache=None, scheduler=None, config=None, **kwargs) -> Engine:
        engine = Engine(
            loaded,
            cache=CacheConfig(**{"kv_budget": "4MiB", **(cache or {})}),
            scheduler=SchedulerConfig(**(scheduler or {})),
            config=EngineConfig(**{"kernel": "torch", **(config or {})}),
            **kwargs,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
