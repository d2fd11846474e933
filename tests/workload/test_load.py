"""Readers: what each format becomes, how it is recognised, and what is refused with which line."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtune.errors import InputFileError, UsageError
from kvtune.workload import (
    FORMATS,
    Message,
    Workload,
    WorkloadRequest,
    load_workload,
    malformed_files,
    write_workload,
)
from kvtune.workload.source import Source

TALK = [
    {"from": "gpt", "value": "Welcome."},
    {"from": "human", "value": "One?"},
    {"from": "gpt", "value": "1."},
    {"from": "human", "value": "Two?"},
    {"from": "gpt", "value": "2."},
    {"from": "human", "value": "unanswered"},
]


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hashed(*rows: tuple[int, list[int]], **extra: object) -> list[dict[str, object]]:
    return [
        {"timestamp": 1000 * i, "input_length": n, "output_length": 3, "hash_ids": ids, **extra}
        for i, (n, ids) in enumerate(rows)
    ]


@pytest.mark.parametrize("as_list", [True, False])
def test_sharegpt_makes_one_request_of_each_answered_question_with_the_history_before_it(tmp_path, as_list):
    talks = [{"id": "a", "conversations": TALK}, {"conversations": TALK[1:3]}]
    path = tmp_path / "sharegpt"
    path.write_text(json.dumps(talks, indent=1) if as_list else "\n".join(map(json.dumps, talks)))
    workload = load_workload(path)
    assert workload.format == "sharegpt"
    first, second, third = workload.requests
    assert first.messages == (Message("user", "One?"),)
    assert first.answer == "1."
    assert second.messages == (Message("user", "One?"), Message("assistant", "1."), Message("user", "Two?"))
    assert first.session_id == second.session_id == "a"
    assert third.session_id != "a"
    assert first.output_length is None
    assert "detected" in workload.notes[0]


def test_a_pretty_printed_list_larger_than_the_read_window_is_read_whole_and_errors_keep_their_line(tmp_path):
    talks = [
        {"id": f"t{i}", "conversations": [*TALK, {"from": "x", "value": "é" * 1000}]} for i in range(200)
    ]
    path = tmp_path / "long.json"
    text = json.dumps(talks, indent=1)
    path.write_text(text)
    assert len(load_workload(path).requests) == 400
    lines = text.splitlines()
    bad = 4321
    lines[bad - 1] = "}{"
    path.write_text("\n".join(lines))
    with pytest.raises(InputFileError, match=rf"line {bad}: malformed JSON"):
        load_workload(path)


def test_a_wrong_field_in_a_pretty_printed_list_is_reported_at_the_first_line_of_its_element(tmp_path):
    talks = [{"id": f"t{i}", "conversations": [*TALK, {"from": "x", "value": "e" * 500}]} for i in range(300)]
    talks[250]["conversations"] = [{"from": "human", "value": 5}]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(talks, indent=1))
    line = path.read_text().splitlines().index('  "id": "t250",')  # the brace is the line before
    with pytest.raises(InputFileError, match=rf"line {line}: 'value' must be text"):
        load_workload(path, format="sharegpt")


def test_a_second_answer_in_a_row_makes_no_second_request(tmp_path):
    talk = [*TALK[1:3], {"from": "gpt", "value": "or one"}, *TALK[3:5]]
    first, second = load_workload(write(tmp_path, "s.jsonl", {"conversations": talk})).requests
    assert (first.answer, second.answer) == ("1.", "2.")
    assert [m.content for m in second.messages] == ["One?", "1.", "or one", "Two?"]


def test_openai_chat_keeps_the_bound_and_takes_a_final_assistant_message_as_the_answer(tmp_path):
    ask = {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]}
    path = write(
        tmp_path, "chat.jsonl",
        {"messages": [ask], "max_tokens": 9, "model": "m", "temperature": 0},
        {"messages": [ask, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": []},
    )  # fmt: skip
    one, two, three, four = load_workload(path).requests
    assert (one.messages, one.max_tokens, one.output_length) == ((Message("user", "Hi there"),), 9, None)
    assert (two.messages, two.answer) == ((Message("user", "Hi there"),), "Hello")
    assert "image_url" in (three.problem or "")
    assert four.problem


def test_openai_batch_lines_take_their_id_and_body(tmp_path):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 7}
    path = write(tmp_path, "b.jsonl", {"custom_id": "x", "method": "POST", "url": "/v1/chat", "body": body})
    workload = load_workload(path)
    assert workload.format == "openai_batch"
    assert (workload.requests[0].request_id, workload.requests[0].max_tokens) == ("x", 7)


def test_plain_prompts_may_be_text_or_token_ids(tmp_path):
    path = write(tmp_path, "p.jsonl", {"prompt": "Hi", "output_tokens": 5}, {"prompt": [1, 2, 3]})
    text, ids = load_workload(path).requests
    assert (text.prompt, text.output_length, ids.token_ids) == ("Hi", 5, (1, 2, 3))


def test_mooncake_block_size_is_the_only_one_that_fits_every_row(tmp_path):
    path = write(tmp_path, "m.jsonl", *hashed((1024, [0, 1]), (1025, [0, 1, 2]), (511, [3])))
    workload = load_workload(path)
    assert (workload.format, workload.block_size, workload.is_synthetic_text) == ("mooncake", 512, True)
    assert [r.arrival_s for r in workload.requests] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("size", range(1, 40))
def test_the_inferred_block_size_is_right_or_not_given(tmp_path, size):
    lengths = [1, size, size + 1, 5 * size, 5 * size + 1, 97]
    rows = [(n, list(range(-(-n // size)))) for n in lengths]
    path = write(tmp_path, "m.jsonl", *hashed(*rows))
    fitting = [b for b in range(1, 500) if all(-(-n // b) == len(ids) for n, ids in rows)]
    if fitting == [size]:
        assert load_workload(path).block_size == size
    else:
        with pytest.raises(UsageError, match="--trace-block-size"):
            load_workload(path)


def test_a_block_size_bounded_only_by_partial_blocks_is_found(tmp_path):
    path = write(tmp_path, "m.jsonl", *hashed((11, [0, 1]), (7, [2, 3])))  # 6 <= B and B < 7
    assert load_workload(path).block_size == 6


def test_a_block_size_the_rows_do_not_determine_must_be_given(tmp_path):
    ambiguous = write(tmp_path, "a.jsonl", *hashed((600, [0, 1])))
    impossible = write(tmp_path, "i.jsonl", *hashed((1024, [0, 1]), (9000, [0])))
    for path in (ambiguous, impossible):
        with pytest.raises(UsageError, match="--trace-block-size"):
            load_workload(path)
        assert load_workload(path, trace_block_size=512).block_size == 512
    with pytest.raises(InputFileError, match="line 1: 2 hash ids"):
        load_workload(ambiguous, trace_block_size=1000)


def test_a_limit_keeps_the_first_requests_and_all_rows_still_tell_the_block_size(tmp_path):
    path = write(tmp_path, "m.jsonl", *hashed((600, [0, 1]), (1024, [0, 1]), (1025, [0, 1, 2])))
    workload = load_workload(path, limit=1)
    assert (len(workload.requests), workload.block_size) == (1, 512)


def test_bailian_turns_of_one_chat_share_a_session(tmp_path):
    rows = hashed((16, [1]), (32, [1, 2]), (33, [1, 2, 3]), (17, [9, 8]), type="text")
    chain = [(10, -1), (11, 10), (12, 11), (20, -1)]
    for row, (own, parent) in zip(rows, chain, strict=True):
        row |= {"chat_id": own, "parent_chat_id": parent}
    workload = load_workload(write(tmp_path, "b.jsonl", *rows))
    assert (workload.format, workload.block_size) == ("bailian", 16)
    assert [r.session_id for r in workload.requests] == ["10", "10", "10", "20"]
    assert workload.requests[1].arrival_s == 1000.0


def test_agent_sessions_share_ids_within_a_session_only(tmp_path):
    turns = [
        {"t": 0.0, "in": 100, "out": 3, "model": "m", "hash_runs": [1, 2]},
        {"t": 9.5, "in": 200, "out": 3, "hash_runs": [1, 2, 7, 1]},
    ]
    rows = [{"id": name, "block_size": 64, "requests": turns} for name in "ab"]
    workload = load_workload(write(tmp_path, "s.jsonl", *rows))
    assert (workload.format, workload.block_size) == ("agent_sessions", 64)
    a1, b1, a2, _ = workload.requests
    assert (a1.session_id, b1.session_id, a2.arrival_s) == ("a", "b", 9.5)
    assert (a2.hash_ids[:2], len(a2.hash_ids)) == (a1.hash_ids, 3)
    assert not set(a1.hash_ids) & set(b1.hash_ids)
    for runs in ([1], [1, 10**12], [2**40, 1]):
        rows[0]["requests"] = [{"t": 0, "in": 100, "out": 3, "hash_runs": runs}]
        with pytest.raises(InputFileError, match="line 1: "):
            load_workload(write(tmp_path, "s.jsonl", *rows))


def test_azure_and_burstgpt_give_lengths_and_arrivals_from_the_first_on(tmp_path):
    azure = tmp_path / "a.csv"
    azure.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
    )
    burst = tmp_path / "b.csv"
    burst.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,M,472,18,490,x\n"
    )
    workload = load_workload(azure)
    assert workload.requests[1].arrival_s == pytest.approx(4.314579, abs=1e-5)
    assert (workload.requests[0].input_length, workload.requests[1].output_length) == (374, 109)
    assert load_workload(burst).requests[0].input_length == 472


def test_requests_are_in_arrival_order_with_ties_in_file_order(tmp_path):
    rows = [{"request_id": str(i), "arrival_s": t, "prompt": "x"} for i, t in enumerate([5, 3, 5, 3, 9])]
    workload = load_workload(write(tmp_path, "k.jsonl", *rows))
    assert [r.request_id for r in workload.requests] == ["1", "3", "0", "2", "4"]
    assert workload.requests[0].arrival_s == 0


def test_repeated_request_ids_are_made_unique(tmp_path):
    rows = [{"request_id": "a", "arrival_s": 0, "prompt": "x"}] * 3 + [
        {"request_id": "a@2", "arrival_s": 0, "prompt": "x"}
    ]
    assert len({r.request_id for r in load_workload(write(tmp_path, "k.jsonl", *rows)).requests}) == 4


def test_gzip_is_recognised_by_content_and_the_hash_is_of_the_stored_bytes(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(gzip.compress(b'{"prompt": "hi"}\n'))
    workload = load_workload(path)
    assert workload.requests[0].prompt == "hi"
    assert workload.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_byte_order_mark_and_blank_lines_are_accepted(tmp_path):
    path = tmp_path / "bom"
    path.write_bytes(b'\xef\xbb\xbf\n\r\n{"prompt": "hi"}\r\n\n')
    assert load_workload(path).requests[0].prompt == "hi"


@pytest.mark.parametrize("defect", malformed_files())
def test_a_malformed_file_is_refused_in_one_line_that_names_it(tmp_path, defect):
    path = tmp_path / defect
    path.write_bytes(malformed_files()[defect])
    with pytest.raises(InputFileError) as refusal:
        load_workload(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_malformed_json_on_line_7_is_said_to_be_on_line_7(tmp_path):
    path = tmp_path / "seven.jsonl"
    path.write_bytes(malformed_files()["line_7_malformed"])
    with pytest.raises(InputFileError, match="line 7: malformed JSON"):
        load_workload(path)


def test_what_is_not_a_readable_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputFileError, match="no such file"):
        load_workload(tmp_path / "absent")
    with pytest.raises(InputFileError, match="is a folder"):
        load_workload(tmp_path)
    with pytest.raises(InputFileError, match="not a regular file"):
        load_workload(tmp_path / "pipe")
    with pytest.raises(InputFileError):
        load_workload("bad\0name")


def test_a_line_over_the_cap_and_a_gzip_bomb_are_refused(tmp_path):
    long_line = tmp_path / "long"
    long_line.write_text('{"prompt": "' + "x" * 5000 + '"}\n')
    with pytest.raises(InputFileError, match="line 1: longer than 1000 bytes"):
        list(Source(long_line, max_line_bytes=1000).lines())
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 100_000))
    with pytest.raises(InputFileError, match="expands to more than 50 times"):
        list(Source(bomb, max_expansion=50, free_expansion_bytes=10_000).lines())


def test_an_unknown_or_contradicted_format_is_refused(tmp_path):
    path = write(tmp_path, "p.jsonl", {"prompt": "hi"})
    with pytest.raises(UsageError, match="choose auto or one of"):
        load_workload(path, format="yaml")
    with pytest.raises(InputFileError, match="azure is CSV"):
        load_workload(path, format="azure")
    with pytest.raises(InputFileError, match="'input_length' is missing"):
        load_workload(path, format="mooncake")
    for arguments in ({"limit": 0}, {"trace_block_size": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            load_workload(path, **arguments)


texts = st.text(alphabet=st.characters(), max_size=8)  # includes lone surrogates and controls
numbers = st.integers(0, 2**63 - 1)
canonical = st.builds(
    WorkloadRequest,
    request_id=st.uuids().map(str),
    arrival_s=st.floats(0, 1e6),
    prompt=st.none() | texts,
    messages=st.lists(st.builds(Message, st.sampled_from(["user", "system"]), texts), max_size=2).map(tuple),
    tools=st.lists(texts, max_size=2).map(tuple),
    token_ids=st.none() | st.lists(st.integers(-5, 2**40), max_size=3).map(tuple),
    hash_lengths=st.none() | st.lists(st.integers(0, 600), max_size=3).map(tuple),
    input_length=st.none() | numbers,
    output_length=st.none() | st.integers(-3, 9),
    max_tokens=st.none() | st.integers(-3, 9),
    answer=st.none() | texts,
    session_id=texts,
    cache_salt=texts,
    priority=st.integers(-3, 3),
    tags=st.dictionaries(texts, texts, max_size=2),
    problem=st.none() | texts,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(canonical, min_size=1, max_size=4, unique_by=lambda r: r.request_id))
def test_kvtune_jsonl_gives_back_exactly_what_was_written(tmp_path, requests):
    start = min(r.arrival_s for r in requests)
    requests = sorted(requests, key=lambda r: r.arrival_s)
    write_workload(Workload(requests=tuple(requests), format="x"), tmp_path / "w.jsonl")
    loaded = load_workload(tmp_path / "w.jsonl")
    assert loaded.format == "kvtune"
    for before, after in zip(requests, loaded.requests, strict=True):
        assert after.arrival_s == before.arrival_s - start
        for name in WorkloadRequest.__dataclass_fields__:
            if name != "arrival_s":
                assert getattr(after, name) == getattr(before, name), name


def test_kvtune_jsonl_keeps_block_size_and_the_synthetic_mark(tmp_path):
    trace = load_workload(write(tmp_path, "m.jsonl", *hashed((600, [0, 1]))), trace_block_size=512)
    write_workload(trace, tmp_path / "k.jsonl")
    loaded = load_workload(tmp_path / "k.jsonl")
    assert (loaded.block_size, loaded.is_synthetic_text) == (512, True)
    assert loaded.requests == trace.requests
    with pytest.raises(UsageError, match="cannot be written"):
        write_workload(trace, tmp_path / "absent" / "k.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from(
    ["messages", "prompt", "conversations", "from", "value", "role", "content", "hash_ids", "input_length",
     "output_length", "timestamp", "chat_id", "body", "custom_id", "request_id", "arrival_s", "tags",
     "kvtune_workload", "block_size", "max_tokens", "id", "requests", "hash_runs", "t", "in"]
)  # fmt: skip
rows = st.lists(st.dictionaries(field_names, json_values, max_size=5).map(json.dumps), max_size=4)
hostile = st.binary(max_size=200) | rows.map(lambda lines: "\n".join(lines).encode()) | rows.map(
    lambda lines: f"[{','.join(lines)}]".encode()
)  # fmt: skip


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile, st.booleans(), st.sampled_from(["auto", *FORMATS]))
def test_any_bytes_give_a_workload_or_a_one_line_refusal(tmp_path, content, is_packed, format_name):
    path = tmp_path / "hostile"
    path.write_bytes(gzip.compress(content) if is_packed else content)
    try:
        workload = load_workload(path, format=format_name)
    except UsageError as refusal:  # InputFileError is one
        assert "\n" not in str(refusal)
    else:
        assert workload.requests
