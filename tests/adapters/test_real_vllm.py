"""Against a real vLLM: KVTUNE_VLLM_PYTHON names a Python that has one. Each start takes some 20 seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvtune.adapters.vllm_server import VLLMTarget
from kvtune.errors import TargetError, UsageError
from kvtune.target import LoadRequest, ScoreItem

PYTHON = os.environ.get("KVTUNE_VLLM_PYTHON")
BUDGET = 8 << 20
VOCAB = 512
CONFIG = {
    "kv_dtype": "auto", "block_size": 32, "max_num_seqs": 8, "max_num_batched_tokens": 256,
    "enable_prefix_caching": True,
}  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.proof,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PYTHON is None, reason="KVTUNE_VLLM_PYTHON is not set"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    import torch

    from kvtune.testing.models import write_model_folder

    torch.set_num_threads(1)
    return write_model_folder(
        tmp_path_factory.mktemp("model"), "llama", dtype=torch.bfloat16, head_dim=64, num_heads=4,
        num_kv_heads=1, num_layers=4, hidden_size=256, vocab_size=VOCAB, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.fixture(scope="module")
def target(model_folder, tmp_path_factory):
    target = VLLMTarget(model_folder, python=Path(PYTHON or ""), run_dir=tmp_path_factory.mktemp("run"))
    yield target
    target.close()


@pytest.fixture(scope="module")
def running(target):
    with target.start(CONFIG, kv_budget_bytes=BUDGET) as server:
        yield server


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size=int(n)).tolist() for n in rng.integers(40, 300, size=num)]


def session_members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if entry.name.isdigit() and fields[0] not in ("Z", "X") and int(fields[3]) == session:
            found.append(int(entry.name))
    return found


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_the_search_space_is_what_the_attention_backend_lists(target):
    knobs = {knob.name: knob for knob in target.knobs()}
    assert set(knobs) == set(CONFIG)
    assert knobs["kv_dtype"].baseline == "auto"
    if target.offer.platform == "cpu":
        assert knobs["kv_dtype"].values == ("auto", "fp8_e4m3", "fp8_e5m2")
        assert knobs["block_size"].values == (32, 64, 128, 256)
        assert target.offer.kv_dtypes["int8_per_token_head"] is not None


def test_settings_are_read_back_and_the_blocks_are_what_sizing_predicts(target, running):
    effective = running.effective
    assert {name: effective[name] for name in CONFIG} == CONFIG
    assert effective["findings"] == []
    token_bytes = 4 * 2 * 1 * 64 * 2  # layers x (K, V) x heads x head dim x bf16
    assert effective["kv_bytes_per_token"] == token_bytes
    assert effective["num_blocks"] == BUDGET // (32 * token_bytes)
    assert effective["kv_budget_bytes"] == BUDGET
    assert effective["read_contract"] == "T0"
    assert effective["dtype"] == "bfloat16"


def test_a_load_run_honours_arrivals_measures_tokens_and_starts_with_an_empty_prefix_cache(running):
    first = prompts(1)[0][:70]
    requests = [
        LoadRequest(request_id=str(i), prompt_token_ids=first, max_tokens=6, arrival_s=0.4 * i)
        for i in range(3)
    ]
    for _ in range(2):
        report = running.load(requests)
        assert [result.error for result in report.results] == [None] * 3
        assert [result.num_cached_tokens for result in report.results] == [0, 64, 64]
        assert all(len(result.token_ids) == 6 for result in report.results)
        assert all(0 < result.ttft_s < result.e2e_s for result in report.results)
        assert report.duration_s >= 0.8
        assert report.counters["generation_tokens"] == 18
        assert report.counters["prefix_cache_hits"] == 128


def test_a_request_that_would_kill_the_engine_fails_alone(running):
    good = prompts(1)[0]
    bad = LoadRequest(request_id="bad", prompt_token_ids=[1, VOCAB], max_tokens=2)
    long = LoadRequest(request_id="long", prompt_token_ids=[5] * 1024, max_tokens=2)
    fine = LoadRequest(request_id="fine", prompt_token_ids=good, max_tokens=2)
    report = running.load([bad, long, fine])
    assert "outside the vocabulary" in report.results[0].error
    assert "max_model_len" in report.results[1].error
    assert report.results[2].error is None


def test_prefill_scores_agree_with_transformers_and_decode_scores_with_prefill(running, model_folder):
    import torch
    from transformers import AutoModelForCausalLM

    texts = prompts(4, seed=1)
    said = running.generate([LoadRequest(request_id=str(i), prompt_token_ids=p, max_tokens=24)
                             for i, p in enumerate(texts)])  # fmt: skip
    rng = np.random.default_rng(2)
    forced = [[int(t) for t in rng.permutation(tokens)] for tokens in said[2:]]  # not what vLLM would say
    items = [
        ScoreItem(item_id=str(i), prompt_token_ids=p, continuation=c)
        for i, (p, c) in enumerate(zip(texts, [*said[:2], *forced], strict=True))
    ]
    scores = running.score(items, num_top=VOCAB)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for item, found in zip(items, scores, strict=True):
        assert found.is_full
        tokens = torch.tensor([[*item.prompt_token_ids, *item.continuation]])
        with torch.inference_mode():
            logits = model(tokens).logits[0, len(item.prompt_token_ids) - 1 : -1]
        expected = torch.log_softmax(logits, -1).numpy()
        at = np.take_along_axis(expected, found.ids.astype(np.int64), 1)
        kl = (np.exp(at) * (at - found.logprobs)).sum(1)
        assert kl.mean() < 0.02, "bf16 against float32"
        assert np.array_equal(found.ids[:, 0], found.argmax)
    assert np.mean(scores[0].argmax == np.array(items[0].continuation)) > 0.9
    packed = running.score(items, num_top=32, chunk=64)
    decoded = running.score(items, num_top=32, chunk=1)
    for exact, other in [*zip(scores, packed, strict=True), *zip(scores, decoded, strict=True)]:
        assert np.abs(exact.token_logprobs - other.token_logprobs).max() < 0.15
        assert np.abs(exact.token_logprobs - other.token_logprobs).mean() < 0.02


def test_an_fp8_cache_halves_the_bytes_changes_the_scores_and_its_command_starts(target, running):
    items = [ScoreItem(item_id=str(i), prompt_token_ids=p, continuation=p[:16])
             for i, p in enumerate(prompts(3, seed=3))]  # fmt: skip
    reference = running.score(items, num_top=32)
    config = CONFIG | {"kv_dtype": "fp8_e4m3", "block_size": 64}
    aligned = [
        ScoreItem(
            item_id=i.item_id, prompt_token_ids=i.prompt_token_ids, continuation=i.continuation, at_ids=r.ids
        )
        for i, r in zip(items, reference, strict=True)
    ]
    with target.start(config, kv_budget_bytes=BUDGET) as candidate:
        assert candidate.effective["findings"] == []
        assert candidate.effective["kv_bytes_per_token"] * 2 == running.effective["kv_bytes_per_token"]
        assert candidate.effective["num_blocks"] == BUDGET // (64 * 512)
        scores = candidate.score(aligned, num_top=32)
        launched = candidate.process.command
    for before, after in zip(reference, scores, strict=True):
        known = after.ids >= 0
        assert known.mean() > 0.9
        assert np.array_equal(after.ids[known], before.ids[known])
        assert not np.array_equal(after.logprobs[known], before.logprobs[known])
    command = target.command(config, BUDGET)
    assert tuple(command) == launched[: len(command)], "what is emitted is what ran"


@pytest.mark.parametrize(
    ("change", "budget", "said"),
    [
        ({"block_size": 16}, BUDGET, "block size 16"),
        ({"kv_dtype": "int8_per_token_head"}, BUDGET, "int8_per_token_head"),
        ({}, 64 << 10, "cannot hold one sequence of 1024 tokens"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, BUDGET, "max_num_batched_tokens"),
    ],
)
def test_what_cannot_run_here_is_infeasible_not_broken(target, change, budget, said):
    if target.offer.platform != "cpu" and "block_size" in change:
        pytest.skip("block size 16 is fine there")
    with pytest.raises(UsageError, match=said) as caught:
        target.start(CONFIG | change, kv_budget_bytes=budget)
    assert "\n" not in str(caught.value)


def test_a_killed_server_is_a_target_error_and_nothing_of_it_is_left(target):
    with target.start(CONFIG, kv_budget_bytes=BUDGET) as server:
        session = server.process.session_id
        members = session_members(session)
        assert len(members) >= 3, "guard, API server, engine, worker"
        api_server = next(
            pid for pid in members if "--served-model-name" in command_line(pid) and pid != session
        )
        os.kill(api_server, signal.SIGKILL)
        requests = [LoadRequest(request_id="a", prompt_token_ids=prompts(1)[0], max_tokens=200)]
        with pytest.raises(TargetError):
            server.load(requests)
    assert session_members(session) == []


def processes_below(ancestor: int) -> list[int]:
    """Living descendants of a process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    below = {ancestor}
    while found := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= found
    return sorted(below - {ancestor})


