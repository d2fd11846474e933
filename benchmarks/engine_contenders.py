"""Engines of the serving benchmark, each alive in a process of its own and asked over a pipe.

    python benchmarks/engine_contenders.py NAME MODEL THREADS CODEC

Runs under the interpreter of the engine it hosts, so nothing but the standard library is imported here before
the engine's own packages. One JSON object a line comes in (the arguments of `Child.run`), one goes out
({"times": [[s, ...] per request], "start"}): when each token of each request was there, on this process's
clock: its CPU time with one thread (other processes' slices stay out), wall time with more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Clock = Callable[[], float]
KV_BYTES = 2 << 30
MAX_LEN = 8192 + 512
MAX_SEQS = 64


class Contender(Protocol):
    """An engine driven step by step. `step` returns (request, tokens it has by now) of who moved."""

    def add(self, request: str, prompt: list[int], max_tokens: int) -> None: ...
    def step(self) -> list[tuple[str, int]]: ...
    def end(self, requests: list[str]) -> None:
        """Answer these no further."""
        ...

    def forget(self) -> None:
        """Drop cached prefixes."""
        ...


class Kvtune:
    def __init__(self, model: Path, threads: int, codec: str) -> None:
        import torch

        from kvtune import CacheConfig, EngineConfig, SamplingParams, SchedulerConfig
        from kvtune.engine import Engine

        torch.set_num_threads(threads)
        self._params = SamplingParams
        self._engine = Engine.from_pretrained(
            model,
            cache=CacheConfig(kv_budget=KV_BYTES, k_codec=codec, v_codec=codec),
            scheduler=SchedulerConfig(max_num_seqs=MAX_SEQS),
            config=EngineConfig(max_model_len=MAX_LEN),
        )

    def add(self, request: str, prompt: list[int], max_tokens: int) -> None:
        params = self._params(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.add_request(request, prompt, params)

    def step(self) -> list[tuple[str, int]]:
        return [(out.request_id, len(out.token_ids)) for out in self._engine.step()]

    def end(self, requests: list[str]) -> None:
        for request in requests:
            self._engine.abort(request)
        self._engine.discard_outputs()

    def forget(self) -> None:
        self._engine.reset_prefix_cache()


class Vllm:
    def __init__(self, model: Path, threads: int, codec: str) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES >> 30), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        import torch
        from vllm import LLM, SamplingParams

        torch.set_num_threads(threads)
        self._params = SamplingParams
        self._engine: Any = LLM(
            model=str(model), skip_tokenizer_init=True, enforce_eager=codec != "compiled", dtype="bfloat16",
            max_model_len=MAX_LEN, max_num_seqs=MAX_SEQS,
        ).llm_engine  # fmt: skip

    def add(self, request: str, prompt: list[int], max_tokens: int) -> None:
        params = self._params(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._engine.add_request(request, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[str, int]]:
        return [(out.request_id, len(out.outputs[0].token_ids)) for out in self._engine.step()]

    def end(self, requests: list[str]) -> None:
        self._engine.abort_request(requests)

    def forget(self) -> None:
        self._engine.reset_prefix_cache()


class Transformers:
    """`generate` on left-padded batches of like length. Not driven by steps: a batch is one step."""

    BATCH = 16

    def __init__(self, model: Path, threads: int, codec: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        self._model.generation_config.eos_token_id = None
        self._waiting: list[tuple[str, list[int], int]] = []

    def add(self, request: str, prompt: list[int], max_tokens: int) -> None:
        self._waiting.append((request, prompt, max_tokens))

    def step(self) -> list[tuple[str, int]]:
        self._waiting.sort(key=lambda item: (item[2], len(item[1])))
        batch, self._waiting = self._waiting[: self.BATCH], self._waiting[self.BATCH :]
        width = max(len(prompt) for _, prompt, _ in batch)
        ids = [[0] * (width - len(prompt)) + prompt for _, prompt, _ in batch]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for _, prompt, _ in batch]
        self._model.generate(
            self._torch.tensor(ids), attention_mask=self._torch.tensor(mask), do_sample=False,
            max_new_tokens=max(count for _, _, count in batch), pad_token_id=0,
        )  # fmt: skip
        return [(request, count) for request, _, count in batch]

    def end(self, requests: list[str]) -> None:
        """Whole batches are answered to their end."""

    def forget(self) -> None:
        """Nothing is cached."""


class Continuous(Transformers):
    """Transformers' own continuous batching, all requests of a cell in one call."""

    def step(self) -> list[tuple[str, int]]:
        batch, self._waiting = self._waiting, []
        for count in sorted({count for _, _, count in batch}):  # one length of output a call
            config = self._model.generation_config
            config.max_new_tokens, config.do_sample = count, False
            prompts = [prompt for _, prompt, wanted in batch if wanted == count]
            self._model.generate_batch(prompts, generation_config=config, progress_bar=False)
        return [(request, count) for request, _, count in batch]


CONTENDERS = {"kvtune": Kvtune, "vllm": Vllm, "transformers": Transformers, "continuous": Continuous}


def serve(engine: Contender, work: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Run the requests of one cell to the end, or until each has `enough` tokens. Those after the first
    `early` come when these decode."""
    prompts = work["prompts"]
    max_tokens: list[int] = work["max_tokens"]
    enough = [min(count, work.get("enough") or count) for count in max_tokens]
    early = work["early"] if work["early"] is not None else len(prompts)
    times: dict[str, list[float]] = {f"{work['round']}-{i}": [] for i in range(len(prompts))}
    names = list(times)
    engine.forget()
    start, arrivals = clock(), [0.0] * len(prompts)
    late = list(range(early, len(prompts)))
    for i in range(early):
        engine.add(names[i], prompts[i], max_tokens[i])
    while any(len(times[name]) < count for name, count in zip(names, enough, strict=True)):
        if late and all(len(times[name]) >= 4 for name in names[:early]):
            arrivals[late[0]] = clock() - start
            engine.add(names[late[0]], prompts[late[0]], max_tokens[late[0]])
            late.pop(0)
        moved = engine.step()
        now = clock() - start
        for name, count in moved:
            times[name] += [now] * (count - len(times[name]))
    seconds = clock() - start
    engine.end([name for name, count in zip(names, max_tokens, strict=True) if len(times[name]) < count])
    return {"times": list(times.values()), "arrivals": arrivals, "seconds": seconds}


def main() -> int:
    name, model, threads, codec = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    engine = CONTENDERS[name](Path(model), int(threads), codec)
    clock = time.process_time if threads == "1" else time.perf_counter
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(engine, json.loads(line), clock)), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
