"""Tokens made of requests: prefix structure, determinism, scaling, and who is rejected why."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.workload import (
    DEFAULT_MAX_TOKENS,
    Message,
    Workload,
    WorkloadRequest,
    builtin_cases,
    materialise,
)


def trace(*prompts: tuple[int, list[int]], block_size: int = 512, output_length: int = 32) -> Workload:
    requests = tuple(
        WorkloadRequest(request_id=str(i), input_length=n, hash_ids=tuple(ids), output_length=output_length)
        for i, (n, ids) in enumerate(prompts)
    )
    return Workload(requests=requests, format="mooncake", block_size=block_size, is_synthetic_text=True)


def common(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def utf8(request: WorkloadRequest) -> list[int]:
    text = "".join(m.content for m in request.messages) or request.prompt or ""
    return list(text.encode())


paths = st.lists(st.integers(0, 5) | st.integers(0, 2**63 - 1), min_size=1, max_size=5)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(paths, st.integers(1, 64)), min_size=2, max_size=8),
    st.sampled_from([1.0, 1 / 2, 1 / 4]),
    st.sampled_from([300, 2048, 150_000]),
    st.integers(0, 2**64 - 1),
)
def test_prompts_share_exactly_the_blocks_whose_ids_they_share(prompts, scale, vocab_size, seed):
    workload = trace(*(((len(ids) - 1) * 64 + last, ids) for ids, last in prompts), block_size=64)
    made = materialise(workload, vocab_size=vocab_size, max_model_len=10**6, scale=scale, seed=seed)
    block = int(64 * scale)
    assert not made.rejected
    for (a, x), (b, y) in itertools.combinations(zip(workload.requests, made.requests, strict=True), 2):
        shared_ids = common(a.hash_ids, b.hash_ids)
        shared = common(x.prompt_token_ids, y.prompt_token_ids)
        shortest = min(len(x.prompt_token_ids), len(y.prompt_token_ids))
        assert shared >= min(shared_ids * block, shortest)
        # Full blocks of different ids never agree.
        assert shared // block <= shared_ids


@pytest.mark.parametrize("scale", [1.0, 1 / 16])
def test_longest_common_prefix_in_blocks_equals_that_of_the_hash_ids(scale):
    prompts = [(512 * 3 + 40, [0, 1, 2, k]) for k in range(3, 60)] + [(512 * 4, [0, 1, 70, 71]), (512, [0])]
    made = materialise(trace(*prompts), vocab_size=2000, max_model_len=10**6, scale=scale)
    block = round(512 * scale)
    ids = [ids for _, ids in prompts]
    for i, j in itertools.combinations(range(len(ids)), 2):
        shared = common(made.requests[i].prompt_token_ids, made.requests[j].prompt_token_ids)
        assert shared // block == common(ids[i], ids[j])


def test_last_blocks_of_one_token_differ_for_neighbouring_ids():
    made = materialise(trace(*((513, [0, k]) for k in range(1, 900))), vocab_size=1000, max_model_len=4096)
    assert len({r.prompt_token_ids for r in made.requests}) == 899


def test_shrunk_last_blocks_keep_enough_tokens_to_tell_any_ids_apart():
    ids = [3 + 1996 * k for k in range(20)]  # equal lowest digit: 2,000 ids less the 4 reserved
    made = materialise(
        trace(*((513, [0, k]) for k in ids)), vocab_size=2000, max_model_len=4096, scale=1 / 16
    )
    assert len({r.prompt_token_ids for r in made.requests}) == 20


def test_lengths_are_exact_at_scale_one_and_rounded_within_blocks_below():
    workload = trace((1300, [0, 1, 2]), (512, [0]), (1, [9]), output_length=100)
    exact = materialise(workload, vocab_size=2000, max_model_len=4096)
    assert [len(r.prompt_token_ids) for r in exact.requests] == [1300, 512, 1]
    assert [r.max_tokens for r in exact.requests] == [100] * 3
    small = materialise(workload, vocab_size=2000, max_model_len=4096, scale=1 / 16)
    assert [len(r.prompt_token_ids) for r in small.requests][:2] == [32 + 32 + round(276 / 16), 32]
    assert [r.max_tokens for r in small.requests] == [6] * 3
    assert small.scale == 1 / 16
    assert any("scale 0.0625" in note and "512 tokens to 32" in note for note in small.notes)
    assert any("synthetic" in note for note in small.notes)
    assert small.is_synthetic_text


def test_the_scale_really_applied_is_declared_when_blocks_do_not_divide():
    made = materialise(trace((512, [0])), vocab_size=2000, max_model_len=4096, scale=0.01)
    assert len(made.requests[0].prompt_token_ids) == 5
    assert made.scale == 5 / 512


def test_a_scale_that_leaves_too_few_tokens_to_tell_ids_apart_is_refused():
    with pytest.raises(UsageError, match="use a scale of at least"):
        materialise(trace((512, [2**60])), vocab_size=300, max_model_len=4096, scale=1 / 512)


def test_tokens_after_the_last_hash_id_are_never_shared():
    workload = trace((1000, [0]), (1000, [0]), (512, [0]))
    a, b, c = (
        r.prompt_token_ids for r in materialise(workload, vocab_size=2000, max_model_len=4096).requests
    )
    assert (len(a), len(b), len(c)) == (1000, 1000, 512)
    assert 512 <= common(a, b) < 520
    assert common(a, c) == 512


def test_the_same_id_gives_the_same_tokens_whatever_else_the_trace_holds_and_another_seed_gives_others():
    def tokens(*prompts, seed=0):
        made = materialise(trace(*prompts), vocab_size=2000, max_model_len=4096, seed=seed)
        return made.requests[-1].prompt_token_ids

    alone = tokens((700, [4, 5]))
    assert alone == tokens((700, [4, 5]))
    assert alone == tokens((512, [9]), (100, [8]), (700, [4, 5]))
    assert alone[512:] == tokens((188, [5]))
    assert common(alone, tokens((700, [4, 5]), seed=1)) < 512


def test_synthetic_tokens_stay_out_of_the_reserved_ids_and_use_the_whole_vocabulary():
    reserved = {0, 1, 2, 50, 99}
    workload = trace((4096, list(range(8))))
    made = materialise(workload, vocab_size=100, max_model_len=8192, reserved_ids=reserved)
    assert set(made.requests[0].prompt_token_ids) == set(range(100)) - reserved
    with pytest.raises(UsageError, match="leaves nothing to draw"):
        materialise(workload, vocab_size=4, max_model_len=8192)


def test_requests_of_known_length_alone_are_independent_and_scale():
    workload = Workload(
        requests=tuple(
            WorkloadRequest(request_id=str(i), input_length=400, output_length=10) for i in range(3)
        ),
        format="azure", is_synthetic_text=True,
    )  # fmt: skip
    made = materialise(workload, vocab_size=2000, max_model_len=4096, scale=0.1)
    a, b, _ = (r.prompt_token_ids for r in made.requests)
    assert (len(a), made.requests[0].max_tokens) == (40, 1)
    assert common(a, b) < 5
    assert len({r.session_id for r in made.requests}) == 3


def text_workload(*requests: WorkloadRequest) -> Workload:
    return Workload(
        requests=tuple(dataclasses.replace(r, request_id=str(i)) for i, r in enumerate(requests)), format="x"
    )


def test_the_output_is_the_recorded_one_else_the_answers_length_else_the_bound_cut_to_the_room():
    ask = WorkloadRequest(request_id="", messages=(Message("user", "0123456789"),))
    workload = text_workload(
        dataclasses.replace(ask, output_length=7, answer="xxxx"),
        dataclasses.replace(ask, answer="four", max_tokens=1000),
        dataclasses.replace(ask, max_tokens=1000),
        ask,
    )
    made = materialise(workload, vocab_size=256, max_model_len=600, encode=utf8)
    assert [r.max_tokens for r in made.requests] == [7, 4, 590, DEFAULT_MAX_TOKENS]
    capped = materialise(workload, vocab_size=256, max_model_len=600, encode=utf8, max_tokens=5)
    assert [r.max_tokens for r in capped.requests] == [5, 4, 5, 5]


def test_text_is_never_scaled_and_a_note_says_so():
    workload = text_workload(WorkloadRequest(request_id="", prompt="0123456789"))
    made = materialise(workload, vocab_size=256, max_model_len=600, encode=utf8, scale=0.5)
    assert (len(made.requests[0].prompt_token_ids), made.scale) == (10, 1.0)
    assert any("not applied" in note for note in made.notes)
    assert not made.is_synthetic_text


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (WorkloadRequest(request_id="", prompt=""), "empty prompt"),
        (WorkloadRequest(request_id="", messages=(Message("user", ""),)), "empty prompt"),
        (WorkloadRequest(request_id="", token_ids=()), "empty prompt"),
        (WorkloadRequest(request_id="", input_length=0), "empty prompt"),
        (WorkloadRequest(request_id=""), "empty prompt"),
        (WorkloadRequest(request_id="", prompt="x" * 100), "too long"),
        (WorkloadRequest(request_id="", prompt="x" * 60, output_length=41), "too long"),
        (WorkloadRequest(request_id="", input_length=100, output_length=1), "too long"),
        (WorkloadRequest(request_id="", input_length=10**15, output_length=1), "too long"),
        (WorkloadRequest(request_id="", token_ids=(5, 256)), "token out of vocabulary"),
        (WorkloadRequest(request_id="", token_ids=(-1,)), "token out of vocabulary"),
        (WorkloadRequest(request_id="", prompt="x", output_length=0), "nothing to generate"),
        (WorkloadRequest(request_id="", prompt="x", max_tokens=-2), "nothing to generate"),
        (WorkloadRequest(request_id="", prompt="\ud800"), "not Unicode text"),
        (WorkloadRequest(request_id="", prompt="x", answer="\ud800"), "not Unicode text"),
        (WorkloadRequest(request_id="", prompt="x", problem="an image"), "unsupported content: an image"),
        (WorkloadRequest(request_id="", prompt="refuse me"), "cannot be encoded"),
    ],
)
def test_one_request_that_cannot_be_served_is_rejected_alone_and_counted(request_, reason):
    def encode(request: WorkloadRequest) -> list[int]:
        if request.prompt == "refuse me":
            raise ValueError("the template\nwants a user turn")
        return utf8(request)

    good = WorkloadRequest(request_id="", prompt="fine")
    made = materialise(text_workload(good, request_), vocab_size=256, max_model_len=100, encode=encode)
    assert [r.request_id for r in made.requests] == ["0"]
    assert [r.request_id for r in made.rejected] == ["1"]
    assert made.rejected[0].reason.startswith(reason)
    assert any("1 of 2 requests rejected" in note for note in made.notes)
    with pytest.raises(UsageError, match="none of the 1 requests can be served") as refusal:
        materialise(text_workload(request_), vocab_size=256, max_model_len=100, encode=encode)
    assert "\n" not in str(refusal.value)


def test_without_a_tokenizer_text_is_rejected_and_token_ids_are_served():
    workload = text_workload(
        WorkloadRequest(request_id="", prompt="x"), WorkloadRequest(request_id="", token_ids=(1, 2))
    )
    made = materialise(workload, vocab_size=256, max_model_len=100)
    assert made.requests[0].prompt_token_ids == (1, 2)
    assert made.rejected[0].reason.startswith("no tokenizer")


@pytest.mark.parametrize(
    "wrong",
    [{"messages": (Message("\ud800", "x"),)}, {"prompt": "x", "cache_salt": "\ud800"}, {"prompt": "\ud800"}],
)
def test_a_lone_surrogate_in_any_text_rejects_that_request_only(wrong):
    good = WorkloadRequest(request_id="good", prompt="x")
    made = materialise(
        text_workload(good, WorkloadRequest(request_id="bad", **wrong)),
        vocab_size=256, max_model_len=100, encode=utf8,
    )  # fmt: skip
    assert [r.reason.partition(":")[0] for r in made.rejected] == ["not Unicode text"]
    assert len(made.requests) == 1


def test_a_request_of_exactly_the_model_length_is_served():
    workload = text_workload(WorkloadRequest(request_id="", prompt="x" * 60, output_length=40))
    assert not materialise(workload, vocab_size=256, max_model_len=100, encode=utf8).rejected


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": 0},
        {"scale": 1.5},
        {"scale": float("nan")},
        {"max_tokens": 0},
        {"seed": -1},
        {"vocab_size": 1},
    ],
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(UsageError):
        materialise(trace((512, [0])), **{"vocab_size": 2000, "max_model_len": 4096, **arguments})


def test_the_malformed_case_is_sorted_into_rejected_and_served():
    workload = builtin_cases(0, cases=["malformed"], too_long_tokens=20_000)
    made = materialise(workload, vocab_size=256, max_model_len=16_000, encode=utf8)
    rejected = {r.request_id.removeprefix("malformed-") for r in made.rejected}
    assert rejected == {
        "empty_prompt", "empty_messages", "empty_token_ids", "zero_input_length", "zero_output",
        "negative_output", "zero_max_tokens", "id_above_vocabulary", "id_above_int32", "negative_id",
        "lone_surrogate", "too_long",
    }  # fmt: skip
    assert {"nul_and_control_characters", "repetition", "open_brackets"} <= {
        r.tags["defect"] for r in made.requests
    }
