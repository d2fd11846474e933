"""Anonymised workloads replay alike and hold nothing of what they were made from."""

import dataclasses
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtune.errors import UsageError
from kvtune.workload import (
    Message,
    Workload,
    WorkloadRequest,
    anonymise,
    block_trace,
    generate_chat,
    load_workload,
    write_workload,
)

SALT = bytes(range(32))
CANARY = "canary7391"


def same_references(one, other):
    for name in (
        "block_ids", "request_start", "block_tokens", "arrival_s", "prompt_tokens", "tenant", "session",
        "request_class",
    ):  # fmt: skip
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert (one.num_unique, one.block_size) == (other.num_unique, other.block_size)


def round_trip(workload, path, **arguments):
    write_workload(anonymise(workload, salt=SALT, **arguments), path)
    return load_workload(path)


def test_chats_replay_to_the_same_blocks(tmp_path):
    chat = generate_chat(num_requests=80, seed=2)
    same_references(block_trace(round_trip(chat, tmp_path / "a.jsonl")), block_trace(chat))
    coarse = round_trip(chat, tmp_path / "b.jsonl", block_size=64)
    same_references(block_trace(coarse), block_trace(chat, 64))


requests = st.builds(
    WorkloadRequest,
    request_id=st.uuids().map(str),
    arrival_s=st.floats(0, 100),
    prompt=st.none() | st.text(max_size=200),
    token_ids=st.none() | st.lists(st.integers(0, 3), max_size=80).map(tuple),
    input_length=st.integers(0, 100),
    session_id=st.sampled_from(["", "a", "b"]),
    cache_salt=st.sampled_from(["", "x", "y"]),
    tags=st.fixed_dictionaries({}, optional={"tenant": st.sampled_from("ab"), "case": st.sampled_from("cd")}),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(requests, min_size=1, max_size=8, unique_by=lambda r: r.request_id), st.integers(1, 40))
def test_any_mix_of_text_tokens_and_lengths_replays_to_the_same_blocks(tmp_path, mixed, size):
    start = min(r.arrival_s for r in mixed)
    ordered = [dataclasses.replace(r, arrival_s=r.arrival_s - start) for r in mixed]
    workload = Workload(requests=tuple(sorted(ordered, key=lambda r: r.arrival_s)), format="x")
    if not any(r.prompt is not None or r.token_ids is not None for r in mixed):
        return
    hidden = round_trip(workload, tmp_path / "w.jsonl", block_size=size)
    same_references(block_trace(hidden, size), block_trace(workload, size))


def test_hash_traces_keep_their_block_size_and_short_lists_of_hashes(tmp_path):
    rows = [(40, [1, 2, 3]), (100, [1, 2]), (33, [1, 2, 9])]
    workload = Workload(
        requests=tuple(
            WorkloadRequest(request_id=str(i), input_length=n, hash_ids=tuple(ids))
            for i, (n, ids) in enumerate(rows)
        ),
        format="mooncake",
        block_size=16,
    )
    hidden = round_trip(workload, tmp_path / "w.jsonl")
    assert hidden.block_size == 16
    same_references(block_trace(hidden), block_trace(workload))
    same_references(block_trace(hidden, 8), block_trace(workload, 8))
    with pytest.raises(UsageError, match="cannot be cut at 32"):
        anonymise(workload, salt=SALT, block_size=32)


def test_uneven_chunks_keep_their_lengths(tmp_path):
    workload = Workload(
        requests=tuple(
            WorkloadRequest(request_id=str(i), input_length=sum(n), hash_ids=ids, hash_lengths=n)
            for i, (ids, n) in enumerate([((1, 2), (30, 5)), ((1, 2, 3), (30, 5, 7)), ((2, 1), (5, 30))])
        ),
        format="ragpulse",
    )
    hidden = round_trip(workload, tmp_path / "w.jsonl")
    assert hidden.requests[1].hash_lengths == (30, 5, 7)
    same_references(block_trace(hidden), block_trace(workload))
    same_references(block_trace(hidden, 4), block_trace(workload, 4))


