"""The engine's greedy tokens are those of Transformers' `generate`, request by request.

Float32 with full-precision KV. A differing token counts only where the reference's two best logits
are more than 1e-4 apart; after a forgiven difference the reference goes on from the engine's token.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvtune import CacheConfig, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import Engine, load_model
from kvtune.errors import UsageError
from kvtune.spec import group_block_bytes
from kvtune.target import ScoreItem
from kvtune.testing.models import write_model_folder

NEW_TOKENS = 64
LENGTHS = (3, 17, 40, 75)
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
GAP = 1e-4

# (family, head dim, query heads, KV heads): every family, every head dim, GQA 1, 4 and 8
MODELS = (
    ("llama", 32, 4, 4),
    ("llama", 64, 8, 1),
    ("qwen2", 64, 4, 1),
    ("qwen3", 128, 8, 1),
    ("mistral", 80, 4, 1),
    ("gemma2", 256, 4, 1),
    ("gemma3", 96, 8, 1),
    ("phi3", 96, 4, 4),
    ("gpt_oss", 64, 8, 1),
)
IDS = [f"{f}-d{d}-gqa{h // k}" for f, d, h, k in MODELS]
GRID = tuple(
    (family, dim, 8, 8 // gqa)
    for family, dim, gqa in product(
        ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_oss"),
        (32, 64, 80, 96, 128, 256),
        (1, 4, 8),
    )
)


@cache
def _prompts() -> list[list[int]]:
    """Mixed lengths; the two longest share their first 37 tokens."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 211, n).tolist() for n in LENGTHS]
    prompts[2][:37] = prompts[3][:37]
    return prompts


def _engine(
    loaded, *, chunk=512, kernel="torch", prefix=True, budget: int | str = "16MiB", seqs=64
) -> Engine:
    return Engine.from_pretrained(
        loaded,
        cache=CacheConfig(kv_budget=budget, k_codec="fp32", v_codec="fp32", enable_prefix_caching=prefix),
        scheduler=SchedulerConfig(max_num_batched_tokens=chunk, max_num_seqs=seqs),
        config=EngineConfig(kernel=kernel),
    )


class _Reference:
    """Transformers' own continuations, each computed once."""

    def __init__(self, model) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], list[int]] = {}

    def continue_(self, tokens: list[int], count: int) -> list[int]:
        key = (*tokens, count)
        if key not in self._known:
            out = self.model.generate(
                torch.tensor([tokens]), max_new_tokens=count, do_sample=False, pad_token_id=0,
                attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            )  # fmt: skip
            self._known[key] = out[0, len(tokens) :].tolist()
        return self._known[key]

    @torch.no_grad()
    def top2_gap(self, tokens: list[int]) -> float:
        top = torch.topk(self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float(), 2).values
        return float(top[0] - top[1])


def _assert_equal(reference: _Reference, prompt: list[int], tokens: list[int]) -> None:
    done = 0
    while done < len(tokens):
        expected = reference.continue_([*prompt, *tokens[:done]], len(tokens) - done)
        rest = list(tokens[done:])
        if rest == expected:
            return
        first = next(i for i, (a, b) in enumerate(zip(rest, expected, strict=True)) if a != b)
        gap = reference.top2_gap([*prompt, *tokens[: done + first]])
        assert gap <= GAP, f"token {done + first} differs where the two best logits are {gap:.2g} apart"
        done += first + 1


_references: dict[int, _Reference] = {}


@pytest.fixture(params=MODELS, ids=IDS)
def models(request, pair):
    family, dim, heads, kv_heads = request.param
    loaded, model = pair(family, head_dim=dim, num_heads=heads, num_kv_heads=kv_heads)
    return loaded, _references.setdefault(id(model), _Reference(model))


def _assert_all_equal(reference, outputs) -> None:
    for prompt, output in zip(_prompts(), outputs, strict=True):
        assert len(output.token_ids) == NEW_TOKENS
        _assert_equal(reference, prompt, list(output.token_ids))


def test_outputs_are_diverse_enough_to_mean_something(models):
    _, reference = models
    distinct = [len(set(reference.continue_(prompt, NEW_TOKENS))) for prompt in _prompts()]
    assert max(distinct) >= 20, distinct


@pytest.mark.parametrize(("chunk", "kernel"), [(16, "reference"), (48, "torch"), (512, "auto")])
def test_a_mixed_batch_equals_generate_at_every_chunk_size(models, chunk, kernel):
    loaded, reference = models
    with _engine(loaded, chunk=chunk, kernel=kernel) as engine:
        _assert_all_equal(reference, engine.generate(_prompts(), GREEDY))


