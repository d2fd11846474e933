"""`kvtune tune --engine vllm` against a real vLLM: a recipe, a command that starts, no process left; and what
`kvtune verify` says of that recipe."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtune.testing.reference import reference_model_path
from kvtune.workload import generate_chat, write_workload

VLLM = os.environ.get("KVTUNE_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.proof,
    pytest.mark.vllm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not VLLM, reason="KVTUNE_VLLM_PYTHON names the python of a vLLM installation"),
]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "chat.jsonl"
    write_workload(generate_chat(num_requests=60, seed=3, max_chars=2500), path)
    return path


@pytest.fixture(scope="module")
def decoy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is not ours and has vllm in its name."""
    process = subprocess.Popen(["bash", "-c", "exec -a vllm-of-somebody-else sleep 7200"])
    yield process
    assert process.poll() is None, "a process kvtune did not start was stopped"
    process.kill()
    process.wait()


def command(out: Path, workload: Path, *extra: str) -> list[str]:
    return [
        sys.executable, "-m", "kvtune", "tune", str(reference_model_path()), "--workload", str(workload),
        "--engine", "vllm", "--vllm-python", VLLM, "--kv-budget", "128MiB", "--out", str(out), "--json",
        *extra,
    ]  # fmt: skip


def processes_naming(text: str) -> list[str]:
    """Command lines of live processes that hold `text`, this test's own excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def wait_for(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


def serving_processes() -> list[str]:
    # the model's path stands in other command lines too (`kvtune tune`, the probe); only a server has a port
    return [line for line in processes_naming(str(reference_model_path())) if "--port" in line]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, workload: Path, decoy: subprocess.Popen[bytes]) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    result = subprocess.run(
        command(out, workload, "--budget", "6m"), capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout)["recipe"] == str(out / "recipe.json")
    return out


def test_a_real_vllm_is_tuned_and_the_emitted_command_starts(tuned: Path) -> None:
    out = tuned
    record = json.loads((out / "result.json").read_text())
    assert {t["status"] for t in record["trials"]} & {"complete", "COMPLETE"}
    assert serving_processes() == []
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["engine"]["name"] == "vllm"
    knobs = recipe["configuration"]["knobs"]
    assert {"kv_dtype", "block_size", "max_num_seqs"} <= set(knobs)
    effective = recipe["provenance"]["effective"]
    assert effective["block_size"] == knobs["block_size"]
    assert effective["max_num_seqs"] == knobs["max_num_seqs"]

    emitted = subprocess.run(
        [sys.executable, "-m", "kvtune", "emit", str(out / "recipe.json"), "--target", "vllm", "--json"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert_starts(json.loads(emitted.stdout)["command"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_starts(words: list[str]) -> None:
    """Run the emitted words with this vLLM's python, as somebody would who pastes them there."""
    port = free_port()
    environment = {**os.environ, "PATH": f"{Path(VLLM).parent}:{os.environ['PATH']}"}
    server = subprocess.Popen(
        [*words, "--port", str(port)],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    try:
        wait_for(lambda: answers(port) or server.poll() is not None, 240, "the emitted command to serve")
        assert server.poll() is None, f"the emitted command ended: {words}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_ctrl_c_stops_the_server_kvtune_started_and_nothing_else(
    tmp_path: Path, workload: Path, decoy: subprocess.Popen[bytes]
) -> None:
    process = subprocess.Popen(
        command(tmp_path / "out", workload, "--budget", "5m"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(serving_processes, 240, "the server to appear")
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 130
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not serving_processes(), 30, "the server to end")
    assert not (tmp_path / "out" / "recipe.json").exists()


def test_a_crash_of_the_server_is_one_line_and_leaves_no_process(
    tmp_path: Path, workload: Path, decoy: subprocess.Popen[bytes]
) -> None:
    process = subprocess.Popen(
        command(tmp_path / "out", workload, "--budget", "5m"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(serving_processes, 240, "the server to appear")
        time.sleep(2)
        kill_serving_processes()
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 3, stderr[-2000:]
    assert json.loads(stdout)["error"]["exit_code"] == 3
    assert "Traceback" not in stderr
    wait_for(lambda: not serving_processes(), 30, "the rest of the server to end")


def kill_serving_processes() -> None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(reference_model_path()) in line and "--port" in line:
                os.kill(int(entry.name), signal.SIGKILL)


# -- verify --


def verified(recipe: Path, *extra: str, python: str = VLLM) -> tuple[int, dict[str, Any], list[str]]:
    """Exit code, what was printed, and the facts that changed."""
    result = subprocess.run(
        [sys.executable, "-m", "kvtune", "verify", str(recipe), "--vllm-python", python, "--json", *extra],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    record = json.loads(result.stdout)
    facts = record.get("facts", [])
    return result.returncode, record, [fact["name"] for fact in facts if fact["verdict"] == "changed"]


def copy_of_the_model(folder: Path) -> Path:
    shutil.copytree(reference_model_path(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_verify_passes_where_nothing_changed_but_the_place_of_the_model(
    tuned: Path, workload: Path, tmp_path: Path
) -> None:
    recipe = tuned / "recipe.json"
    code, record, _ = verified(recipe, "--workload", str(workload))
    assert (code, record["verdict"]) == (0, "PASS"), record
    names = {fact["name"] for fact in record["facts"]}
    assert {"engine.version", "engine.attention_backend", "model.weights", "model.tokenizer"} <= names
    assert {fact["verdict"] for fact in record["facts"]} == {"same"}
    model = copy_of_the_model(tmp_path / "model")
    assert verified(recipe, "--model", str(model))[0] == 0


def test_verify_fails_on_other_weights_and_on_another_tokenizer(tuned: Path, tmp_path: Path) -> None:
    weights, tokenizer = (copy_of_the_model(tmp_path / name) for name in ("weights", "tokenizer"))
    with (weights / "model.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    content = (tokenizer / "tokenizer.json").read_bytes()
    (tokenizer / "tokenizer.json").write_bytes(content.replace(b"{", b"{ ", 1))
    for model in (weights, tokenizer):
        code, record, changed = verified(tuned / "recipe.json", "--model", str(model))
        assert (code, record["verdict"], changed) == (1, "FAIL", [f"model.{model.name}"])


def test_verify_fails_on_another_version_of_vllm(tuned: Path, tmp_path: Path) -> None:
    """The same vLLM, asked by a Python in which it says another version of itself."""
    script = (
        "import runpy, sys, vllm; vllm.__version__ = '0.99.0'; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(VLLM)} -c {shlex.quote(script)} "$@"\n')
    python.chmod(0o755)
    code, record, changed = verified(tuned / "recipe.json", python=str(python))
    assert (code, record["verdict"], changed) == (1, "FAIL", ["engine.version"]), record
    assert verified(tuned / "recipe.json", "--accept", "engine.version", python=str(python))[0] == 0


def test_a_recipe_of_vllm_edited_by_hand_is_refused(tuned: Path, tmp_path: Path) -> None:
    data = json.loads((tuned / "recipe.json").read_text())
    data["configuration"]["knobs"]["block_size"] *= 2
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    code, record, _ = verified(tmp_path / "recipe.json")
    assert code == 2 and "content hash differs" in record["error"]["message"]
