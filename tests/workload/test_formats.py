"""The shape of each published format, by hand: what is read, what is refused, what is said."""

import csv
import gzip
import io
import itertools
import json

import pytest

from kvtune.errors import InputFileError, UsageError
from kvtune.workload import block_trace, load_workload


def write(folder, name, *rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(folder, name, text, *, is_packed=False):
    path = folder / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if is_packed else data)
    return path


def rag(**fields):
    chunks = {
        "sys_prompt": [8302],
        "passages_ids": [6123, 7239],
        "history": [],
        "web_search": [],
        "user_input": [9],
    }
    return {
        "timestamp": "27", "input_length": 700, "output_length": 12, "session_id": "1758-x",
        "hash_ids": {**chunks, **fields},
    }  # fmt: skip


CHUNKS = (
    "kind,id,token_length\nsys_prompt,8302,512\npassages_ids,6123,100\n"
    "passages_ids,7239,60\nuser_input,9,28\n"
)


def test_ragpulse_takes_chunk_lengths_from_the_table_beside_it(tmp_path):
    write_csv(tmp_path, "ragpulse_chunk_tokens.csv.gz", CHUNKS, is_packed=True)
    workload = load_workload(write(tmp_path, "ragpulse.jsonl", rag(), {**rag(), "timestamp": "30"}))
    first = workload.requests[0]
    assert workload.format == "ragpulse"
    assert first.hash_ids == (8302, 6123, 7239, 9)
    assert first.hash_lengths == (512, 100, 60, 28)
    assert [r.arrival_s for r in workload.requests] == [0, 3]
    assert first.session_id == "1758-x"
    assert any("ragpulse_chunk_tokens.csv.gz" in note for note in workload.notes)


def test_ragpulse_without_its_table_takes_the_mean_length_and_says_so(tmp_path):
    workload = load_workload(write(tmp_path, "ragpulse.jsonl", rag()))
    assert workload.requests[0].hash_lengths == (175,) * 4
    assert any("mean, 175 tokens" in note for note in workload.notes)


def test_a_chunk_elsewhere_in_the_prompt_is_no_prefix(tmp_path):
    swapped = rag(passages_ids=[7239, 6123])
    trace = block_trace(load_workload(write(tmp_path, "r.jsonl", rag(), swapped)))
    assert trace.block_ids.tolist() == [0, 1, 2, 3, 0, 4, 5, 6]


def test_an_unknown_kind_of_chunk_and_a_broken_table_are_refused(tmp_path):
    with pytest.raises(InputFileError, match="kind of chunk that RAGPulse does not: 'pictures'"):
        load_workload(write(tmp_path, "r.jsonl", rag(pictures=[1])))
    write_csv(tmp_path, "ragpulse_chunk_tokens.csv", CHUNKS + "history,x,5\n")
    with pytest.raises(InputFileError, match=r"line 6: 'id' must be a whole number"):
        load_workload(write(tmp_path, "r.jsonl", rag()))


def test_a_table_of_chunks_is_recognised_for_what_it_is(tmp_path):
    workload = load_workload(write_csv(tmp_path, "chunks.csv", CHUNKS))
    assert workload.format == "ragpulse_chunks"
    assert [r.input_length for r in workload.requests] == [512, 100, 60, 28]
    assert any("not requests" in note for note in workload.notes)


RATES = "t_s,client,rate_rps,cv,arrival_dist,p1,p2\n"
LENGTHS = "t_s,client,field,mean,p5,p25,p50,p75,p90,p95,p99\n"


