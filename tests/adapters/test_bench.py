"""The benchmark: its result keys, its arithmetic, and the whole command against a scripted server."""

import ast
import json

import numpy as np
import pytest

from kvtune.adapters.bench_requests import load_requests, text_request, token_request
from kvtune.adapters.bench_result import BenchRecord, arrivals_at_rate, summarise
from kvtune.adapters.emit import emit_recipe
from kvtune.cli.main import main
from kvtune.errors import UsageError
from kvtune.recipe import Recipe, codec_constants_sha256, configuration_of
from kvtune.workload import Message, WorkloadRequest, load_workload

VLLM_KEYS = (
    "num_prompts", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "output_throughput", "total_token_throughput", "max_concurrent_requests",
)  # fmt: skip


def record(start_s=0.0, *, e2e_s=1.0, error=None, **changes) -> BenchRecord:
    """Five tokens, the first after 0.2 s."""
    tokens, gap = 5, (e2e_s - 0.2) / 4
    values = {
        "request_id": "r", "start_s": start_s, "input_tokens": 10, "output_tokens": tokens,
        "cached_tokens": 4,
        "ttft_s": 0.2, "tpot_s": gap, "e2e_s": e2e_s, "itl_s": (gap,) * (tokens - 1), "error": error,
    }  # fmt: skip
    return BenchRecord(**values | changes)


def test_the_result_has_vllms_keys_and_their_arithmetic():
    result = summarise([record(0.0), record(0.5, e2e_s=2.2), record(3.0, error="HTTP 500")], duration_s=4.0)
    assert all(key in result for key in VLLM_KEYS)
    assert all(f"{stem}_{name}_ms" in result for stem in ("mean", "median", "std", "p99")
               for name in ("ttft", "tpot", "itl", "e2el"))  # fmt: skip
    assert (result["completed"], result["failed"], result["is_complete"]) == (2, 1, False)
    assert result["incomplete_reason"] == "HTTP 500"
    assert result["request_throughput"] == 0.5
    assert result["output_throughput"] == 2.5
    assert result["total_token_throughput"] == 7.5
    assert result["total_cached_tokens"] == 8
    assert result["mean_e2el_ms"] == pytest.approx(1600)
    assert result["mean_tpot_ms"] == pytest.approx(350)
    assert result["max_concurrent_requests"] == 2


def test_a_run_without_a_completed_request_has_no_latencies_and_is_still_json():
    result = summarise([record(error="x")], duration_s=1.0)
    assert result["mean_ttft_ms"] is None
    assert json.loads(json.dumps(result, allow_nan=False))["completed"] == 0


def test_cached_tokens_are_unknown_not_zero_where_the_server_never_says():
    assert summarise([record(cached_tokens=None)], duration_s=1.0)["total_cached_tokens"] is None


def test_requests_that_follow_each_other_exactly_are_never_at_once():
    assert summarise([record(0.0), record(1.0)], duration_s=2.0)["max_concurrent_requests"] == 1


def test_arrivals_have_the_asked_rate_and_burstiness_and_infinity_is_all_at_once():
    rng = np.random.default_rng(0)
    gaps = np.diff(arrivals_at_rate(4000, 5.0, burstiness=1.0, rng=rng))
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.08)
    bursty = np.diff(arrivals_at_rate(4000, 5.0, burstiness=0.25, rng=rng))
    assert bursty.std() / bursty.mean() == pytest.approx(2.0, abs=0.25)
    assert arrivals_at_rate(3, float("inf"), burstiness=1.0, rng=rng) == [0.0, 0.0, 0.0]


def test_each_kind_of_request_goes_out_as_its_file_states_it():
    chat = WorkloadRequest(request_id="c", messages=(Message("user", "hi"),), output_length=7)
    text = WorkloadRequest(request_id="t", prompt="hi", max_tokens=90)
    ids = WorkloadRequest(request_id="i", token_ids=(1, 2))
    sent = [text_request(request, {"model": "m"}, 50) for request in (chat, text, ids)]
    assert sent[0].path == "/v1/chat/completions"
    assert sent[0].body == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7}
    assert sent[1].body == {"model": "m", "prompt": "hi", "max_tokens": 50}
    assert sent[2].body["prompt"] == [1, 2]
    with pytest.raises(UsageError, match="lengths but no text; give --model DIR"):
        text_request(WorkloadRequest(request_id="l", input_length=5), {}, None)


