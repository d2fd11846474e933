"""One running vLLM: settings read back, load runs, scoring."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvtune.adapters.openai_client import CompletionsClient, StreamRequest, StreamResult
from kvtune.adapters.server_process import ServerProcess
from kvtune.adapters.vllm_install import VLLMOffer, root_cause
from kvtune.adapters.vllm_scoring import Scorer
from kvtune.closing import Closing
from kvtune.errors import TargetError, UsageError
from kvtune.target import Config, LoadReport, LoadRequest, LoadResult, ScoreItem, Scores

__all__ = ["RunningVLLM", "counters_of", "effective_settings"]

READ_CONTRACT = "T0"
WARM_UP_TOKENS = 8
MAX_WARM_UP_PROMPT = 512
PACKED_SCORES = 4
"""Prefills sent together when another chunking is asked for."""


class _Sizing(Protocol):
    """What reading back needs of the target that started the server."""

    @property
    def offer(self) -> VLLMOffer: ...
    @property
    def reference_context(self) -> int: ...
    def predicted_bytes(self, config: Config, num_tokens: int) -> int: ...
    def command(self, config: Config, kv_budget_bytes: int) -> list[str]: ...


def effective_settings(
    client: CompletionsClient, *, asked: Config, budget: int, target: _Sizing
) -> dict[str, Any]:
    """Settings of the running server by knob name, and as `findings` whatever differs from what was asked."""
    settings = client.get("/server_info?config_format=json")["vllm_config"]
    cache, scheduler, model = (settings[f"{part}_config"] for part in ("cache", "scheduler", "model"))
    effective: dict[str, Any] = {
        "kv_dtype": cache["cache_dtype"],
        "block_size": cache["block_size"],
        "enable_prefix_caching": bool(cache["enable_prefix_caching"]),
        "max_num_seqs": scheduler["max_num_seqs"],
        "max_num_batched_tokens": scheduler["max_num_batched_tokens"],
    }
    context = target.reference_context
    num_blocks = int(cache["num_gpu_blocks"])
    capacity = cache.get("kv_cache_size_tokens") or (num_blocks - 1) * int(cache["block_size"])
    effective |= {
        "kv_bytes_per_token": target.predicted_bytes(effective, context) / context,
        "reference_context": context,
        "kv_capacity_tokens": int(capacity),
        "num_blocks": num_blocks,
        "kv_budget_bytes": cache.get("kv_cache_memory_bytes"),
        "read_contract": READ_CONTRACT,
        "kernel": f"vllm:{target.offer.attention_backend}",
        "dtype": str(model["dtype"]).removeprefix("torch."),
        "max_model_len": model["max_model_len"],
        "engine_version": target.offer.version,
        "command": target.command(asked, budget),
    }
    effective["findings"] = _findings(effective, asked, budget, target)
    return effective


def _findings(effective: Mapping[str, Any], asked: Config, budget: int, target: _Sizing) -> list[str]:
    found = [
        f"{name}: asked for {value!r}, vLLM runs {effective[name]!r}"
        for name, value in asked.items()
        if name in effective and effective[name] != value
    ]
    found += [f"{name}: vLLM has no such knob, ignored" for name in asked if name not in effective]
    if effective["kv_budget_bytes"] != budget:
        found.append(f"KV budget: asked for {budget} bytes, vLLM runs {effective['kv_budget_bytes']!r}")
    block_bytes = target.predicted_bytes(effective, 1)
    predicted = budget // block_bytes
    if abs(predicted - effective["num_blocks"]) > 1:
        found.append(
            f"sizing: {budget} bytes should hold {predicted} blocks of {block_bytes} bytes, "
            f"vLLM made {effective['num_blocks']}"
        )
    return found


class RunningVLLM(Closing):
    """A started server (see `kvtune.target.RunningTarget`). Not for use from several threads."""

    def __init__(
        self,
        process: ServerProcess,
        client: CompletionsClient,
        served_name: str,
        effective: Mapping[str, Any],
        *,
        vocab_size: int,
    ) -> None:
        self.effective: Mapping[str, Any] = effective
        self.process = process
        self._client = client
        self._served_name = served_name
        self._vocab_size = vocab_size

    def warm_up(self) -> None:
        """One prompt of a full step and a few tokens, so that no measured request pays for first calls."""
        room = int(self.effective["max_model_len"]) - WARM_UP_TOKENS
        length = max(1, min(room, int(self.effective["max_num_batched_tokens"]), MAX_WARM_UP_PROMPT))
        prompt = [position % self._vocab_size for position in range(length)]
        tokens = min(WARM_UP_TOKENS, max(1, room))
        self.generate([LoadRequest(request_id="warm-up", prompt_token_ids=prompt, max_tokens=tokens)])
        self.reset_prefix_cache()

    # -- generation --

    def generate(self, requests: Sequence[LoadRequest]) -> Sequence[Sequence[int]]:
        """Greedy continuations in request order. TargetError if any request fails."""
        results, _ = self._stream(requests, keep_arrivals=False)
        failed = next((result for result in results if result.error), None)
        if failed is not None:
            raise TargetError(f"vLLM failed request {failed.request_id}: {failed.error}")
        return [result.token_ids for result in results]

    def load(
        self,
        requests: Sequence[LoadRequest],
        *,
        deadline_s: float | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> LoadReport:
        """Send requests at their arrival times; the prefix cache is empty at the start.

        Failed or late requests are results with `error`. TargetError when the server died.
        """
        self.reset_prefix_cache()
        before = self._counters()
        results, duration_s = self._stream(requests, deadline_s=deadline_s, on_done=on_done)
        after = self._counters()
        return LoadReport(
            results=[_load_result(result) for result in results],
            duration_s=duration_s,
            counters={name: after[name] - before.get(name, 0.0) for name in after},
        )

    def _stream(
        self,
        requests: Sequence[LoadRequest],
        *,
        keep_arrivals: bool = True,
        deadline_s: float | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> tuple[list[StreamResult], float]:
        problems = [self._problem_with(r.prompt_token_ids, r.max_tokens) for r in requests]
        sendable = [request for request, problem in zip(requests, problems, strict=True) if problem is None]
        wire = [
            StreamRequest(
                request_id=request.request_id,
                body=self._completion_body(request),
                arrival_s=request.arrival_s if keep_arrivals else 0.0,
            )
            for request in sendable
        ]
        results, duration_s = self._client.stream_all(wire, deadline_s=deadline_s, on_done=on_done)
        self._check_alive()
        seen = iter([_complete(r, q) for r, q in zip(results, sendable, strict=True)])
        merged = [
            next(seen) if problem is None else _unsent(request, problem)
            for request, problem in zip(requests, problems, strict=True)
        ]
        return merged, duration_s

    def _completion_body(self, request: LoadRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._served_name,
            "prompt": list(request.prompt_token_ids),
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": request.ignore_eos,
            "return_token_ids": True,
        }
        if request.cache_salt:
            body["cache_salt"] = request.cache_salt
        return body

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks. TargetError if vLLM refuses (a request still holds some)."""
        reply = self._client.post("/reset_prefix_cache")
        if not (isinstance(reply, dict) and reply.get("success")):
            raise TargetError(f"vLLM did not reset its prefix cache: {reply}")

    # -- scoring --

    def score(
        self, items: Sequence[ScoreItem], *, num_top: int, chunk: int | None = None
    ) -> Sequence[Scores]:
        """Teacher-forced log-probabilities in item order (see `kvtune.adapters.vllm_scoring`).

        `chunk`: vLLM fixes its step size at start. None or that size (`max_num_batched_tokens`): one
        prefill of prompt + continuation. 1: token by token through vLLM's decode. Any other: prefills
        that share their steps, which cuts and packs prompts differently, the numerical noise that a
        second chunking is asked for.

        UsageError for an item that does not fit the model together with one more token.
        """
        for item in items:
            self._check_item(item)
        is_served = chunk is None or chunk == self.effective["max_num_batched_tokens"]
        scorer = Scorer(self._client, self._served_name, self._vocab_size)
        try:
            if chunk == 1 and not is_served:
                return scorer.by_decode(items, num_top)
            return scorer.by_prefill(items, num_top, concurrency=1 if is_served else PACKED_SCORES)
        except TargetError:
            self._check_alive()
            raise

    def _check_item(self, item: ScoreItem) -> None:
        tokens = [*item.prompt_token_ids, *item.continuation]
        if not item.prompt_token_ids or not item.continuation:
            raise UsageError(f"item {item.item_id}: scoring needs a prompt and a continuation")
        if problem := self._problem_with(tokens, 1):
            raise UsageError(f"item {item.item_id}: {problem}")

    # -- the server itself --

    def _problem_with(self, token_ids: Sequence[int], max_tokens: int) -> str | None:
        """Why vLLM must not be sent this. An id outside the vocabulary ends its engine process (0.32)."""
        if not token_ids:
            return "the prompt is empty"
        bad = [token for token in token_ids if not 0 <= token < self._vocab_size]
        if bad:
            return f"token id {bad[0]} is outside the vocabulary of {self._vocab_size}"
        limit = int(self.effective["max_model_len"])
        if len(token_ids) + max_tokens > limit:
            return f"{len(token_ids)} + {max_tokens} tokens do not fit vLLM's max_model_len {limit}"
        return None

    def _check_alive(self) -> None:
        code = self.process.exit_code()
        if code is None and self._is_answering():
            return
        cause = root_cause(self.process.log_tail(1 << 20)) or (
            "its engine stopped answering" if code is None else f"exit code {code}"
        )
        raise TargetError(f"vLLM died while running: {cause}")

    def _is_answering(self) -> bool:
        try:
            self._client.get("/health")
        except TargetError:
            return False
        return True

    def _counters(self) -> dict[str, float]:
        text = self._client.get("/metrics")
        return counters_of(text) if isinstance(text, str) else {}

    def close(self) -> None:
        """Stop the server and everything below it; idempotent."""
        self.process.stop()


