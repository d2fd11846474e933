"""What `tune` and `check` work on: the model, the engine that serves it, and the requests as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.cli.screen import say
from kvtune.config import EngineConfig
from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.target import Target
    from kvtune.workload import Materialised, Workload

__all__ = ["VLLM_TOP", "materialised", "open_target", "read_workload", "token_reader", "tuned_model",
           "workload_facts"]  # fmt: skip

DEMO_REQUESTS = 720
MAX_REJECTED = 50
"""Rejected requests that a record names; it counts all."""
VLLM_TOP = 128
"""Ids per token asked of a vLLM server: its answers travel as JSON text."""


def tuned_model(model: Path | None, *, demo: bool) -> Path:
    if demo:
        if model is not None:
            raise UsageError("--demo brings its own model; leave MODEL out")
        from kvtune.testing.reference import reference_model_path

        return reference_model_path()
    if model is None:
        raise UsageError("which model? give a model folder, or --demo")
    if not model.is_dir():
        raise UsageError(f"model folder {model} not found; give the folder that holds config.json")
    return model


def read_workload(
    file: Path | None, *, demo: bool, seed: int, block_size: int | None, limit: int | None
) -> Workload:
    from kvtune.workload import demo_chat, load_workload

    if file is not None:
        return load_workload(file, trace_block_size=block_size, limit=limit)
    if demo:
        return demo_chat(limit or DEMO_REQUESTS, seed=seed, max_chars=4000)
    raise UsageError("which traffic? give --workload FILE with your requests, or --demo")


def open_target(
    engine: str, model: Path, config: EngineConfig, vllm_python: Path | None, *, nested: bool = False
) -> tuple[Target, int, int]:
    """The engine to measure, the model's vocabulary size and the longest sequence in tokens. `nested`: of
    codecs of 8 bits our engine offers the one of two planes alone."""
    if engine == "kvtune":
        own = _own_target(model, config, nested=nested)
        return own, own.loaded.vocab_size, config.max_model_len or own.loaded.max_model_len
    if engine == "vllm":
        from kvtune.adapters.vllm_server import VLLMTarget

        server = VLLMTarget(model, python=vllm_python, dtype=config.dtype, max_model_len=config.max_model_len)
        return server, server.vocab_size, server.max_model_len - 1  # scoring generates one more token
    raise UsageError(f"unknown engine {engine!r}; known: kvtune, vllm")


def _own_target(model: Path, config: EngineConfig, *, nested: bool) -> Any:
    from kvtune.errors import MissingExtraError

    try:
        from kvtune.engine.target import EngineTarget
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvtune"):
            raise
        raise MissingExtraError("the kvtune engine", "engine") from None
    return EngineTarget(model, config=config, nested=nested)


def materialised(
    workload: Workload, model: Path, vocab_size: int, max_model_len: int, *, scale: float, seed: int
) -> Materialised:
    from kvtune.adapters.prompt_encoder import prompt_encoder
    from kvtune.workload import materialise

    needs_text = any(request.has_text for request in workload.requests)
    tokens = materialise(
        workload, vocab_size=vocab_size, max_model_len=max_model_len, scale=scale, seed=seed,
        encode=prompt_encoder(model) if needs_text else None,
    )  # fmt: skip
    for note in (*workload.notes, *tokens.notes):
        say(f"kvtune: {note}", is_aside=True)
    return tokens


def workload_facts(workload: Workload, tokens: Materialised) -> dict[str, Any]:
    """What the recipe says about the traffic it was proven on. `prompts_sha256`: of the token ids as sent."""
    from kvtune.workload import workload_profile

    digest = hashlib.sha256()
    for request in tokens.requests:
        digest.update(f"{request.max_tokens}:{request.prompt_token_ids}\n".encode())
    return {
        "path": None if workload.path is None else str(workload.path), "format": workload.format,
        "sha256": workload.sha256, "prompts_sha256": digest.hexdigest(), "scale": tokens.scale,
        "num_rejected": len(tokens.rejected), "notes": [*workload.notes, *tokens.notes],
        "block_size": workload.block_size, "profile": workload_profile(workload),
        "cases": _cases(workload, tokens),
        "rejected": [
            {"request_id": r.request_id, "reason": r.reason} for r in tokens.rejected[:MAX_REJECTED]
        ],
    }  # fmt: skip


def _cases(workload: Workload, tokens: Materialised) -> dict[str, dict[str, int]]:
    """Requests asked and rejected by their tag `case`; untagged ones under "untagged"."""
    rejected = {r.request_id for r in tokens.rejected}
    cases: dict[str, dict[str, int]] = {}
    for request in workload.requests:
        counts = cases.setdefault(
            request.tags.get("case", "untagged"), {"num_requests": 0, "num_rejected": 0}
        )
        counts["num_requests"] += 1
        counts["num_rejected"] += request.request_id in rejected
    return cases


def token_reader(model: Path) -> Callable[[Sequence[int]], str] | None:
    """Token ids to text with the marks of turns and ends, which tell whose words they are; None without a
    tokenizer."""
    from kvtune.adapters.prompt_encoder import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        return None
    return lambda token_ids: str(tokenizer.decode(list(token_ids), skip_special_tokens=False))
