"""A prefix hit equals a miss, however the work is cut: first in bits, then in structure.

Bits: float32, one thread, rows padded to 16, reference kernels. Every row of logits must be the same
32 bits whether its prefix was computed or found, in chunks of any size, alone or packed with others,
token by token or in one prefill.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from kvtune import CacheConfig, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import Engine
from kvtune.target import ScoreItem

CODECS = ("fp32", "bf16", "int8", "int4")
PROMPT_TOKENS = 330
NEW_TOKENS = 8


class _Recorder:
    """Wraps an engine's runner: keeps the logits of every row it computes, by request and position.

    It asks for all rows and hands on those the engine wanted. Two runs that compute the same position
    of the same request must agree in every bit.
    """

    def __init__(self, engine: Engine) -> None:
        self.rows: dict[tuple[str, int], torch.Tensor] = {}
        self._forward = engine._runner.forward
        engine._runner.forward = self._record

    def _record(self, chunks, wanted, *, decodes=None):
        all_chunks = [*([] if decodes is None else decodes.chunks()), *chunks]
        total = sum(chunk.num_tokens for chunk in all_chunks)
        logits = self._forward(chunks, np.arange(total), decodes=decodes)
        keys = [(chunk.request_id, chunk.start + i) for chunk in all_chunks for i in range(chunk.num_tokens)]
        self.rows.update(zip(keys, logits, strict=True))
        return logits[torch.from_numpy(wanted)]

    def take(self, request_id: str) -> dict[int, torch.Tensor]:
        rows = {position: row for (owner, position), row in self.rows.items() if owner == request_id}
        self.rows.clear()
        return rows


def _engine(loaded, codecs: tuple[str, str], chunk: int, **cache) -> Engine:
    return Engine.from_pretrained(
        loaded,
        cache=CacheConfig(kv_budget="6MiB", k_codec=codecs[0], v_codec=codecs[1], **cache),
        scheduler=SchedulerConfig(max_num_batched_tokens=chunk),
        config=EngineConfig(kernel="reference", pad_rows=16),
    )


def _run(engine: Engine, recorder: _Recorder, prompt: list[int], neighbours, *, new_tokens: int):
    """(tokens, logits by position) of `prompt`, computed beside `neighbours`."""
    recorder.rows.clear()
    for index, other in enumerate(neighbours):
        params = SamplingParams(max_tokens=NEW_TOKENS + 4, temperature=0.0, ignore_eos=True)
        engine.add_request(f"other-{index}", other, params)
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    engine.add_request("own", prompt, params)
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output for output in engine.step(finished_only=True)}
    return done["own"], recorder.take("own")


def _assert_same_bits(rows, base, *, least: int) -> None:
    assert len(rows) >= least
    for position, row in rows.items():
        assert torch.equal(row.view(torch.int32), base[position].view(torch.int32)), f"position {position}"


def _texts(seed: int = 5):
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, 211, PROMPT_TOKENS).tolist()
    return prompt, [rng.integers(3, 211, n).tolist() for n in (45, 7)]


def _assert_hits_equal_misses(loaded, codecs: tuple[str, str], chunks=(16, 100, 320), **cache) -> None:
    prompt, neighbours = _texts()
    with _engine(loaded, codecs, 320, **cache) as engine:
        first, base = _run(engine, _Recorder(engine), prompt, [], new_tokens=NEW_TOKENS)
    whole = [*prompt, *first.token_ids[:-1]]
    for chunk in chunks:
        with _engine(loaded, codecs, chunk, **cache) as engine:
            recorder = _Recorder(engine)
            for packed, phase in product((False, True), ("decode", "prefill")):
                beside = neighbours if packed else []
                tokens, new = (prompt, NEW_TOKENS) if phase == "decode" else (whole, 1)
                engine.reset_prefix_cache()
                miss, rows = _run(engine, recorder, tokens, beside, new_tokens=new)
                assert miss.num_cached_tokens == 0
                _assert_same_bits(rows, base, least=len(whole))
                hit, rows = _run(engine, recorder, tokens, beside, new_tokens=new)
                assert hit.num_cached_tokens == 16 * ((len(tokens) - 1) // 16)
                _assert_same_bits(rows, base, least=len(whole) - hit.num_cached_tokens)
                if phase == "decode":
                    assert miss.token_ids == hit.token_ids == first.token_ids
            _assert_scores_equal_decode(engine, prompt, first.token_ids, base)


def _assert_scores_equal_decode(engine: Engine, prompt, continuation, base) -> None:
    """Replay by prefill: the score of each token is the log-softmax of decode's logits, bit by bit."""
    items = [
        ScoreItem(item_id="own", prompt_token_ids=prompt, continuation=continuation),
        ScoreItem(item_id="again", prompt_token_ids=prompt, continuation=continuation),
    ]
    for scores in engine.score(items, num_top=10**6):
        assert scores.is_full
        for row, position in enumerate(range(len(prompt) - 1, len(prompt) - 1 + len(continuation))):
            expected = torch.log_softmax(base[position], dim=-1).numpy()
            assert np.array_equal(scores.logprobs[row], expected)
            assert scores.token_logprobs[row] == expected[continuation[row]]
        assert scores.argmax.tolist() == list(continuation)


@pytest.mark.parametrize("codecs", list(product(CODECS, CODECS)), ids="-".join)
def test_logits_are_bit_equal_for_every_codec_pair(pair, codecs):
    loaded, _ = pair("llama")
    _assert_hits_equal_misses(loaded, codecs)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "phi3"])
def test_logits_are_bit_equal_with_windows_softcap_and_longrope(pair, family):
    loaded, _ = pair(family)
    _assert_hits_equal_misses(loaded, ("int8", "int4"), chunks=(100,))


def test_logits_are_bit_equal_with_a_16_bit_first_block_and_codecs_per_layer(pair):
    loaded, _ = pair("llama")
    _assert_hits_equal_misses(
        loaded, ("int4", "int8"), chunks=(100,), first_block_16bit=True, layer_codecs={1: ("bf16", "int4")}
    )


def test_codecs_differ_from_each_other_so_that_equality_means_something(pair):
    loaded, _ = pair("llama")
    prompt, _ = _texts()
    last = []
    for codecs in product(CODECS, CODECS):
        with _engine(loaded, codecs, 320) as engine:
            _, rows = _run(engine, _Recorder(engine), prompt, [], new_tokens=1)
        last.append(rows[PROMPT_TOKENS - 1])
    for i, j in product(range(len(last)), range(len(last))):
        assert (i == j) == torch.equal(last[i], last[j])