def test_servegen_profiles_are_drawn_with_their_rate_and_burstiness(tmp_path):
    rows = [f"{600 * w},steady,1.0,1,Gamma,1,1\n{600 * w},bursty,0.5,4,Gamma,0.0625,1\n" for w in range(20)]
    path = write_csv(tmp_path, "x_rates.csv", RATES + "".join(rows))
    workload = load_workload(path)
    by_client = {
        name: [r.arrival_s for r in workload.requests if r.tags["client"] == name]
        for name in ("steady", "bursty")
    }
    assert len(by_client["steady"]) == pytest.approx(12_000, rel=0.05)
    assert len(by_client["bursty"]) == pytest.approx(6_000, rel=0.25)

    def cv(times):
        gaps = [b - a for a, b in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        return (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean

    assert cv(by_client["steady"]) == pytest.approx(1, abs=0.1)
    assert cv(by_client["bursty"]) == pytest.approx(4, abs=1)
    assert load_workload(path).requests == workload.requests


def test_a_profile_of_too_many_requests_is_scaled_and_the_day_keeps_its_shape(tmp_path):
    rows = "".join(f"{600 * w},0,{1000 if w < 10 else 3000},1,Weibull,1,1\n" for w in range(20))
    workload = load_workload(write_csv(tmp_path, "x_rates.csv", RATES + rows))
    assert len(workload.requests) == pytest.approx(100_000, rel=0.02)
    late = sum(r.arrival_s >= 6000 for r in workload.requests)
    assert late / len(workload.requests) == pytest.approx(0.75, abs=0.02)
    assert any("rates scaled by" in note for note in workload.notes)
    assert len(load_workload(tmp_path / "x_rates.csv", limit=50).requests) == 50


def test_servegen_lengths_follow_the_clients_percentiles_in_their_window(tmp_path):
    write_csv(tmp_path, "x_lengths.csv", LENGTHS + (
        "0,0,input_tokens,100,100,100,100,100,100,100,100\n"
        "21600,0,input_tokens,900,900,900,900,900,900,900,900\n"
        "0,0,output_tokens,50,5,25,50,75,90,95,99\n"
    ))  # fmt: skip
    rows = "".join(f"{t},0,1,1,Gamma,1,1\n" for t in range(0, 43_200, 600))
    requests = load_workload(write_csv(tmp_path, "x_rates.csv", RATES + rows)).requests
    # The shift to 0 s is at most the first gap, a few seconds.
    assert {r.input_length for r in requests if r.arrival_s < 21_500} == {100}
    assert {r.input_length for r in requests if r.arrival_s > 21_600} == {900}
    outputs = sorted(r.output_length for r in requests)
    assert outputs[len(outputs) // 2] == pytest.approx(50, abs=2)
    assert (outputs[0], outputs[-1]) == (5, 99)
    assert load_workload(tmp_path / "x_lengths.csv").requests == requests


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0,0,-1,1,Gamma,1,1", "'rate_rps' must be a time of at least 0"),
        ("0,0,nan,1,Gamma,1,1", "'rate_rps' must be a finite number"),
        ("0,0,1,1,Pareto,1,1", "'arrival_dist' must be Gamma or Weibull"),
        ("0,0,1,1,Gamma,0,1", "'p1' must be a shape"),
        ("0,0,1e30,1,Gamma,1,1", "'rate_rps' must be at most"),
    ],
)
def test_impossible_profiles_are_refused_with_their_line(tmp_path, row, reason):
    with pytest.raises(InputFileError, match=f"line 2: {reason}"):
        load_workload(write_csv(tmp_path, "x_rates.csv", f"{RATES}{row}\n"))


def test_falling_percentiles_are_refused(tmp_path):
    with pytest.raises(InputFileError, match="must not fall"):
        load_workload(write_csv(tmp_path, "l.csv", f"{LENGTHS}0,0,input_tokens,5,9,8,7,6,5,4,3\n"))


def test_sub_agents_of_a_session_come_in_their_place_with_their_own_clock(tmp_path):
    inner = {"t": 5, "requests": [{"t": 1, "in": 64, "out": 1, "hash_ids": [7]}]}
    session = {
        "id": "s",
        "block_size": 64,
        "requests": [{"t": 0, "in": 128, "out": 2, "hash_runs": [1, 2]}, inner],
    }
    workload = load_workload(write(tmp_path, "s.jsonl", session))
    assert [(r.arrival_s, len(r.hash_ids)) for r in workload.requests] == [(0, 2), (6, 1)]


def test_a_session_file_spread_over_lines_is_read(tmp_path):
    path = tmp_path / "session.json"
    session = {"id": "s", "requests": [{"t": 0, "in": 64, "out": 2, "hash_ids": [1]}]}
    path.write_text(json.dumps(session, indent=2) + "\n" + json.dumps({**session, "id": "u"}, indent=2))
    assert [r.session_id for r in load_workload(path).requests] == ["s", "u"]


def test_a_run_of_more_ids_than_the_prompt_has_blocks_is_refused_before_it_is_written_out(tmp_path):
    session = {"id": "s", "requests": [{"t": 0, "in": 640, "out": 2, "hash_runs": [1, 2**60]}]}
    with pytest.raises(InputFileError, match="no more ids than blocks"):
        load_workload(write(tmp_path, "s.jsonl", session))


def test_aiperf_turns_with_a_delay_follow_the_turn_before(tmp_path):
    rows = [
        {"timestamp": 1000, "session_id": "a", "text_input": "hello", "output_length": 4},
        {"delay": 500, "session_id": "a", "text_input": "hello again", "output_length": 4},
        {"timestamp": 1200, "session_id": "b", "text_input": "hi", "output_length": 4},
    ]
    workload = load_workload(write(tmp_path, "m.jsonl", *rows))
    assert workload.format == "mooncake"
    assert [(r.prompt, pytest.approx(r.arrival_s)) for r in workload.requests] == [
        ("hello", 0), ("hi", 0.2), ("hello again", 0.5),
    ]  # fmt: skip


def test_a_mooncake_trace_without_hashes_holds_lengths(tmp_path):
    workload = load_workload(
        write(tmp_path, "m.jsonl", {"timestamp": 5, "input_length": 10, "output_length": 2})
    )
    assert (workload.format, workload.block_size, workload.requests[0].hash_ids) == ("mooncake", None, None)


def test_guidellm_csv_with_line_ends_in_its_cells_is_read(tmp_path):
    buffer = io.StringIO()
    csv.writer(buffer).writerows(
        [["prompt", "output_tokens_count"], ['say "hi"\n\nthen stop', 12], ["x" * 200_000, 3], ["last", 1]]
    )
    workload = load_workload(write_csv(tmp_path, "g.csv", buffer.getvalue()))
    assert workload.format == "guidellm"
    assert [r.output_length for r in workload.requests] == [12, 3, 1]
    assert workload.requests[0].prompt == 'say "hi"\n\nthen stop'


def test_a_quote_that_never_closes_is_refused_with_the_line_it_opens_in(tmp_path):
    with pytest.raises(InputFileError, match="line 3: malformed CSV"):
        load_workload(write_csv(tmp_path, "g.csv", 'prompt\nhi\n"never\nends\n'))


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        ([{"timestamp": "2026-11-22T08:00:00.25Z"}, {"timestamp": "2026-11-22 10:00:02+02:00"}], 1.75),
        ([{"created": 1_700_000_000}, {"created": 1_700_000_002}], 2),
        ([{"timestamp": 1_700_000_000.5}, {"timestamp": 1_700_000_002}], 1.5),
        ([{"timestamp": 1_700_000_000_000}, {"timestamp": 1_700_000_000_250}], 0.25),
        ([{"timestamp": 0}, {"timestamp": 250}], 0.25),
        ([{"arrival_s": 3}, {"arrival_s": 4.5}], 1.5),
    ],
)
def test_logs_tell_arrivals_in_many_ways(tmp_path, stamps, seconds):
    rows = [{"messages": [{"role": "user", "content": "x"}], **stamp} for stamp in stamps]
    requests = load_workload(write(tmp_path, "c.jsonl", *rows)).requests
    assert requests[1].arrival_s == pytest.approx(seconds)


