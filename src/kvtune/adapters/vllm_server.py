"""The vLLM body of the Target port: a real server per configuration, driven through its OpenAI API.

The search space is what the installed vLLM offers for this model; every setting is read back from the
running server. vLLM's own quantised KV encodes at write and decodes at every read: contract T0.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import itertools
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kvtune.adapters.openai_client import CompletionsClient
from kvtune.adapters.server_process import ServerProcess, free_loopback_port
from kvtune.adapters.vllm_install import (
    VLLMInstall,
    VLLMOffer,
    clean_environment,
    format_name,
    knob_flags,
    root_cause,
)
from kvtune.adapters.vllm_running import RunningVLLM, effective_settings
from kvtune.config import format_bytes
from kvtune.errors import EngineUnavailableError, UsageError
from kvtune.host import read_host
from kvtune.model_folder import has_tokenizer, hub_repo, model_digests, read_config, weight_dtypes
from kvtune.spec import ModelSpec, Paging, allocator_bytes, kv_format, text_config
from kvtune.target import Config, Knob

__all__ = ["VLLMTarget"]

DEFAULT_KV_BUDGET = 1 << 30
DEFAULT_REFERENCE_CONTEXT = 2048
HEALTH_POLL_S = 0.2
INFEASIBLE = (
    "No available memory for the cache blocks",
    "larger than the available KV cache memory",
    "No common block size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "out of memory",
    "not enough memory",
)
"""What vLLM says when this configuration cannot run here, as opposed to vLLM being broken."""


class VLLMTarget:
    """vLLM plus a model folder. `python` has vLLM installed; None takes the `vllm` on PATH.

    `dtype`: vLLM's --dtype. `max_model_len`: longest sequence [tokens]; None takes the model's.
    `enforce_eager`: None means yes on CPU, where compiling takes longer than a trial. `run_dir` receives
    the logs; None keeps them in a temporary folder until `close`. `extra_flags` are passed as they are.

    Raises EngineUnavailableError without a vLLM, InputFileError or UnsupportedModelError for a bad model.
    The server listens on the loopback only and wants a random key; its development endpoints (cache
    reset, settings) have no key, so do not run it on a machine shared with users you do not trust.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str | Path,
        *,
        python: Path | None = None,
        run_dir: Path | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        enforce_eager: bool | None = None,
        reference_context: int = DEFAULT_REFERENCE_CONTEXT,
        start_timeout_s: float = 900.0,
        extra_flags: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model_path = Path(model_path).resolve()
        self._config = read_config(self.model_path)
        self.spec = ModelSpec.from_config(self._config)
        self.vocab_size = int(text_config(self._config)[0]["vocab_size"])
        self.install = VLLMInstall.locate(python)
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._enforce_eager = enforce_eager
        self._reference_context = reference_context
        self._start_timeout_s = start_timeout_s
        self._extra_flags = tuple(extra_flags)
        self._clock = clock
        self._is_temporary = run_dir is None
        self._run_dir = run_dir or Path(tempfile.mkdtemp(prefix="kvtune-vllm-"))
        self._run_dir.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)
        self._starts = itertools.count()

    @property
    def offer(self) -> VLLMOffer:
        """What this vLLM offers for this model; asked once (some seconds)."""
        return self._asked_offer

    @cached_property
    def _asked_offer(self) -> VLLMOffer:
        arguments: dict[str, Any] = {"dtype": self._dtype, "enforce_eager": True}
        arguments["skip_tokenizer_init"] = not has_tokenizer(self.model_path)
        if self._max_model_len is not None:
            arguments["max_model_len"] = self._max_model_len
        offer = self.install.ask(self.model_path, arguments)
        if offer.attention_backend is None:
            reason = offer.kv_dtypes.get("auto") or "unknown reason"
            raise EngineUnavailableError(
                f"vLLM {offer.version} on {offer.platform} cannot attend for this model: {reason}"
            )
        if "--kv-cache-memory-bytes" not in offer.flags:
            raise EngineUnavailableError(
                f"vLLM {offer.version} has no --kv-cache-memory-bytes to set a KV budget; update vLLM"
            )
        return offer

    def knobs(self) -> Sequence[Knob]:
        """The search space: dtypes and block sizes of the attention backend, batch limits around the default.

        The baseline is what this vLLM does when no flag is given.
        """
        offer = self.offer
        blocks = tuple(sorted({*offer.block_sizes, offer.default_block_size}))
        seqs, tokens = offer.default_max_num_seqs, offer.default_max_num_batched_tokens
        return (
            Knob(name="kv_dtype", values=offer.search_dtypes(), baseline="auto", is_lossy=True),
            Knob(name="block_size", values=blocks, baseline=offer.default_block_size),
            Knob(
                name="enable_prefix_caching",
                values=(True, False),
                baseline=offer.default_enable_prefix_caching,
            ),
            Knob(name="max_num_seqs", values=_around(seqs), baseline=seqs),
            Knob(name="max_num_batched_tokens", values=_around(tokens), baseline=tokens),
        )

    def identity(self) -> Mapping[str, Any]:
        """`model`, `engine`, `hardware` as a recipe records them. Hashes the weights (seconds per 10 GB)."""
        offer = self.offer
        return {
            "model": {
                "path": str(self.model_path),
                "repo": hub_repo(self.model_path),
                "weight_dtypes": weight_dtypes(self.model_path),
                "model_type": self.spec.model_type,
                **model_digests(self.model_path),
                "dtype": offer.model_dtype,
                "max_model_len": offer.max_model_len,
            },
            "engine": {
                **self.facts(),
                "launcher": self.install.launcher(offer, str(self.model_path)),
                "flags": self._fixed_flags(),
            },
            "hardware": read_host().to_dict(),
        }

    def facts(self) -> Mapping[str, Any]:
        """Versions and what vLLM chose for this model; nothing is started and no weight is read."""
        offer = self.offer
        return {
            "name": "vllm", "version": offer.version, "platform": offer.platform,
            "attention_backend": offer.attention_backend, "torch": offer.torch,
            "transformers": offer.transformers, "dtype": offer.model_dtype,
        }  # fmt: skip

    def kv_bytes_per_token(self, config: Config, *, context: int) -> float:
        """Allocator bytes per token of one sequence of `context` tokens, by vLLM's paging rules."""
        return self.predicted_bytes(config, context) / context

    def start(self, config: Config, *, kv_budget_bytes: int | None = None) -> RunningVLLM:
        """Start a server and wait until it answers. `kv_budget_bytes`: 1 GiB unless given.

        UsageError: this configuration cannot run here (budget below one longest sequence, block size,
        batch limits). EngineUnavailableError: the server did not come up; quotes its reason and log.
        """
        budget = kv_budget_bytes or DEFAULT_KV_BUDGET
        self._check_feasible(config, budget)
        log_path = self._run_dir / f"vllm-{next(self._starts)}.log"
        served_name = f"kvtune-{secrets.token_hex(8)}"  # whoever answers under this name is ours
        api_key = secrets.token_hex(16)
        port = free_loopback_port()
        process = ServerProcess(
            [*self.command(config, budget), *self._control_flags(served_name, port)],
            log_path=log_path,
            environment=clean_environment() | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": api_key},
            cwd=self._run_dir,
        )
        try:
            self._wait_until_ready(process, port)
            client = CompletionsClient(f"http://127.0.0.1:{port}", api_key=api_key, clock=self._clock)
            _check_who_answers(client, served_name)
            effective = effective_settings(client, asked=config, budget=budget, target=self)
            running = RunningVLLM(process, client, served_name, effective, vocab_size=self.vocab_size)
            running.warm_up()
        except BaseException:
            process.stop()
            raise
        return running

    def command(self, config: Config, kv_budget_bytes: int) -> list[str]:
        """The command a user would type for this configuration."""
        return [
            *self.install.launcher(self.offer, str(self.model_path)),
            *knob_flags(config),
            "--kv-cache-memory-bytes", str(kv_budget_bytes),
            *self._fixed_flags(),
        ]  # fmt: skip

    def close(self) -> None:
        """Remove the temporary log folder, unless an error message pointed to a log in it; idempotent."""
        atexit.unregister(self.close)
        if self._is_temporary:
            shutil.rmtree(self._run_dir, ignore_errors=True)

    @property
    def max_model_len(self) -> int:
        return self.offer.max_model_len

    @property
    def reference_context(self) -> int:
        """Context at which `effective["kv_bytes_per_token"]` is stated."""
        return min(self._reference_context, self.max_model_len)

    def _fixed_flags(self) -> list[str]:
        """Settings that are not searched and that the emitted command repeats."""
        flags = ["--dtype", self._dtype, "--max-model-len", str(self.max_model_len)]
        eager = self.offer.platform == "cpu" if self._enforce_eager is None else self._enforce_eager
        if eager:
            flags.append("--enforce-eager")
        if not has_tokenizer(self.model_path):
            flags.append("--skip-tokenizer-init")
        return [*flags, *self._extra_flags]

    def _control_flags(self, served_name: str, port: int) -> list[str]:
        """What only our measuring needs; not part of an emitted command."""
        return [
            "--host", "127.0.0.1", "--port", str(port), "--served-model-name", served_name,
            "--enable-prompt-tokens-details", "--max-logprobs", "-1",
        ]  # fmt: skip

    def predicted_bytes(self, config: Config, num_tokens: int) -> int:
        """Allocator bytes of one sequence of `num_tokens` tokens. UsageError for an unknown cache dtype."""
        offer = self.offer
        kv_dtype = str(config.get("kv_dtype", "auto"))
        name = format_name(kv_dtype, offer.model_dtype)
        if name is None:
            raise UsageError(f"kvtune cannot size vLLM's cache dtype {kv_dtype!r}")
        paging = Paging(
            block_size=int(config.get("block_size", offer.default_block_size)),
            chunk=int(config.get("max_num_batched_tokens", offer.default_max_num_batched_tokens)),
        )
        return allocator_bytes(self.spec, num_tokens, kv_format("vllm", name, self.spec), "vllm", paging)

    def _check_feasible(self, config: Config, budget: int) -> None:
        offer = self.offer
        kv_dtype, block_size = config.get("kv_dtype", "auto"), config.get("block_size")
        if refusal := offer.kv_dtypes.get(str(kv_dtype), "unknown name"):
            raise UsageError(f"vLLM {offer.version} cannot serve kv_dtype {kv_dtype!r} here: {refusal}")
        if block_size is not None and block_size not in (*offer.block_sizes, offer.default_block_size):
            sizes = ", ".join(map(str, offer.block_sizes))
            raise UsageError(
                f"{offer.attention_backend} cannot use block size {block_size}; it offers {sizes}"
            )
        needed = self.predicted_bytes(config, self.max_model_len)
        if needed > budget:
            raise UsageError(
                f"KV budget {format_bytes(budget)} cannot hold one sequence of {self.max_model_len} tokens "
                f"({format_bytes(needed)}); raise the budget or lower max_model_len"
            )

    def _wait_until_ready(self, process: ServerProcess, port: int) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not _is_healthy(port):
            code = process.exit_code()
            if code is not None:
                raise self._start_failure(process, code)
            if time.monotonic() > deadline:
                self._is_temporary = False
                raise EngineUnavailableError(
                    f"vLLM did not answer within {self._start_timeout_s:.0f} s; its log is {process.log_path}"
                )
            time.sleep(HEALTH_POLL_S)

    def _start_failure(self, process: ServerProcess, code: int) -> Exception:
        cause = root_cause(process.log_tail(1 << 20)) or f"it ended with exit code {code}"
        if any(words in cause for words in INFEASIBLE):
            return UsageError(f"vLLM cannot run this configuration: {cause}")
        self._is_temporary = False
        return EngineUnavailableError(f"vLLM did not start: {cause} (log: {process.log_path})")


def _around(default: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and the whole of a default limit."""
    return tuple(sorted({max(1, default // share) for share in (8, 4, 2, 1)}))


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _check_who_answers(client: CompletionsClient, served_name: str) -> None:
    models = client.get("/v1/models")
    names = [entry.get("id") for entry in models.get("data", ())] if isinstance(models, dict) else []
    if served_name not in names:
        raise EngineUnavailableError(
            f"another server took {client.base_url} before vLLM did; start kvtune again"
        )
