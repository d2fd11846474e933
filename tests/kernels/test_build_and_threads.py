"""The library is optional, starts no thread it was not given, and survives a fork."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvtune.kernels.native import library_path
from kvtune.kernels.torch_team import torch_team

ROOT = Path(__file__).parents[2]
PRELUDE = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(int(sys.argv[1]))
from paged_case import make_case, random_query
from kvtune.kernels import choose_backend, paged_attention
backend = choose_backend("native")
case = make_case([3000, 40], k_codec="int8", v_codec="int8")
q = random_query(case, 2)
attend = lambda: paged_attention(q, case.cache, case.batch([1, 1]), scale=0.1, backend=backend)
tasks = lambda: len(os.listdir("/proc/self/task"))
"""

needs_library = pytest.mark.skipif(library_path() is None, reason="native kernels are not built")


def run(code: str, threads: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(threads)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_library
def test_one_thread_starts_none():
    result = run("before = tasks(); attend(); print(tasks() - before)", 1)
    assert result.stdout.strip() == "0", result.stderr


@needs_library
@pytest.mark.skipif(torch_team() == 0, reason="torch has no OpenMP of GNU's kind here")
def test_more_threads_are_those_torch_has():
    code = "torch.rand(1 << 22).exp(); before = tasks(); attend(); print(tasks() - before)"
    result = run(code, 2)
    assert result.stdout.strip() == "0", result.stderr


@needs_library
def test_where_torch_has_no_team_the_kernels_start_their_own():
    code = """
import ctypes
from kvtune.kernels.native import library_path
torch.rand(1 << 22).exp()
expected, before = attend(), tasks()
ctypes.CDLL(str(library_path())).kvtune_use_team(None)
print(torch.equal(attend(), expected), tasks() - before)
"""
    result = run(code, 2)
    assert result.stdout.strip() == "True 1", result.stderr


@needs_library
def test_a_forked_child_computes_with_threads_of_its_own():
    code = """
expected = attend()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(attend(), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(attend(), expected))
"""
    result = run(code, 2)
    assert result.stdout.strip() == "0 True", result.stderr


@needs_library
def test_calls_from_several_threads_at_once_agree():
    code = """
from concurrent.futures import ThreadPoolExecutor
expected = attend()
with ThreadPoolExecutor(3) as pool:
    print(all(pool.map(lambda _: torch.equal(attend(), expected), range(60))))
"""
    result = run(code, 2)
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_the_build_succeeds_without_a_compiler_and_says_so(tmp_path):
    env = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    result = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build")],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "without native kernels" in result.stderr
    assert not list(tmp_path.rglob("*kvtune_kernels*"))
