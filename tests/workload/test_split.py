"""Sessions: how they are told from prefixes, and that a split never cuts one."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.workload import Message, TokenRequest, WorkloadRequest, session_labels, split_by_session


def token_requests(sessions: list[str]) -> list[TokenRequest]:
    return [
        TokenRequest(request_id=str(i), arrival_s=float(i), prompt_token_ids=(1,), max_tokens=1, session_id=s)
        for i, s in enumerate(sessions)
    ]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["", *"abcdefgh"]), min_size=2, max_size=60),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_no_session_is_in_both_parts_and_nothing_is_lost(sessions, fraction, seed):
    requests = token_requests(sessions)
    if len({s or f"own {i}" for i, s in enumerate(sessions)}) < 2:
        with pytest.raises(UsageError, match="at least two"):
            split_by_session(requests, fraction, random.Random(seed))
        return
    search, confirm = split_by_session(requests, fraction, random.Random(seed))
    assert search
    assert confirm
    assert not {r.session_id for r in search if r.session_id} & {r.session_id for r in confirm}
    assert sorted((*search, *confirm), key=lambda r: r.arrival_s) == requests
    for part in (search, confirm):
        assert list(part) == sorted(part, key=lambda r: r.arrival_s)
    assert split_by_session(requests, fraction, random.Random(seed)) == (search, confirm)


def test_the_search_part_has_about_the_share_asked_for_and_depends_on_the_generator():
    requests = token_requests([str(i // 3) for i in range(300)])
    for rng in (random.Random(1), np.random.default_rng(1)):
        search, _ = split_by_session(requests, 0.6, rng)
        assert len(search) == 180
    assert split_by_session(requests, 0.6, random.Random(1)) != split_by_session(
        requests, 0.6, random.Random(2)
    )


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(UsageError, match="share"):
        split_by_session(token_requests(["a", "b"]), fraction, random.Random(0))


def hashed(*paths: list[int]) -> list[WorkloadRequest]:
    return [
        WorkloadRequest(request_id=str(i), hash_ids=tuple(p), input_length=1) for i, p in enumerate(paths)
    ]


def test_requests_that_continue_each_other_are_one_session_and_a_common_system_prompt_is_none():
    sessions = [[0, 1, 2, 100 + i] for i in range(30)]
    turns = [[*path, 1000 + i] for i, path in enumerate(sessions)]
    labels = session_labels(hashed(*sessions, *turns))
    assert labels[:30] == labels[30:]
    assert len(set(labels)) == 30


def test_a_long_conversation_stays_one_session():
    talk = [list(range(k)) for k in range(1, 200)]
    assert len(set(session_labels(hashed(*talk)))) == 1


def test_equal_prompts_are_one_session_and_stated_sessions_are_believed():
    system = Message("system", "s")
    ask = WorkloadRequest(request_id="a", messages=(system, Message("user", "q")))
    others = [
        dataclasses.replace(ask, request_id=str(i), messages=(system, Message("user", str(i))))
        for i in range(20)
    ]
    labels = session_labels([ask, *others, dataclasses.replace(ask, request_id="b")])
    assert labels[0] == labels[-1]
    assert len(set(labels)) == 21
    assert session_labels([dataclasses.replace(ask, session_id="x"), ask])[0] == "x"


def test_different_salts_share_no_prefix():
    ask = WorkloadRequest(request_id="a", prompt="same")
    labels = session_labels([ask, dataclasses.replace(ask, request_id="b", cache_salt="other")])
    assert len(set(labels)) == 2
