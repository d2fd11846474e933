"""`kvtune doctor`: what is here, what is missing, the line that fixes it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtune.cli.screen import say
from kvtune.errors import HostError
from kvtune.printable import one_line

if TYPE_CHECKING:
    from kvtune.host import Host

__all__ = ["doctor"]

_PACKAGES = (
    ("numpy", "numpy", "", True),
    ("torch", "torch", "engine", True),
    ("transformers", "transformers", "engine", True),
    ("safetensors", "safetensors", "engine", True),
    ("optuna", "optuna", "tune", False),
    ("httpx2", "httpx2", "tune", False),
)
"""(what, module, extra that brings it, needed to run kvtune's own engine)."""

LOW_DISK_BYTES = 2 << 30
_BUILD = "pip install --force-reinstall --no-binary kvtune kvtune  (needs a C++17 compiler)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `status`: ok, note (something optional is missing) or missing."""

    name: str
    status: str
    found: str
    fix: str | None = None


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> int:
    """What is here, what is missing, and the line that fixes it. Exit 3 if kvtune's engine cannot run."""
    from kvtune.host import read_host

    host = read_host()
    findings = [*_machine(host), *_packages(), *_libraries(), _vllm()]
    can_run = all(finding.status != "missing" for finding in findings)
    if as_json:
        from kvtune._version import __version__

        report = {
            "schema_version": 1,
            "version": __version__,
            "engine_can_run": can_run,
            "host": host.to_dict(),
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report))
    else:
        say("\n".join(_line(finding) for finding in findings))
    return 0 if can_run else 3


def _line(finding: Finding) -> str:
    mark = {"ok": " ", "note": "-", "missing": "!"}[finding.status]
    fix = "" if finding.fix is None else f"\n{'':17}-> {finding.fix}"
    return f"{mark} {finding.name:<14} {finding.found}{fix}"


def _machine(host: Host) -> list[Finding]:
    from kvtune.config import format_bytes

    memory = "unknown"
    if host.memory_bytes is not None and host.available_memory_bytes is not None:
        total, free = format_bytes(host.memory_bytes), format_bytes(host.available_memory_bytes)
        memory = f"{total}, {free} available"
    gpu_fix = "plan and tune on the CPU; for GPU figures run kvtune where the GPU is"
    return [
        Finding(name="python", status="ok", found=f"{platform.python_version()} on {host.system}"),
        Finding(name="cpu", status="ok", found=f"{host.cpu}, {host.num_cpus} usable cores"),
        Finding(name="instructions", status="ok", found=", ".join(host.isa) or "none that kernels use"),
        Finding(name="memory", status="ok", found=memory),
        _disk(),
        Finding(
            name="gpu",
            status="ok" if host.gpus else "note",
            found="; ".join(host.gpus) or "none found",
            fix=None if host.gpus else gpu_fix,
        ),
    ]


def _disk() -> Finding:
    from kvtune.config import format_bytes

    try:
        folder = Path.cwd()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            name="disk", status="note", found=f"no current folder: {error.strerror or error}",
            fix="cd into a folder that exists; runs write their results there",
        )  # fmt: skip
    is_low = free < LOW_DISK_BYTES
    return Finding(
        name="disk",
        status="note" if is_low else "ok",
        found=f"{format_bytes(free)} free in {folder}",
        fix="free some space, or pass --out on another disk" if is_low else None,
    )


def _packages() -> list[Finding]:
    findings: list[Finding] = []
    for name, module, extra, is_needed in _PACKAGES:
        if importlib.util.find_spec(module) is not None:
            findings.append(Finding(name=name, status="ok", found=_version(name)))
            continue
        fix = f"pip install 'kvtune[{extra}]'" if extra else f"pip install {name}"
        status = "missing" if is_needed else "note"
        findings.append(Finding(name=name, status=status, found="not installed", fix=fix))
    return findings


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _libraries() -> list[Finding]:
    """Every native library: whether it is here and loads, and what is lost without it."""
    from kvtune.cache import native, replay_native

    has_torch = importlib.util.find_spec("torch") is not None
    return [
        *((_kernel(), _layers()) if has_torch else map(_without_torch, ("kernel", "engine layers"))),
        _library("cache pools", native.library_path(), native.CacheLibrary,
                 "pools of blocks run in Python, and each step takes longer the more requests run"),
        _library("replay", replay_native.library_path(), replay_native.NativeCore,
                 "kvtune simulate replays traces in Python, many times slower"),
    ]  # fmt: skip


def _without_torch(name: str) -> Finding:
    return Finding(
        name=name, status="note", found="unknown without torch", fix="pip install 'kvtune[engine]'"
    )


def _kernel() -> Finding:
    """Which attention kernel would run, and why not the native one."""
    from kvtune.kernels import choose_backend

    backend = choose_backend()
    if backend.name == "native":
        return Finding(name="kernel", status="ok", found=str(backend.reason))
    found = f"{backend.reason}; attention unpacks blocks before it reads them, many times slower"
    return Finding(name="kernel", status="note", found=found, fix=_BUILD)


def _layers() -> Finding:
    from kvtune.engine import layer_ops

    return _library(
        "engine layers", layer_ops.library_path(), layer_ops.NativeLayerOps,
        "norms, rotary embedding and gates are passes of torch each, and short steps take longer",
    )  # fmt: skip


def _library(name: str, path: Path | None, load: Callable[[Path], object], lost: str) -> Finding:
    """One that was not built costs time alone; one that is here and does not load stops whoever wants it."""
    if path is None:
        return Finding(name=name, status="note", found=f"not built: {lost}", fix=_BUILD)
    try:
        load(path)
    except HostError as error:
        return Finding(name=name, status="missing", found=one_line(str(error), 300), fix=_BUILD)
    return Finding(name=name, status="ok", found=f"native: {path}")


def _vllm() -> Finding:
    """vLLM is found by its command only: importing it takes seconds and it may live in another Python."""
    from kvtune.adapters.vllm_install import INSTALL_LINE, VLLMInstall
    from kvtune.errors import EngineUnavailableError

    try:
        install = VLLMInstall.locate()
    except EngineUnavailableError:
        return Finding(name="vllm", status="note", found="no `vllm` on PATH", fix=INSTALL_LINE)
    return Finding(name="vllm", status="ok", found=f"{shutil.which('vllm')} ({install.python})")