CONFIG = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "intermediate_size": 64,
    "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": [1, 2]},
        {"timestamp": 40, "input_length": 30, "output_length": 2, "hash_ids": [1, 3]},
        {"timestamp": 80, "input_length": 90, "output_length": 2, "hash_ids": [1, 3, 4, 5, 6, 7]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    return model


def test_a_trace_of_lengths_becomes_token_ids_of_the_model_and_says_what_it_left_out(trace, folder):
    workload = load_workload(trace, trace_block_size=16)
    requests, notes = load_requests(workload, folder, max_tokens=None, scale=1.0, seed=0)
    assert [len(r.prompt_token_ids) for r in requests] == [20, 30]
    assert requests[0].prompt_token_ids[:16] == requests[1].prompt_token_ids[:16]
    assert any(note.startswith("left out") for note in notes)
    body = token_request(requests[0], {"model": "m"}).body
    assert body["prompt"] == list(requests[0].prompt_token_ids)
    assert body["return_token_ids"] is True, "a server without a tokenizer streams nothing else to time"


@pytest.fixture
def kvtune_bench(capsys):
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def run(*args: str) -> tuple[int, str, str]:
        code = main(["bench", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_measures_a_server_prints_one_object_and_saves_every_request(
    stub, tmp_path, tokens_behaviour, kvtune_bench
):
    stub.behave = tokens_behaviour(first_s=0.05, gap_s=0.02, cached=1)
    workload = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}], "max_tokens": 3} for i in range(4)]
    workload.write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = tmp_path / "result.json"
    code, out, err = kvtune_bench(
        "--url", stub.url, "--workload", str(workload), "--request-rate", "inf", "--max-concurrency", "2",
        "--save", str(saved), "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 0, 12)
    assert result["model_id"] == "stub-model"
    assert result["request_rate"] == "inf"
    assert 50 <= result["median_ttft_ms"] < 200
    assert 15 <= result["median_tpot_ms"] < 60
    assert stub.most_running == 2
    assert len(json.loads(saved.read_text())["ttfts"]) == 4


def test_the_command_exits_3_when_nothing_completed_and_says_why(stub, tmp_path, kvtune_bench):
    stub.behave = lambda handler, body: handler.reply(503, {"error": "overloaded"})
    workload = tmp_path / "chat.jsonl"
    workload.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    code, out, _ = kvtune_bench("--url", stub.url, "--workload", str(workload))
    assert code == 3
    assert "HTTP 503: overloaded" in out


def test_a_recipe_is_measured_in_process_and_its_emitted_snippet_runs(tmp_path, trace, kvtune_bench, capsys):
    from kvtune.testing.models import write_model_folder

    model = write_model_folder(tmp_path / "llama", "llama", max_position_embeddings=128)
    knobs = {"k_codec": "int8", "v_codec": "int8", "block_size": 16, "max_num_seqs": 2}
    recipe = Recipe(
        model={"path": str(model)}, engine={"name": "kvtune"}, hardware={}, workload={},
        read_contract="T0", kernel="torch", codec_constants_sha256=codec_constants_sha256(),
        baseline={}, evidence={},
        fallback={}, quality={"verdict": "PASS"},
        configuration=configuration_of(knobs, kv_budget_bytes=1 << 20,
                                       engine={"num_threads": 1, "kernel": "torch"}),
    )  # fmt: skip
    path = recipe.save(tmp_path / "recipe.json")
    code, out, err = kvtune_bench(
        "--recipe", str(path), "--workload", str(trace), "--trace-block-size", "16", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert (result["backend"], result["completed"], result["total_output_tokens"]) == ("kvtune", 3, 7)
    assert result["total_cached_tokens"] > 0
    assert {name: result["effective"][name] for name in knobs} == knobs
    exec(emit_recipe(recipe, path, "transformers").text, {})
    said = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < len(said) <= 64


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "nothing to measure"),
        (["--url", "localhost:8000"], "expected a server URL"),
        (["--url", "http://127.0.0.1:9", "--recipe", "r.json"], "give one"),
        (["--url", "http://127.0.0.1:9", "--request-rate", "0"], "--request-rate"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(trace, args, said, kvtune_bench):
    code, out, err = kvtune_bench("--workload", str(trace), "--trace-block-size", "16", *args)
    assert code == 2, err
    assert said in err
    assert (out, len(err.strip().splitlines())) == ("", 1)