def test_lengths_alone_stay_lengths_alone(tmp_path):
    workload = Workload(
        requests=(WorkloadRequest(request_id="a", input_length=9, output_length=2),), format="azure"
    )
    (request,) = round_trip(workload, tmp_path / "w.jsonl").requests
    assert (request.input_length, request.output_length, request.hash_ids) == (9, 2, None)


def full_of_canaries():
    request = WorkloadRequest(
        request_id=f"id-{CANARY}",
        messages=(Message(f"system-{CANARY}", f"text {CANARY} " * 40), Message("user", CANARY)),
        tools=(json.dumps({"name": CANARY}),),
        answer=f"answer {CANARY}",
        session_id=f"session-{CANARY}",
        cache_salt=f"salt-{CANARY}",
        tags={"tenant": CANARY, "model": CANARY, f"name-{CANARY}": CANARY, "note": CANARY},
        problem=f"problem {CANARY}",
    )
    return Workload(
        requests=(request, dataclasses.replace(request, request_id=f"other-{CANARY}")),
        format="openai_chat",
        path=Path(f"/home/{CANARY}.jsonl"),
        sha256=CANARY,
        notes=(f"note {CANARY}",),
        warnings=(f"warning {CANARY}",),
    )


def test_nothing_of_any_text_or_name_is_left(tmp_path):
    write_workload(anonymise(full_of_canaries(), salt=SALT), tmp_path / "w.jsonl")
    written = (tmp_path / "w.jsonl").read_text()
    assert CANARY not in written
    assert "text" not in written.replace("there is no text", "").replace("is_synthetic_text", "")
    hidden = load_workload(tmp_path / "w.jsonl")
    one, other = hidden.requests
    assert one.hash_ids == other.hash_ids and one.session_id == other.session_id != ""
    assert one.tags == other.tags and set(one.tags) == {"tenant", "model"}
    assert one.output_length == 5  # 17 characters


def test_another_salt_gives_other_hashes_and_the_same_salt_the_same():
    workload = full_of_canaries()
    first, again, other = (anonymise(workload, salt=salt) for salt in (SALT, SALT, bytes(32)))
    assert first == again
    assert not set(first.requests[0].hash_ids) & set(other.requests[0].hash_ids)
    assert first.requests[0].session_id != other.requests[0].session_id


def test_tenants_with_salts_of_their_own_stay_apart():
    ask = {"prompt": "the same question " * 30}
    workload = Workload(
        requests=tuple(WorkloadRequest(request_id=s, cache_salt=s, **ask) for s in ("a", "b", "a")),
        format="prompts",
    )
    first, second, third = anonymise(workload, salt=SALT).requests
    assert first.hash_ids == third.hash_ids
    assert not set(first.hash_ids) & set(second.hash_ids)


def test_a_short_salt_is_refused():
    with pytest.raises(UsageError, match="at least 16 bytes, found 3"):
        anonymise(full_of_canaries(), salt=b"abc")


def test_a_file_named_gz_is_packed(tmp_path):
    write_workload(anonymise(full_of_canaries(), salt=SALT), tmp_path / "w.jsonl.gz")
    assert gzip.decompress((tmp_path / "w.jsonl.gz").read_bytes()).startswith(b'{"kvtune_workload"')
    assert len(load_workload(tmp_path / "w.jsonl.gz").requests) == 2


@pytest.mark.proof
@pytest.mark.skipif("KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES=DIR names the public traces")
@pytest.mark.parametrize("name", ["mooncake_conversation", "ragpulse_days0-2", "claude_code_fleet_a"])
def test_public_traces_replay_to_the_same_blocks(tmp_path, name):
    size = 512 if "fleet" in name else None
    workload = load_workload(Path(os.environ["KVTUNE_TRACES"]) / f"{name}.jsonl.gz", trace_block_size=size)
    same_references(block_trace(round_trip(workload, tmp_path / "w.jsonl")), block_trace(workload))