_COUNTER = re.compile(r"^vllm:(\w+?)(?:_total)?(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_COUNTERS = (
    "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens",
)  # fmt: skip


def counters_of(metrics: str) -> dict[str, float]:
    """vLLM's counters we report, from Prometheus text, summed over engines."""
    found: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
    for name, value in _COUNTER.findall(metrics):
        if name in found:
            found[name] += float(value)
    return found


def _complete(result: StreamResult, request: LoadRequest) -> StreamResult:
    """Fewer tokens than asked for although the end token is ignored is a failure, not a short answer."""
    short = request.ignore_eos and len(result.token_ids) < request.max_tokens
    if result.error is None and short:
        said = f"asked for {request.max_tokens} tokens, got {len(result.token_ids)}"
        return dataclasses.replace(result, error=said)
    return result


def _unsent(request: LoadRequest, problem: str) -> StreamResult:
    at = request.arrival_s
    return StreamResult(request_id=request.request_id, start_s=at, end_s=at, error=problem)


def _load_result(result: StreamResult) -> LoadResult:
    return LoadResult(
        request_id=result.request_id,
        token_ids=result.token_ids,
        num_cached_tokens=result.num_cached_tokens or 0,
        ttft_s=result.ttft_s,
        tpot_s=result.tpot_s,
        e2e_s=result.e2e_s,
        itl_s=result.itl_s,
        error=result.error,
    )
