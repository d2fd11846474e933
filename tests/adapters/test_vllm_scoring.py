"""From vLLM's log-probability answers to aligned scores, for prefill and for decode with restarts."""

import math

import numpy as np
import pytest

from kvtune.adapters.openai_client import CompletionsClient
from kvtune.adapters.vllm_scoring import Scorer, ids_to_ask, scores_of
from kvtune.errors import TargetError, UsageError
from kvtune.target import ScoreItem

VOCAB = 11


def logprobs_after(tokens: list[int]) -> dict[int, float]:
    """A little language model: the distribution depends on the last token and on how many there are."""
    weights = [1.0 + ((token * 7 + tokens[-1] * 3 + len(tokens)) % VOCAB) for token in range(VOCAB)]
    total = sum(weights)
    return {token: math.log(weight / total) for token, weight in enumerate(weights)}


def top_of(tokens: list[int], k: int, *also: int) -> dict[int, float]:
    table = logprobs_after(tokens)
    best = sorted(table, key=lambda t: (-table[t], t))[:k]
    return {token: table[token] for token in (*best, *also)}


def little_vllm(handler, body):
    """Answers `prompt_logprobs` and `logprobs` as vLLM does, from the little model."""
    prompt = body["prompt"]
    if "prompt_logprobs" in body:
        rows = [None]
        for i in range(1, len(prompt)):
            table = top_of(prompt[:i], body["prompt_logprobs"], prompt[i])
            rows.append({str(t): {"logprob": v, "rank": 1, "decoded_token": ""} for t, v in table.items()})
        handler.reply(200, {"choices": [{"prompt_logprobs": rows}]})
        return
    said, tops = [], []
    for _ in range(body["max_tokens"]):
        table = top_of([*prompt, *said], body["logprobs"])
        said.append(min(table, key=lambda t: (-table[t], t)))
        tops.append({f"token_id:{t}": v for t, v in table.items()})
    handler.reply(200, {"choices": [{"token_ids": said, "logprobs": {"top_logprobs": tops}}]})


def item(**changes) -> ScoreItem:
    values = {"item_id": "a", "prompt_token_ids": [1, 2, 3], "continuation": [4, 5, 6, 7]}
    return ScoreItem(**values | changes)


def truth(scored: ScoreItem) -> list[dict[int, float]]:
    prompt, continuation = list(scored.prompt_token_ids), list(scored.continuation)
    return [logprobs_after([*prompt, *continuation[:i]]) for i in range(len(continuation))]


@pytest.fixture
def scorer(stub):
    stub.behave = little_vllm
    return Scorer(CompletionsClient(stub.url), "m", VOCAB)


@pytest.mark.parametrize("way", ["by_prefill", "by_decode"])
def test_each_position_is_scored_given_exactly_the_tokens_before_it(scorer, way):
    (scores,) = getattr(scorer, way)([item()], num_top=VOCAB)
    expected = truth(item())
    assert scores.is_full
    assert scores.ids.shape == (4, VOCAB)
    for step, table in enumerate(expected):
        assert scores.token_logprobs[step] == pytest.approx(table[item().continuation[step]])
        assert scores.argmax[step] == min(table, key=lambda t, table=table: (-table[t], t))
        for token, logprob in zip(scores.ids[step].tolist(), scores.logprobs[step].tolist(), strict=True):
            assert logprob == pytest.approx(table[token])


@pytest.mark.parametrize("way", ["by_prefill", "by_decode"])
def test_the_top_ids_come_likeliest_first_without_the_token_that_was_only_named(scorer, way):
    (scores,) = getattr(scorer, way)([item()], num_top=2)
    assert scores.ids.shape == (4, 2)
    assert not scores.is_full
    for step, table in enumerate(truth(item())):
        best = sorted(table, key=lambda t, table=table: (-table[t], t))[:2]
        assert scores.ids[step].tolist() == best
    assert np.isfinite(scores.token_logprobs).all()


def test_decode_goes_on_in_one_request_while_the_server_says_the_continuation(scorer, stub):
    said = [3]
    for _ in range(6):
        table = logprobs_after([1, 2, *said])
        said.append(min(table, key=lambda t: (-table[t], t)))
    agreed = item(prompt_token_ids=[1, 2, 3], continuation=said[1:])
    scorer.by_decode([agreed], num_top=VOCAB)
    assert len(stub.bodies) == 1
    departs = item(prompt_token_ids=[1, 2, 3], continuation=[*said[1:3], (said[3] + 1) % VOCAB, 0, 0, 0])
    stub.bodies.clear()
    scorer.by_decode([departs], num_top=VOCAB)
    assert stub.bodies[1]["prompt"] == [1, 2, 3, *departs.continuation[:3]], "restarts behind the right token"


def test_scores_are_given_at_the_references_ids_and_missing_ones_are_marked():
    wanted = np.array([[4, 9], [5, 9], [6, 9], [7, 9]], np.int32)
    tables = [{4: -0.1, 8: -3.0}, {5: -0.2}, {6: -0.3, 9: -2.0}, {7: -0.4}]
    scores = scores_of(item(at_ids=wanted), tables, num_top=2, vocab_size=VOCAB)
    assert scores.ids.tolist() == [[4, -1], [5, -1], [6, 9], [7, -1]]
    assert scores.logprobs[2].tolist() == pytest.approx([-0.3, -2.0])
    assert scores.logprobs[0, 1] == -np.inf
    assert wanted[0, 1] == 9, "the caller's array is not written to"


def test_of_equally_likely_tokens_the_smaller_id_is_the_argmax():
    scores = scores_of(item(continuation=[9]), [{9: -1.0, 2: -1.0, 5: -1.0}], num_top=2, vocab_size=VOCAB)
    assert scores.argmax.tolist() == [2]
    assert scores.ids.tolist() == [[2, 5]]


def test_more_ids_are_asked_for_where_they_must_match_the_references():
    at_ids = np.zeros((4, 64), np.int32)
    assert ids_to_ask([item()], 64, 50_000) == 64
    assert ids_to_ask([item(at_ids=at_ids)], 64, 50_000) == 256
    assert ids_to_ask([item(at_ids=at_ids)], 300, 50_000) == 300
    assert ids_to_ask([item(at_ids=at_ids)], 64, 100) == 100
    with pytest.raises(UsageError, match="at least 1"):
        ids_to_ask([item()], 0, 100)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"choices": []},
        {"choices": [{"prompt_logprobs": None}]},
        {"choices": [{"prompt_logprobs": [None, None, None, None]}]},
        {"choices": [{"prompt_logprobs": [None, None, None, {"1": {"logprob": -1}}]}]},
    ],
)
def test_an_answer_without_every_position_is_refused_not_guessed(stub, reply):
    stub.behave = lambda handler, body: handler.reply(200, reply)
    with pytest.raises(TargetError, match="item a"):
        Scorer(CompletionsClient(stub.url), "m", VOCAB).by_prefill([item()], num_top=2)