def test_prefix_hits_change_no_token(models):
    loaded, reference = models
    with _engine(loaded) as engine:
        engine.generate(_prompts(), GREEDY)
        again = engine.generate(_prompts(), GREEDY)
    assert [output.num_cached_tokens for output in again] == [0, 16, 32, 64]
    _assert_all_equal(reference, again)


def test_without_prefix_caching_nothing_is_hit_and_nothing_changes(models):
    loaded, reference = models
    with _engine(loaded, prefix=False) as engine:
        engine.generate(_prompts(), GREEDY)
        again = engine.generate(_prompts(), GREEDY)
    assert [output.num_cached_tokens for output in again] == [0, 0, 0, 0]
    _assert_all_equal(reference, again)


def _tightest_engine(loaded) -> Engine:
    """The smallest cache that can hold the longest request alone."""
    groups = loaded.spec.kv_groups()
    block = sum(group_block_bytes(group, lambda _: ("fp32", "fp32"), 16) for group in groups)
    longest = max(LENGTHS) + NEW_TOKENS
    for blocks in range(1, 40):
        engine = _engine(loaded, budget=blocks * block, chunk=16)
        try:
            engine.add_request("fits", [1] * max(LENGTHS), GREEDY)
        except UsageError:
            engine.close()
            continue
        engine.abort("fits")
        engine.step()
        return engine
    raise AssertionError(f"no cache up to 40 blocks holds {longest} tokens")


def test_preempted_requests_continue_where_they_stopped(models):
    loaded, reference = models
    with _tightest_engine(loaded) as engine:
        outputs = engine.generate(_prompts(), GREEDY)
        assert engine.stats().scheduler.preemptions > 0
    _assert_all_equal(reference, outputs)


def test_an_abort_in_mid_batch_leaves_the_others_alone_and_frees_everything(models):
    loaded, reference = models
    outputs = {}
    with _engine(loaded, chunk=48) as engine:
        for index, prompt in enumerate(_prompts()):
            engine.add_request(str(index), prompt, GREEDY)
        for _ in range(20):
            outputs |= {output.request_id: output for output in engine.step()}
        assert engine.abort("1")
        while engine.has_unfinished:
            outputs |= {output.request_id: output for output in engine.step()}
        assert sum(usage.referenced for usage in engine.stats().blocks) == 0
    assert outputs["1"].finish_reason == "abort"
    assert 0 < len(outputs["1"].token_ids) < NEW_TOKENS
    for index in (0, 2, 3):
        _assert_equal(reference, _prompts()[index], list(outputs[str(index)].token_ids))


@pytest.mark.parametrize("max_model_len", [100, 400])
def test_under_longrope_a_long_neighbour_changes_nothing(pair, max_model_len):
    loaded, model = pair("phi3", max_model_len=max_model_len)
    assert loaded.rope_regime == ("longrope_short" if max_model_len == 100 else "longrope_long")
    rng = np.random.default_rng(3)
    short = rng.integers(3, 211, 20).tolist()
    long = rng.integers(3, 211, max_model_len - 50).tolist()
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with _engine(loaded, prefix=False) as engine:
        alone = engine.generate([short], params)[0]
        beside = engine.generate([short, long], params)
    assert alone.token_ids == beside[0].token_ids
    reference = _Reference(model)
    _assert_equal(reference, short, list(alone.token_ids))
    _assert_equal(reference, long, list(beside[1].token_ids))


@pytest.mark.parametrize(("max_model_len", "length"), [(128, 100), (512, 200)])
def test_the_longrope_regimes_are_transformers_own(tmp_path, max_model_len, length):
    """Against a model nobody touched: it takes the long factors past 128 positions, the short ones before."""
    folder = write_model_folder(tmp_path, "phi3", max_position_embeddings=512)
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(3, 211, length).tolist()
    with torch.no_grad():
        expected = torch.log_softmax(own(torch.tensor([tokens]), use_cache=False).logits[0], dim=-1)
    with _engine(load_model(folder, EngineConfig(max_model_len=max_model_len))) as engine:
        item = ScoreItem(item_id="x", prompt_token_ids=tokens[:1], continuation=tokens[1:])
        scores = engine.score([item], num_top=211)[0]
    np.testing.assert_allclose(scores.logprobs, expected[:-1].numpy(), atol=1e-4)


@pytest.mark.proof
@pytest.mark.parametrize(("family", "dim", "heads", "kv_heads"), GRID)
def test_the_whole_grid_equals_generate(pair, family, dim, heads, kv_heads):
    loaded, model = pair(family, head_dim=dim, num_heads=heads, num_kv_heads=kv_heads)
    with _engine(loaded, chunk=48, kernel="auto") as engine:
        first = engine.generate(_prompts(), GREEDY)
        again = engine.generate(_prompts(), GREEDY)
    reference = _Reference(model)
    _assert_all_equal(reference, first)
    _assert_all_equal(reference, again)
