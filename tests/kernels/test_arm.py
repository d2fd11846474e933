"""The portable kernels on 64-bit ARM: the project's own build, the same meaning, the same bytes written.

Run under emulation by qemu-user, without Python on the other side: portable_parity.cpp is the judge.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "src" / "kvtune" / "kernels" / "csrc"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TOOLS = ("cmake", "g++", COMPILER, EMULATOR)
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.proof,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{', '.join(MISSING)} not found: apt-get install cmake g++ g++-aarch64-linux-gnu qemu-user",
    ),
]


def build(folder: Path, compiler: str, processor: str) -> Path:
    """The library by the project's own build, and the judge beside it. Returns the judge."""
    target = [
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={processor}",
    ]
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *target]
    judge = folder / "portable_parity"
    source = Path(__file__).with_name("portable_parity.cpp")
    for command in (
        configure,
        ["cmake", "--build", folder, "--target", "kvtune_kernels"],
        [compiler, "-std=c++17", "-O1", f"-I{CSRC}", source, f"-L{folder}", "-lkvtune_kernels", "-o", judge,
         f"-Wl,-rpath,{folder}"],
    ):  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        assert "warning:" not in done.stderr, done.stderr[-3000:]
    return judge


def judged(*command: object) -> list[list[str]]:
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_kernels_built_for_arm_agree_with_dense_attention_and_write_the_same_bytes(tmp_path):
    arm = judged(EMULATOR, "-L", "/usr/aarch64-linux-gnu", build(tmp_path / "arm", COMPILER, "aarch64"))
    here = judged(build(tmp_path / "here", "g++", "any"))  # of which nothing but the portable path is known
    assert len(arm) == 13
    assert [case[:5] for case in arm] == [case[:5] for case in here]