def test_tools_are_kept_in_the_order_and_with_the_keys_sent(tmp_path):
    tool = {"type": "function", "function": {"name": "b", "parameters": {}}}
    row = {"messages": [{"role": "user", "content": "x"}], "tools": [tool, {"a": 1}], "user": "u1"}
    request = load_workload(write(tmp_path, "c.jsonl", row)).requests[0]
    assert request.tools == (json.dumps(tool), '{"a": 1}')
    assert request.tags == {"user": "u1"}


def test_synthetic_load_shares_its_prefixes_and_carries_its_history(tmp_path):
    row = {
        "prompt_tokens": 100, "prompt_tokens_stdev": 20, "output_tokens": 10, "turns": 3, "prefix_tokens": 64,
        "prefix_count": 2, "samples": 60, "request_rate": 2, "seed": 5,
    }  # fmt: skip
    workload = load_workload(write(tmp_path, "s.json", row))
    assert (workload.format, workload.block_size, len(workload.requests)) == ("synthetic", 16, 60)
    prefixes = {r.hash_ids[:4] for r in workload.requests}
    assert len(prefixes) == 2
    first, second = (
        (r for r in workload.requests if r.session_id == "session-0") if False else workload.requests[:2]
    )
    shared = first.input_length // 16
    assert second.hash_ids[:shared] == first.hash_ids[:shared]
    assert set(second.hash_ids[shared:]).isdisjoint(first.hash_ids)
    assert workload.is_synthetic_text
    assert load_workload(tmp_path / "s.json").requests == workload.requests


