"""Whether a squeeze leaves a trace: bits of blocks written before it, and of answers asked for after it.

Two engines serve the same requests in float32 with padded rows, so that a row's bits do not depend on its
neighbours; one of them is squeezed while the first wave runs. The second wave comes after relief and hits
blocks of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from squeeze_serving import settle

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import LoadedModel, load_model
from kvtune.spec import KVFormat, growth_bytes_per_token
from kvtune.types import RequestOutput
from kvtune.workload import TokenRequest

__all__ = ["BITS_KEPT", "check_bits"]

OUTPUT = 32
JOINT = 40
"""Tokens of another prompt behind each prompt of the second wave."""
BITS_KEPT = ("answers_bit_equal", "blocks_bit_equal", "planes_returned")

Planes = dict[int, tuple[int, int]]


def check_bits(
    model: Path, planes: Planes, requests: Sequence[TokenRequest], *, share: float, batched_tokens: int,
    kernel: str,
) -> dict[str, Any]:  # fmt: skip
    """Counts of both waves, and for each name in `BITS_KEPT` whether it held. `share`: the squeezed budget,
    of what requests hold at that moment."""
    loaded = load_model(model, EngineConfig(dtype="float32"))
    size = 2 * sum(_needed_bytes(loaded, request) for request in requests)
    cache = CacheConfig(
        kv_budget=size, squeeze_planes=planes, plane_arena=size, k_codec="n8_rh", v_codec="n8_rh"
    )
    scheduler = SchedulerConfig(max_num_batched_tokens=batched_tokens)
    config = EngineConfig(dtype="float32", num_threads=1, pad_rows=16, kernel=kernel)
    prompts = [list(r.prompt_token_ids) for r in requests]
    with Engine.from_pretrained(loaded, cache=cache, scheduler=scheduler, config=config) as engine:
        written = _first_wave(engine, prompts, squeezed_share=share)
        answers = _second_wave(engine, prompts)
        now = _block_bytes(engine, prompts)
        counters = engine.stats().counters()
    with Engine.from_pretrained(loaded, cache=cache, scheduler=scheduler, config=config) as engine:
        _first_wave(engine, prompts, squeezed_share=None)
        expected = _second_wave(engine, prompts)
    kept = written.keys() & now.keys()
    return {
        "requests_after": len(prompts),
        "answers_equal": sum(a == b for a, b in zip(answers, expected, strict=True)),
        "blocks_before": len(written),
        "blocks_checked": len(kept),
        "blocks_equal": sum(written[key] == now[key] for key in kept),
        "dropped_planes": counters["dropped_planes"],
        "restored_planes": counters["restored_planes"],
        "lowered_tokens": counters["lowered_tokens"],
        "answers_bit_equal": answers == expected,
        "blocks_bit_equal": bool(kept) and all(written[key] == now[key] for key in kept),
        "planes_returned": counters["restored_planes"] > 0 and counters["blocks_lowered"] == 0,
    }


def _params() -> SamplingParams:
    return SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, logprobs=8)


def _first_wave(
    engine: Engine, prompts: list[list[int]], *, squeezed_share: float | None
) -> dict[tuple[int, int, int], bytes]:
    """Serve the prompts; once one has ended, squeeze. Returns what was written until then."""
    full = engine.kv_budget_bytes
    for i, prompt in enumerate(prompts):
        engine.add_request(f"a{i}", prompt, _params())
    while all(engine.is_unfinished(f"a{i}") for i in range(len(prompts))):
        engine.step()
    written = _block_bytes(engine, prompts)
    if squeezed_share is not None:
        held = engine.memory().referenced_bytes
        engine.set_kv_budget(max(full // 8, int(held * squeezed_share)))
    while engine.has_unfinished:
        engine.step()
    engine.set_kv_budget(full)
    return written


def _second_wave(engine: Engine, prompts: list[list[int]]) -> list[tuple[Any, ...]]:
    """Tokens, log-probabilities and tokens computed below nominal precision of each answer."""
    for i, prompt in enumerate(prompts):
        engine.add_request(f"b{i}", [*prompt, *prompts[(i + 1) % len(prompts)][:JOINT]], _params())
    ended: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        ended |= {o.request_id: o for o in engine.step(finished_only=True)}
    settle(engine)
    outputs = (ended[f"b{i}"] for i in range(len(prompts)))
    return [(o.token_ids, o.logprobs, o.top_logprobs, o.num_lowered_tokens) for o in outputs]


def _block_bytes(engine: Engine, prompts: list[list[int]]) -> dict[tuple[int, int, int], bytes]:
    """(prompt, block index, layer) -> bytes of a cached block, low planes included, where all are there."""
    found: dict[tuple[int, int, int], bytes] = {}
    for p, prompt in enumerate(prompts):
        for group, blocks in zip(engine.arena_plan.groups, engine.cached_blocks(prompt), strict=True):
            for index, block in enumerate(blocks):
                for layer in group.layers if block >= 0 else ():
                    cache = engine.attention_layers[layer].cache
                    planes = list(cache.low_planes.values())
                    if all(bool(low.is_resident([block])[0]) for low in planes):
                        parts = [cache.arena[block], *(low.read([block])[0] for low in planes)]
                        found[p, index, layer] = torch.cat(parts).numpy().tobytes()
    return found


def _needed_bytes(loaded: LoadedModel, request: TokenRequest) -> int:
    tokens = -(-(len(request.prompt_token_ids) + OUTPUT) // 16) * 16
    return tokens * growth_bytes_per_token(loaded.spec, KVFormat.of("n8_rh"))
