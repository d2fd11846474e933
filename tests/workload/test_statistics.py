"""What `kvtune trace` says of a workload, against counting by hand and against published traces."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtune.workload import Message, Workload, WorkloadRequest, load_workload, workload_statistics


def hashed(prompts, **fields) -> Workload:
    requests = tuple(
        WorkloadRequest(request_id=str(i), arrival_s=float(i), input_length=n, hash_ids=tuple(ids), **fields)
        for i, (n, ids) in enumerate(prompts)
    )
    return Workload(requests=requests, format="x", block_size=4, is_synthetic_text=True)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=8))
def test_ideal_hits_are_the_longest_prefixes_seen_before(paths):
    prefix = workload_statistics(hashed([(4 * len(p), p) for p in paths]))["prefix"]
    hits = sum(
        max((k for q in paths[:i] for k in range(len(p) + 1) if q[:k] == p[:k]), default=0)
        for i, p in enumerate(paths)
    )
    total = sum(map(len, paths))
    assert (prefix["hit_blocks"], prefix["total_blocks"]) == (hits, total)
    assert prefix["unique_blocks"] == total - hits
    assert prefix["ideal_block_hit_rate"] == hits / total


def test_token_hits_weigh_the_last_block_by_what_it_holds_and_tokens_without_id_never_hit():
    prompts = [(6, [1, 2]), (6, [1, 2]), (20, [1])]
    prefix = workload_statistics(hashed(prompts))["prefix"]
    assert prefix["ideal_token_hit_rate"] == (6 + 4) / 32
    assert prefix["block_size"] == 4


def test_lengths_of_text_are_in_characters_and_say_so():
    ask = (Message("system", "x" * 200), Message("user", "y"))
    requests = tuple(WorkloadRequest(request_id=str(i), messages=ask, answer="abc") for i in range(2))
    report = workload_statistics(Workload(requests=requests, format="x"))
    assert report["input_tokens"]["unit"] == report["output_tokens"]["unit"] == "characters"
    assert report["input_tokens"]["p50"] == len("system\n") + 200 + 1 + len("user\ny\n")
    assert report["output_tokens"]["p99"] == 3
    assert (report["prefix"]["unit"], report["prefix"]["is_estimated"]) == ("tokens", True)
    assert report["prefix"]["ideal_block_hit_rate"] == 0.5
    assert report["arrival_cv"] is None


def test_lengths_alone_have_no_reuse_to_speak_of():
    requests = tuple(
        WorkloadRequest(request_id=str(i), arrival_s=t, input_length=n, output_length=2)
        for i, (t, n) in enumerate([(0, 10), (1, 20), (4, 30)])
    )
    report = workload_statistics(Workload(requests=requests, format="x", is_synthetic_text=True))
    histogram = report["input_tokens"].pop("histogram")
    assert report["input_tokens"] == {
        "unit": "tokens", "n": 3, "mean": 20, "p50": 20, "p90": 28, "p99": pytest.approx(29.8), "min": 10,
        "max": 30,
    }  # fmt: skip
    places = [sum(edge <= n for edge in histogram["edges"]) - 1 for n in (10, 20, 30)]
    assert [histogram["counts"][place] for place in places] == [1, 1, 1]
    assert sum(histogram["counts"]) == 3
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert report["arrival_cv"] == pytest.approx(0.5)  # gaps 1 and 3
    assert report["prefix"]["ideal_block_hit_rate"] is None
    json.dumps(report, allow_nan=False)


@pytest.mark.proof
@pytest.mark.skipif("KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES=DIR names the public traces")
@pytest.mark.parametrize("name", ["mooncake_conversation.jsonl.gz", "claude_code_fleet_a.jsonl.gz"])
def test_public_traces_give_the_hits_of_independent_reference_code(name):
    folder = Path(os.environ["KVTUNE_TRACES"])
    expected = json.loads((folder / "expected.json").read_text())[name]
    size = 512 if "fleet" in name else None
    report = workload_statistics(load_workload(folder / name, trace_block_size=size))
    assert report["num_requests"] == expected["requests"]
    assert report["prefix"]["block_size"] == expected["block_size"]
    assert report["prefix"]["total_blocks"] == expected["blocks_total"]
    assert report["prefix"]["unique_blocks"] == expected["unique_blocks"]
    assert report["prefix"]["hit_blocks"] == expected["infinite_hit_blocks"]


@pytest.mark.proof
@pytest.mark.skipif("KVTUNE_TRACES" not in os.environ, reason="KVTUNE_TRACES=DIR names the public traces")
def test_azure_conversation_has_its_published_lengths_and_nearly_poisson_gaps():
    report = workload_statistics(load_workload(Path(os.environ["KVTUNE_TRACES"]) / "azure2023_conv.csv.gz"))
    assert [round(report["input_tokens"][q]) for q in ("p50", "p90", "p99")] == [1020, 2734, 4142]
    assert report["arrival_cv"] == pytest.approx(1.09, abs=0.01)