def test_vllms_prefix_repetition_is_read_and_absurd_sizes_are_refused(tmp_path):
    row = {"num_prefixes": 3, "prefix_len": 32, "suffix_len": 16, "output_len": 8, "num_prompts": 20}
    workload = load_workload(write(tmp_path, "s.json", row))
    assert {r.input_length for r in workload.requests} == {48}
    assert len({r.hash_ids[:2] for r in workload.requests}) == 3
    with pytest.raises(InputFileError, match="ask for fewer samples"):
        load_workload(write(tmp_path, "s.json", {**row, "suffix_len": 2**29}))


@pytest.mark.parametrize(
    "row",
    [
        {"timestamp": -5, "input_length": 5, "hash_ids": [1]},
        {"timestamp": 5, "input_length": -5, "hash_ids": [1]},
        {"timestamp": 5, "input_length": 2**60, "hash_ids": [1]},
        {"timestamp": 5, "input_length": 5.5, "hash_ids": [1]},
        {"timestamp": 5, "input_length": 5, "output_length": -1, "hash_ids": [1]},
        {"timestamp": 5, "input_length": True, "hash_ids": [1]},
    ],
)
def test_impossible_times_and_lengths_are_refused_with_their_line(tmp_path, row):
    good = {"timestamp": 5, "input_length": 5, "hash_ids": [1]}
    with pytest.raises(InputFileError, match="line 2: '") as refusal:
        load_workload(write(tmp_path, "m.jsonl", good, row), trace_block_size=16)
    assert "\n" not in str(refusal.value)


def test_what_is_odd_but_usable_is_a_warning_each(tmp_path):
    rows = [
        {"timestamp": 10, "input_length": 30, "hash_ids": [1, 2], "request_id": "a", "colour": "red"},
        {"timestamp": 5, "input_length": 30, "hash_ids": [1, 2], "request_id": "b"},
        {"timestamp": 20, "input_length": 60, "hash_ids": [1, 2], "request_id": "a", "shape": 1},
    ]
    workload = load_workload(write(tmp_path, "m.jsonl", *rows), trace_block_size=16)
    text = " | ".join(workload.warnings)
    assert len(workload.warnings) == 4
    assert "columns unknown in mooncake are ignored: 'colour', 'shape' (first at line 1)" in text
    assert "1 request ids are there already (first at line 3)" in text
    assert "1 requests arrive before the one in the row above (first at line 2)" in text
    assert "1 requests have too few hash ids" in text
    assert set(workload.warnings) <= set(workload.notes)
    assert [r.request_id for r in workload.requests] == ["b", "a", "a@3"]


def test_thousands_of_unknown_columns_are_one_short_line(tmp_path):
    row = {"timestamp": 1, "input_length": 3, "hash_ids": [1], **{f"{'x' * 90}{i}": i for i in range(5000)}}
    (warning,) = load_workload(write(tmp_path, "m.jsonl", row), trace_block_size=16).warnings
    assert len(warning) < 400 and warning.count("...") == 1


def test_the_lines_that_contradict_each_other_on_the_block_size_are_named(tmp_path):
    rows = [{"timestamp": 0, "input_length": n, "hash_ids": ids} for n, ids in ((100, [1]), (100, [1, 2, 3]))]
    with pytest.raises(UsageError, match="line 1 needs at least 100, line 2 at most 49"):
        load_workload(write(tmp_path, "m.jsonl", *rows))


def test_more_hashes_than_blocks_are_refused_with_their_line(tmp_path):
    row = {"timestamp": 0, "input_length": 100, "hash_ids": [1, 2, 3]}
    with pytest.raises(InputFileError, match="line 1: 3 hash ids for 100 tokens, more than blocks of 64"):
        load_workload(write(tmp_path, "m.jsonl", row), trace_block_size=64)


def test_a_file_that_would_take_too_much_memory_is_refused_at_the_line_where_it_does(tmp_path):
    path = write(tmp_path, "p.jsonl", *({"prompt": "x" * 1000} for _ in range(100)))
    with pytest.raises(InputFileError, match=r"line 18: the requests up to here take more than"):
        load_workload(path, max_held_bytes=50_000)
    assert len(load_workload(path, limit=10, max_held_bytes=50_000).requests) == 10


def test_a_list_on_one_long_line_is_read_element_by_element(tmp_path):
    path = tmp_path / "one-line.json"
    path.write_text(json.dumps([{"prompt": f"{i} é" * 50} for i in range(20_000)], ensure_ascii=False))
    requests = load_workload(path).requests
    assert len(requests) == 20_000
    assert requests[12_345].prompt == "12345 é" * 50
