"""What users of the engine see: outputs, streaming, stopping, aborting, refusing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine.sampler import uniform
from kvtune.errors import InvariantError, UsageError
from kvtune.types import FinishReason, MissCause

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = list(range(10, 50))


def test_a_text_prompt_and_its_token_ids_give_the_same_answer(llama, make_engine):
    engine = make_engine(llama)
    text = " ".join(f"w{token}" for token in PROMPT)
    by_text, by_ids = engine.generate([text, PROMPT], GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.prompt_token_ids == tuple(PROMPT)
    assert by_ids.text == " ".join(f"w{token}" for token in by_ids.token_ids)


def test_without_a_tokenizer_token_ids_work_and_text_is_refused(gemma2, make_engine):
    engine = make_engine(gemma2)
    assert engine.generate([PROMPT], GREEDY)[0].text == ""
    with pytest.raises(UsageError, match="no tokenizer"):
        engine.generate(["hello"], GREEDY)
    with pytest.raises(UsageError, match="use stop_token_ids"):
        engine.generate([PROMPT], SamplingParams(stop=("x",)))


def test_streaming_yields_the_same_tokens_and_text_piece_by_piece(llama, make_engine):
    engine = make_engine(llama)
    whole = engine.generate([PROMPT], GREEDY)[0]
    parts = list(engine.stream(PROMPT, GREEDY))
    assert [token for part in parts for token in part.new_token_ids] == list(whole.token_ids)
    assert "".join(part.new_text for part in parts) == whole.text
    assert [part.is_finished for part in parts] == [False] * 11 + [True]


def test_closing_a_stream_aborts_its_request(llama, make_engine):
    engine = make_engine(llama)
    stream = engine.stream(PROMPT, GREEDY)
    next(stream)
    assert engine.memory().referenced_bytes > 0
    stream.close()
    assert engine.memory().referenced_bytes == 0
    assert not engine.has_unfinished


def test_a_stop_string_ends_the_request_and_is_not_in_the_text(llama, make_engine):
    engine = make_engine(llama)
    free = engine.generate([PROMPT], GREEDY)[0]
    stop = " ".join(free.text.split()[3:5])
    stopped = engine.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0.0, stop=(stop,)))[0]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[:5]
    assert engine.memory().referenced_bytes == 0


def test_stop_tokens_eos_and_length_end_a_request(llama, make_engine):
    engine = make_engine(llama)
    free = engine.generate([PROMPT], GREEDY)[0]
    assert free.finish_reason is FinishReason.LENGTH
    params = SamplingParams(
        max_tokens=12, temperature=0.0, stop_token_ids=(free.token_ids[4],), ignore_eos=True
    )
    stopped = engine.generate([PROMPT], params)[0]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[4]) + 1]


def test_seeded_sampling_repeats_alone_in_company_and_through_preemption(llama, make_engine):
    params = [SamplingParams(max_tokens=40, temperature=1.0, seed=s, ignore_eos=True) for s in range(4)]
    prompts = [PROMPT[: 10 + 7 * i] for i in range(4)]
    roomy = make_engine(llama)
    alone = [roomy.generate([p], one)[0].token_ids for p, one in zip(prompts, params, strict=True)]
    together = [output.token_ids for output in roomy.generate(prompts, params)]
    tight = make_engine(llama, cache={"kv_budget": 6 * 8192, "k_codec": "bf16", "v_codec": "bf16"})
    squeezed = [output.token_ids for output in tight.generate(prompts, params)]
    assert tight.stats().scheduler.preemptions > 0
    assert alone == together == squeezed
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_token_i_of_a_seeded_request_is_drawn_with_number_i_of_its_seed(llama, make_engine):
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=11, ignore_eos=True, logprobs=211)
    output = make_engine(llama).generate([PROMPT], params)[0]
    for index, (token, top) in enumerate(zip(output.token_ids, output.top_logprobs, strict=True)):
        cumulative = np.cumsum(np.exp([top[one] for one in range(211)]))
        low, high = cumulative[token] - np.exp(top[token]), cumulative[token]
        assert low - 1e-5 <= uniform(11, index) * cumulative[-1] <= high + 1e-5


def test_unseeded_requests_differ_from_each_other_and_repeat_in_a_new_engine(llama, make_engine):
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    first = [o.token_ids for o in make_engine(llama).generate([PROMPT, PROMPT], params)]
    again = [o.token_ids for o in make_engine(llama).generate([PROMPT, PROMPT], params)]
    other = [o.token_ids for o in make_engine(llama, config={"seed": 5}).generate([PROMPT, PROMPT], params)]
    assert first[0] != first[1]
    assert first == again != other


def test_logprobs_come_with_every_token(llama, make_engine):
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=2)
    output = make_engine(llama).generate([PROMPT], params)[0]
    assert len(output.logprobs) == len(output.top_logprobs) == 5
    for token, logprob, top in zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())


def test_hits_and_misses_account_for_every_prompt_token(llama, make_engine):
    engine = make_engine(llama)
    first = engine.generate([PROMPT], GREEDY)[0]
    second = engine.generate([[*PROMPT[:32], *range(60, 70)]], GREEDY)[0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert second.num_cached_tokens + sum(second.misses.values()) == 42
    assert second.misses[MissCause.PARTIAL_BLOCK] == 10
    engine.reset_prefix_cache()
    assert engine.generate([PROMPT], GREEDY)[0].num_cached_tokens == 0


def test_salts_keep_tenants_apart(llama, make_engine):
    engine = make_engine(llama)
    cached = []
    for index, salt in enumerate(["a", "b", "a"]):
        engine.add_request(str(index), PROMPT, GREEDY, cache_salt=salt)
        while engine.has_unfinished:
            for output in engine.step(finished_only=True):
                cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 32]


def test_eight_equal_prompts_at_once_cost_one_prefill(llama, make_engine):
    engine = make_engine(llama)
    outputs = engine.generate([PROMPT] * 8, GREEDY)
    assert len({output.token_ids for output in outputs}) == 1
    # one prefill of 40; seven followers compute the 8 tokens behind the last full block; 11 decodes each
    assert engine.stats().scheduler.scheduled_tokens == 40 + 7 * 8 + 8 * 11


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_abort_works_while_waiting_prefilling_and_decoding(llama, make_engine, steps):
    engine = make_engine(llama, scheduler={"max_num_batched_tokens": 16, "max_num_seqs": 1})
    engine.add_request("first", PROMPT, GREEDY)
    engine.add_request("second", PROMPT[5:], GREEDY)
    for _ in range(steps):
        engine.step()
    assert engine.abort("first")
    assert engine.abort("second")
    assert not engine.abort("second")
    outputs = engine.step()
    assert {output.finish_reason for output in outputs} == {FinishReason.ABORT}
    assert not engine.has_unfinished
    assert engine.memory().referenced_bytes == 0
    engine._manager.check()


def test_generate_leaves_the_outputs_of_other_requests_for_step(llama, make_engine):
    engine = make_engine(llama)
    engine.add_request("mine", PROMPT, GREEDY)
    engine.generate([PROMPT[::-1]], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    tokens = [token for output in engine.step() for token in output.new_token_ids]
    assert len(tokens) == 12
    assert not engine.has_unfinished


def test_a_step_that_breaks_off_ends_its_requests_and_leaves_the_engine_sound(llama, make_engine):
    engine = make_engine(llama)
    expected = engine.generate([PROMPT], GREEDY)[0].token_ids
    engine.add_request("a", PROMPT, GREEDY)
    engine.step()
    forward, engine._runner.forward = engine._runner.forward, _interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._runner.forward = forward
    assert [output.finish_reason for output in engine.step()] == [FinishReason.ABORT]
    assert engine.memory().referenced_bytes == 0
    assert engine.generate([PROMPT], GREEDY)[0].token_ids == expected
    engine._manager.check()


def _interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def test_one_text_instead_of_a_list_is_refused(llama, make_engine):
    with pytest.raises(UsageError, match="prompts must be a list"):
        make_engine(llama).generate("w1 w2", GREEDY)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([3, 211], "token id 211 at position 1 is outside the vocabulary"),
        ([-1], "token id -1 at position 0"),
        ([1.5], "integer token ids"),
        ([[1, 2], [3, 4]], "flat list"),
        ([[1], [2, 3]], "flat list"),
        ([5] * 512, "512 prompt tokens"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_and_nothing_is_queued(llama, make_engine, prompt, message):
    engine = make_engine(llama)
    with pytest.raises(UsageError, match=message):
        engine.generate([PROMPT, prompt], GREEDY)
    assert not engine.has_unfinished


def test_a_request_id_in_use_is_refused(llama, make_engine):
    engine = make_engine(llama)
    engine.add_request("a", PROMPT, GREEDY)
    with pytest.raises(UsageError, match="'a' is in use"):
        engine.add_request("a", PROMPT, GREEDY)


def test_a_closed_engine_says_so_and_closing_twice_is_fine(llama):
    with Engine.from_pretrained(llama, cache=CacheConfig(kv_budget="1MiB")) as engine:
        engine.add_request("a", PROMPT, GREEDY)
        engine.step()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.generate([PROMPT], GREEDY)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"k_codec": "int3"}, "unknown KV codec 'int3'"),
        ({"kv_budget": 100}, "cannot hold one block"),
        ({"kv_budget": 8192 + 100, "first_block_16bit": True}, "cannot hold"),
        ({"block_size": 24}, "not a multiple of 16"),
        ({"layer_codecs": {2: ("int8", "int8")}}, "layer_codecs names layer 2"),
        ({"eviction_policy": "magic"}, "magic"),
    ],
)
def test_settings_that_cannot_work_are_refused(llama, make_engine, cache, message):
    with pytest.raises(UsageError, match=message):
        make_engine(llama, cache=cache)


def test_scheduler_settings_change_while_requests_run(llama, make_engine):
    engine = make_engine(llama, scheduler={"max_num_seqs": 1})
    before = engine.generate([PROMPT, PROMPT[::-1]], GREEDY)
    for index, prompt in enumerate([PROMPT, PROMPT[::-1]]):
        engine.add_request(str(index), prompt, GREEDY)
    engine.step()
    assert engine.num_running == 1
    engine.configure(SchedulerConfig(max_num_seqs=8))
    engine.step()
    assert engine.num_running == 2
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output.token_ids for output in engine.step(finished_only=True)}
    assert [done["0"], done["1"]] == [output.token_ids for output in before]


def test_metrics_come_from_the_injected_clock(llama, make_engine):
    ticks = iter(range(10**6))
    engine = make_engine(llama, clock=lambda: float(next(ticks)))
    metrics = engine.generate([PROMPT], GREEDY)[0].metrics
    assert metrics.arrival_s < metrics.first_scheduled_s < metrics.first_token_s <= metrics.finished_s
    assert len(metrics.token_times_s) == 12
    assert metrics.tpot_s > 0


def test_smaller_codecs_stay_close_to_full_precision(llama, make_engine):
    """int8 must be a small perturbation: a wrong scale or offset would not be."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=211)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 211, 100).tolist() for _ in range(4)]
    tops = {}
    for codec in ("fp32", "bf16", "int8", "int4"):
        engine = make_engine(llama, cache={"k_codec": codec, "v_codec": codec})
        outputs = engine.generate(prompts, params)
        tops[codec] = np.array([[o.top_logprobs[0][token] for token in range(211)] for o in outputs])
    error = {codec: float(np.abs(tops[codec] - tops["fp32"]).mean()) for codec in tops}
    assert 0 < error["bf16"] < 0.1
    assert 0 < error["int8"] < 0.3
    assert error["bf16"] < error["int8"] < error["int4"]


