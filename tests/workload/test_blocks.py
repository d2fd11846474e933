"""Block traces: what counts as the same block, at any size, for text, token ids and block hashes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.workload import Message, Workload, WorkloadRequest, block_trace


def tokens(*prompts, salts=None):
    salts = salts or [""] * len(prompts)
    requests = tuple(
        WorkloadRequest(request_id=str(i), arrival_s=float(i), token_ids=tuple(p), cache_salt=salt)
        for i, (p, salt) in enumerate(zip(prompts, salts, strict=True))
    )
    return Workload(requests=requests, format="x")


def hashed(*rows, size=8):
    requests = tuple(
        WorkloadRequest(request_id=str(i), arrival_s=float(i), input_length=n, hash_ids=tuple(ids))
        for i, (n, ids) in enumerate(rows)
    )
    return Workload(requests=requests, format="x", block_size=size, is_synthetic_text=True)


def rows(trace):
    """Per request its block ids."""
    return [trace.block_ids[a:b].tolist() for a, b in itertools.pairwise(trace.request_start.tolist())]


def brute_force(prompts, size):
    """Ids in order of first appearance of (every token up to the block's end)."""
    known = {}
    return [
        [known.setdefault(tuple(p[: at + size]), len(known)) for at in range(0, len(p), size)]
        for p in prompts
    ]


PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=20), min_size=1, max_size=8)


@given(PROMPTS, st.integers(1, 7))
def test_two_blocks_are_equal_exactly_when_all_tokens_up_to_their_ends_are(prompts, size):
    trace = block_trace(tokens(*prompts), size)
    assert rows(trace) == brute_force(prompts, size)
    assert trace.num_unique == len(set(trace.block_ids.tolist()))
    assert trace.block_tokens.sum() == trace.prompt_tokens.sum() == sum(map(len, prompts))
    assert not trace.is_lower_bound


def hash_rows(prompts, size):
    """Prompts as a publisher would hash them: one id per prefix that ends at a block's end."""
    return [(len(p), ids) for p, ids in zip(prompts, brute_force(prompts, size), strict=True)]


@settings(max_examples=300)
@given(PROMPTS, st.integers(1, 6), st.integers(1, 13))
def test_recut_hashes_share_a_block_only_where_the_recorded_block_with_its_last_token_is_shared(
    prompts, recorded, wanted
):
    prompts = [p for p in prompts if p] or [[1]]
    trace = block_trace(hashed(*hash_rows(prompts, recorded), size=recorded), wanted)
    known, expected = {}, []
    for prompt in prompts:
        ends = [min(at + wanted, len(prompt)) for at in range(0, len(prompt), wanted)]
        seen = [(tuple(prompt[: -(-end // recorded) * recorded]), end) for end in ends]
        expected.append([known.setdefault(block, len(known)) for block in seen])
    assert rows(trace) == expected
    assert trace.is_lower_bound == (wanted % recorded != 0 and trace.notes != ())


@settings(max_examples=200)
@given(PROMPTS, st.integers(1, 4), st.integers(1, 4))
def test_a_multiple_of_the_recorded_size_loses_nothing_and_other_sizes_never_invent_a_hit(
    prompts, recorded, factor
):
    prompts = [p for p in prompts if p] or [[1]]
    known = hash_rows(prompts, recorded)
    assert rows(block_trace(hashed(*known, size=recorded), recorded * factor)) == brute_force(
        prompts, recorded * factor
    )
    truth = block_trace(tokens(*prompts), factor)
    bound = block_trace(hashed(*known, size=recorded), factor)
    assert bound.num_unique >= truth.num_unique
    same = bound.block_ids[:, None] == bound.block_ids[None, :]
    assert not (same & (truth.block_ids[:, None] != truth.block_ids[None, :])).any()


def test_content_ids_that_do_not_name_prefixes_are_told_apart_by_their_path():
    trace = block_trace(hashed((16, [5, 7]), (16, [6, 7]), (16, [5, 7])))
    assert rows(trace) == [[0, 1], [2, 3], [0, 1]]


def test_salts_share_nothing_even_with_equal_tokens_or_hashes():
    prompt = [1, 2, 3]
    trace = block_trace(tokens(prompt, prompt, prompt, salts=["a", "b", "a"]), 2)
    assert rows(trace) == [[0, 1], [2, 3], [0, 1]]
    assert (trace.tenants, trace.tenant.tolist()) == (("a", "b"), [0, 1, 0])


def test_tokens_beyond_the_listed_hashes_are_in_the_prompt_but_in_no_block():
    workload = hashed((20, [1, 2]), (20, [1, 2]))
    assert block_trace(workload).block_tokens.tolist() == [8, 8, 8, 8]
    trace = block_trace(workload, 6)  # 16 tokens are known: the third block would reach past them
    assert trace.block_tokens.tolist() == [6, 6, 6, 6]
    assert trace.prompt_tokens.tolist() == [20, 20]


def test_uneven_chunks_are_blocks_of_their_own_until_a_size_is_asked_for():
    request = WorkloadRequest(request_id="a", input_length=12, hash_ids=(1, 2), hash_lengths=(5, 7))
    other = WorkloadRequest(request_id="b", input_length=9, hash_ids=(1, 3), hash_lengths=(5, 4))
    workload = Workload(requests=(request, other), format="x")
    native = block_trace(workload)
    assert (rows(native), native.block_tokens.tolist()) == ([[0, 1], [0, 2]], [5, 7, 5, 4])
    cut = block_trace(workload, 4)  # blocks end at 4 | 8 12 and 4 | 8 9
    assert rows(cut) == [[0, 1, 2], [0, 3, 4]]
    assert cut.is_lower_bound


def test_text_without_a_tokenizer_is_cut_by_characters_and_says_so():
    asks = [WorkloadRequest(request_id=c, messages=(Message("user", "x" * 90 + c),)) for c in "ab"]
    workload = Workload(requests=tuple(asks), format="x")
    trace = block_trace(workload)
    assert rows(trace) == [[0, 1], [0, 2]]
    assert trace.is_estimated
    assert "estimated" in trace.notes[0]
    exact = block_trace(workload, 4, encode=lambda request: [1, 2, 3, 4, ord(request.request_id)])
    assert rows(exact) == [[0, 1], [0, 2]]
    assert not exact.is_estimated


def test_requests_of_known_length_alone_share_nothing_and_a_trace_of_only_those_is_refused():
    lengths = WorkloadRequest(request_id="n", input_length=20)
    mixed = Workload(requests=(*tokens([1] * 16).requests, lengths, lengths), format="x")
    assert rows(block_trace(mixed)) == [[0], [1, 2], [3, 4]]
    with pytest.raises(UsageError, match="lengths only"):
        block_trace(Workload(requests=(lengths,), format="x"))


def test_block_sizes_below_one_and_absurd_numbers_of_references_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        block_trace(tokens([1]), 0)
    with pytest.raises(UsageError, match="larger block size"):
        block_trace(hashed((10**9, [1]), size=10**9), 1)


def test_arrays_have_the_types_replay_builds_on():
    trace = block_trace(tokens([1, 2, 3], [], [1, 2]), 2)
    assert trace.block_ids.dtype == trace.request_start.dtype == np.int64
    assert trace.block_tokens.dtype == trace.tenant.dtype == np.int32
    assert trace.arrival_s.dtype == np.float64
    assert trace.request_start.tolist() == [0, 2, 2, 3]
    assert trace.request_of_reference().tolist() == [0, 0, 2]