CALLER = """
import sys
from pathlib import Path
from kvtune.adapters.vllm_server import VLLMTarget
target = VLLMTarget(sys.argv[1], python=Path(sys.argv[2]), run_dir=Path(sys.argv[3]))
print("asked", target.offer.version, flush=True)
with target.start({"block_size": 32}, kv_budget_bytes=8 << 20) as server:
    print("session", server.process.session_id, flush=True)
    import time
    time.sleep(600)
"""


@pytest.mark.parametrize("moment", ["while it starts", "while it runs"])
def test_ctrl_c_leaves_no_process_of_ours_and_ends_no_strangers(model_folder, tmp_path, moment):
    stranger_path = tmp_path / "vllm"
    stranger_path.symlink_to("/bin/sleep")
    stranger = subprocess.Popen([stranger_path, "600"])
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(model_folder), PYTHON or "", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert caller.stdout is not None
        assert caller.stdout.readline().startswith("asked")
        if moment == "while it runs":
            assert caller.stdout.readline().startswith("session")
        else:
            time.sleep(6)
        ours = processes_below(caller.pid)
        assert any("process_guard" in command_line(pid) for pid in ours)
        assert len(ours) >= 2, "the guard and at least vLLM's first process"
        caller.send_signal(signal.SIGINT)
        assert caller.wait(timeout=30) != 0
        deadline = time.monotonic() + 20
        while alive := [pid for pid in ours if Path(f"/proc/{pid}").exists() and state_of(pid) != "Z"]:
            assert time.monotonic() < deadline, [command_line(pid) for pid in alive]
            time.sleep(0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        caller.kill()
        caller.communicate()


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
