"""KV memory at the moments of a server's life, predicted from lengths alone and read from storage.

    before load -> after load -> after prefill -> in decode -> after the run

Each request gets a salt of its own, so that nothing is shared: then `spec` has to foresee every byte from
the requests' lengths, without knowing what the cache did.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvtune.engine.engine import Engine
from kvtune.engine.identity import kv_bytes_per_token
from kvtune.target import LoadRequest, MemoryMoment
from kvtune.types import SamplingParams

__all__ = ["memory_moments"]

DECODE_STEPS = 32
"""Steps after the last prefill: enough to fill blocks that the prompts did not."""


def memory_moments(start: Callable[[], Engine], requests: Sequence[LoadRequest]) -> tuple[MemoryMoment, ...]:
    """Start an engine, run `requests` together and look at its memory five times; it is closed at the end.

    Raises what `start` raises, and UsageError for a request that can never be served.
    """
    before = MemoryMoment(name="before load", process_bytes=_process_bytes())
    with start() as engine:
        after_load = _moment("after load", engine, {})
        prompts = {f"memory/{i}": len(r.prompt_token_ids) for i, r in enumerate(requests)}
        for name, request in zip(prompts, requests, strict=True):
            room = engine.max_model_len - len(request.prompt_token_ids)
            engine.add_request(
                name, request.prompt_token_ids, cache_salt=f"{request.cache_salt}/{name}",
                params=SamplingParams(max_tokens=max(1, room), temperature=0.0, ignore_eos=True),
            )  # fmt: skip
        generated: dict[str, int] = {}
        while engine.has_unfinished and len(generated) < len(prompts):
            _step(engine, generated)
        prefilled = _moment("after prefill", engine, _tokens_in_use(engine, prompts, generated))
        for _ in range(DECODE_STEPS if engine.has_unfinished else 0):
            _step(engine, generated)
        decoding = _moment("in decode", engine, _tokens_in_use(engine, prompts, generated))
        for name in prompts:
            engine.abort(name)
        engine.discard_outputs()
        return before, after_load, prefilled, decoding, _moment("after the run", engine, {})


def _step(engine: Engine, generated: dict[str, int]) -> None:
    generated.update((output.request_id, len(output.token_ids)) for output in engine.step())


def _tokens_in_use(
    engine: Engine, prompts: Mapping[str, int], generated: Mapping[str, int]
) -> dict[str, int]:
    """Tokens whose K and V are stored, of requests that decode; the last one sampled is not computed."""
    return {
        name: prompts[name] + count - 1 for name, count in generated.items() if engine.is_unfinished(name)
    }


def _moment(name: str, engine: Engine, tokens: Mapping[str, int]) -> MemoryMoment:
    memory = engine.memory()
    predicted = sum(
        n * kv_bytes_per_token(engine.loaded.spec, engine.cache_config, engine.scheduler_config, context=n)
        for n in tokens.values()
    )
    return MemoryMoment(
        name=name, num_requests=len(tokens), num_tokens=sum(tokens.values()),
        predicted_allocated_bytes=memory.predicted_allocated_bytes, allocated_bytes=memory.allocated_bytes,
        predicted_used_bytes=round(predicted), used_bytes=memory.referenced_bytes,
        process_bytes=_process_bytes(),
    )  # fmt: skip


def _process_bytes() -> int | None:
    """Resident memory of this process; None where /proc does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
