"""In 16 bit, bits differ with every cut; a hit must be no further from a miss than one cut from another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtune import CacheConfig, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import Engine, load_model
from kvtune.testing.models import write_model_folder

NUM_PROMPTS = 48
VOCAB = 211


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    return load_model(write_model_folder(folder, "llama", dtype=torch.bfloat16, vocab_size=VOCAB))


def _next_token(loaded, codecs: tuple[str, str], chunk: int, *, hit: bool) -> np.ndarray:
    """Log-probabilities [prompts, V] of the first token, its prefix computed or found."""
    rng = np.random.default_rng(9)
    prompts = [rng.integers(3, VOCAB, rng.integers(80, 200)).tolist() for _ in range(NUM_PROMPTS)]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB)
    with Engine.from_pretrained(
        loaded,
        cache=CacheConfig(kv_budget="16MiB", k_codec=codecs[0], v_codec=codecs[1]),
        scheduler=SchedulerConfig(max_num_batched_tokens=chunk),
        config=EngineConfig(kernel="auto"),
    ) as engine:
        outputs = engine.generate(prompts, params)
        if hit:
            outputs = engine.generate(prompts, params)
            assert all(output.num_cached_tokens >= 64 for output in outputs)
    return np.array([[o.top_logprobs[0][token] for token in range(VOCAB)] for o in outputs])


def _mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("codecs", [("bf16", "bf16"), ("int8", "int8"), ("int8", "int4")], ids="-".join)
def test_a_hit_is_as_close_to_a_miss_as_another_chunking_of_the_same_codec(half, codecs):
    miss = _next_token(half, codecs, 512, hit=False)
    floor = _mean_kl(miss, _next_token(half, codecs, 48, hit=False))
    hit = _mean_kl(miss, _next_token(half, codecs, 512, hit=True))
    coarser = _mean_kl(miss, _next_token(half, ("int4", "int4"), 512, hit=False))
    assert hit <= 2.0 * floor + 1e-5
    assert hit < 0.2 * coarser