def test_kernel_and_pad_settings_do_not_change_greedy_tokens(llama, make_engine):
    base = make_engine(llama, cache={"k_codec": "fp32", "v_codec": "fp32"}).generate([PROMPT], GREEDY)
    for config in ({"kernel": "reference"}, {"pad_rows": 16}, {"kernel": "auto", "pad_rows": 5}):
        other = make_engine(llama, cache={"k_codec": "fp32", "v_codec": "fp32"}, config=config)
        assert other.generate([PROMPT], GREEDY)[0].token_ids == base[0].token_ids


def test_a_sixteen_bit_model_runs(llama_folder):
    config = EngineConfig(dtype="bfloat16")
    with Engine.from_pretrained(llama_folder, cache=CacheConfig(kv_budget="1MiB"), config=config) as engine:
        assert len(engine.generate([PROMPT], GREEDY)[0].token_ids) == 12
        assert engine.effective(context=64)["dtype"] == "bfloat16"


def test_a_loaded_model_keeps_its_dtype(llama, make_engine):
    with pytest.raises(UsageError, match=r"bfloat16 asked for, the loaded model is torch\.float32"):
        make_engine(llama, config={"dtype": "bfloat16"})


def test_running_the_models_own_forward_is_refused_with_a_reason(llama):
    with pytest.raises(InvariantError, match="run it through the engine"):
        llama.model(torch.tensor([[1, 2, 3]]))
