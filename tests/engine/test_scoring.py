"""Scores are the model's own log-probabilities of given continuations, and disturb nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvtune import SamplingParams
from kvtune.errors import UsageError
from kvtune.target import ScoreItem

FULL = {"k_codec": "fp32", "v_codec": "fp32"}


def _items(count: int = 5, seed: int = 4) -> list[ScoreItem]:
    """Items of mixed lengths that share a prefix, the last one shorter than a block."""
    rng = np.random.default_rng(seed)
    stem = rng.integers(3, 211, 40).tolist()
    sizes = [(60, 9), (41, 150), (50, 1), (90, 17), (1, 5)][:count]
    return [
        ScoreItem(
            item_id=f"item-{index}",
            prompt_token_ids=(stem + rng.integers(3, 211, 60).tolist())[:prompt],
            continuation=rng.integers(3, 211, new).tolist(),
        )
        for index, (prompt, new) in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def reference(llama_folder):
    return AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager")


@torch.no_grad()
def _expected(reference, item: ScoreItem) -> np.ndarray:
    tokens = torch.tensor([[*item.prompt_token_ids, *item.continuation]])
    logits = reference(tokens, use_cache=False).logits[0]
    return torch.log_softmax(logits[len(item.prompt_token_ids) - 1 : -1], dim=-1).numpy()


@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_scores_are_the_models_own_log_probabilities(llama, make_engine, reference, chunk):
    engine = make_engine(llama, cache=FULL)
    items = _items()
    scores = engine.score(items, num_top=211, chunk=chunk)
    assert [score.item_id for score in scores] == [item.item_id for item in items]
    for item, score in zip(items, scores, strict=True):
        expected = _expected(reference, item)
        assert score.is_full
        assert score.ids.tolist() == [list(range(211))] * len(item.continuation)
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        chosen = expected[np.arange(len(item.continuation)), item.continuation]
        np.testing.assert_allclose(score.token_logprobs, chosen, atol=1e-4)
        np.testing.assert_array_equal(score.argmax, expected.argmax(axis=1))


def test_top_and_given_ids_are_cut_from_the_whole(llama, make_engine):
    engine = make_engine(llama, cache=FULL)
    item = _items()[0]
    whole = engine.score([item], num_top=211)[0]
    top = engine.score([item], num_top=4)[0]
    assert not top.is_full
    order = np.argsort(-whole.logprobs, axis=1)[:, :4]
    np.testing.assert_array_equal(top.ids, order)
    at_ids = np.array([[7, 3, -1]] * len(item.continuation), dtype=np.int32)
    given = engine.score([_at(item, at_ids)], num_top=211)[0]
    assert not given.is_full
    np.testing.assert_array_equal(given.ids, at_ids)
    np.testing.assert_array_equal(given.logprobs[:, :2], whole.logprobs[:, [7, 3]])
    assert np.isneginf(given.logprobs[:, 2]).all()


def _at(item: ScoreItem, at_ids: np.ndarray) -> ScoreItem:
    return ScoreItem(
        item_id=item.item_id, prompt_token_ids=item.prompt_token_ids, continuation=item.continuation,
        at_ids=at_ids,
    )  # fmt: skip


def test_scores_do_not_depend_on_what_was_cached_before(llama, make_engine):
    engine = make_engine(llama, cache={"k_codec": "int8", "v_codec": "int4"})
    fresh = engine.score(_items(), num_top=211)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    engine.generate([item.prompt_token_ids for item in _items()], params)
    again = engine.score(_items(), num_top=211)
    for one, other in zip(fresh, again, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_scoring_leaves_no_block_behind_that_a_request_could_hit(llama, make_engine):
    engine = make_engine(llama)
    engine.score(_items(), num_top=5)
    assert engine.memory().resident_bytes == 0
    params = SamplingParams(max_tokens=3, temperature=0.0)
    assert engine.generate([_items()[0].prompt_token_ids], params)[0].num_cached_tokens == 0
    engine._manager.check()


def test_a_scoring_call_that_breaks_off_leaves_nothing_behind(llama, make_engine):
    engine = make_engine(llama, scheduler={"max_num_batched_tokens": 64})
    forward, calls = engine._runner.forward, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return forward(*args)

    engine._runner.forward = fail_later
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.score(_items(), num_top=5)
    assert engine.memory().resident_bytes == 0
    engine._manager.check()


def test_scoring_evicts_no_cached_prefix_while_its_own_blocks_fit(llama, make_engine):
    engine = make_engine(llama, cache={"kv_budget": "768KiB"}, scheduler={"max_num_batched_tokens": 64})
    prompt = list(range(20, 100))
    params = SamplingParams(max_tokens=2, temperature=0.0)
    engine.generate([prompt], params)
    items = [item for seed in range(12) for item in _items(seed=seed)]
    num_blocks = engine.stats().blocks[0].total
    assert sum(len(item.prompt_token_ids) + len(item.continuation) for item in items) > 3 * 16 * num_blocks
    engine.score(items, num_top=5)
    assert engine.stats().cache.evicted_blocks == 0
    assert engine.generate([prompt], params)[0].num_cached_tokens == 64


def test_items_share_prefixes_among_themselves(llama, make_engine):
    engine = make_engine(llama, scheduler={"max_num_batched_tokens": 64})
    engine.score(_items(), num_top=5)
    assert engine.stats().cache.hit_tokens >= 2 * 32


def test_scoring_beside_running_requests_changes_neither(llama, make_engine):
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    quiet = make_engine(llama)
    tokens = quiet.generate([list(range(20, 60))], params)[0].token_ids
    scores = quiet.score(_items(), num_top=211)
    busy = make_engine(llama)
    busy.add_request("a", list(range(20, 60)), params)
    for _ in range(10):
        busy.step()
    for one, other in zip(scores, busy.score(_items(), num_top=211), strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    outputs = []
    while busy.has_unfinished:
        outputs = busy.step() or outputs
    assert outputs[-1].token_ids == tokens


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_kernel_reads_mixed_codecs_and_first_blocks_as_the_reference_does(
    request, family, kernel, make_engine
):
    """Fast kernels round queries and weights, which may move a code of a later layer by one: the
    difference is held against what the codecs themselves change."""
    loaded = request.getfixturevalue(family)
    mixed = {"k_codec": "int8", "v_codec": "int4", "layer_codecs": {1: ("int4", "bf16")}}

    def logprobs(cache, name):
        engine = make_engine(loaded, cache={"first_block_16bit": True, **cache}, config={"kernel": name})
        return np.concatenate([score.logprobs for score in engine.score(_items(), num_top=211)])

    reference = logprobs(mixed, "reference")
    lossless = np.abs(logprobs(FULL, kernel) - logprobs(FULL, "reference")).max()
    by_kernel = np.abs(logprobs(mixed, kernel) - reference).mean()
    by_codec = np.abs(logprobs(FULL, "reference") - reference).mean()
    assert lossless < 1e-3
    assert by_kernel < 0.1 * by_codec


def test_decode_steps_take_one_token_of_each_item(llama, make_engine, monkeypatch):
    """As many steps as the longest item has tokens to run, not one for every token of every item."""
    engine = make_engine(llama, cache=FULL)
    widths: list[int] = []
    forward = engine._runner.forward

    def counted(chunks, wanted):
        assert all(chunk.num_tokens == 1 for chunk in chunks)
        widths.append(len(chunks))
        return forward(chunks, wanted)

    monkeypatch.setattr(engine._runner, "forward", counted)
    items = _items()
    engine.score(items, num_top=211, chunk=1)
    lengths = [len(item.prompt_token_ids) + len(item.continuation) - 1 for item in items]
    assert len(widths) == max(lengths)
    assert widths[0] == len(items)
    assert widths[-1] == 1
    assert sum(widths) == sum(lengths)


@pytest.mark.parametrize("chunk", [1, 48])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_too_small_for_all_items_at_once_still_scores_them(request, family, chunk, make_engine):
    loaded = request.getfixturevalue(family)
    items = _items(4)
    roomy = make_engine(loaded, cache=FULL).score(items, num_top=211, chunk=48)
    tight = make_engine(
        loaded, cache={**FULL, "kv_budget": 14 * 16384}, scheduler={"max_num_batched_tokens": 48}
    )
    for one, other in zip(roomy, tight.score(items, num_top=211, chunk=chunk), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"continuation": []}, "continuation is empty"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({"continuation": [500]}, "token id 500"),
        ({"continuation": [5] * 500}, "the engine takes 512"),
        ({"at_ids": np.zeros((3, 2), dtype=np.int32)}, "at_ids must be"),
        ({"at_ids": np.full((9, 1), 211, dtype=np.int32)}, "at_ids must lie"),
    ],
)
def test_items_that_cannot_be_scored_are_refused(llama, make_engine, change, message):
    item = _items()[0]
    values = {"prompt_token_ids": item.prompt_token_ids, "continuation": item.continuation} | change
    with pytest.raises(UsageError, match=message):
        make_engine(llama).score([ScoreItem(item_id="x", **values)], num_top=5)


def test_an_item_that_no_cache_of_this_size_holds_is_refused(llama, make_engine):
    engine = make_engine(llama, cache={"kv_budget": 4 * 8192})
    with pytest.raises(UsageError, match="more than the KV cache holds"):
        engine.score(_items(), num_top=5)
