"""When a setting makes things worse, or does nothing: what each costs here, in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvtune.config import format_bytes
from kvtune.plan.request import PlanRequest
from kvtune.spec import (
    AllocatorModel,
    Breakdown,
    KVFormat,
    LayerKind,
    ModelSpec,
    Paging,
    growth_bytes_per_token,
    kv_format,
    kv_formats,
)

__all__ = ["Finding", "find_problems"]

_WASTE = 0.10
"""Share of a sequence's allocator bytes from which one cause of waste is worth a line."""
_LARGE_BLOCK = 256
"""Tokens per block from which prefix reuse suffers: chat system prompts are of that order."""
_SHORT_PROMPT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`code` is stable, `severity` warning or note; `numbers` are those of the sentence."""

    code: str
    severity: str
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])


def find_problems(
    spec: ModelSpec, kv: KVFormat, model: AllocatorModel, request: PlanRequest
) -> list[Finding]:
    """Everything that is worth saying about these settings for this model, warnings first."""
    found = [
        *_large_block(spec, kv, model, request),
        *_inert_codec(spec, kv, model, request),
        *_copies(spec, model, request),
        *_waste(spec, kv, model, request),
        *_block_longer_than_context(model, request),
        *_not_served(spec, request),
    ]
    return sorted(found, key=lambda finding: finding.severity != "warning")


def _model_with(
    spec: ModelSpec, request: PlanRequest, *, kv_dtype: str | None = None, in_flight: int | None = None
) -> AllocatorModel:
    kv = kv_format(request.engine, kv_dtype or request.kv_dtype, spec)
    paging = Paging(block_size=request.block_tokens, tp=request.tp, chunk=in_flight or request.in_flight)
    return AllocatorModel(spec, kv, request.engine, paging)


def _large_block(
    spec: ModelSpec, kv: KVFormat, model: AllocatorModel, request: PlanRequest
) -> Iterator[Finding]:
    """vLLM's hybrids: the block grows until its page holds a recurrent state, and more so the smaller the
    codec; only whole blocks are shared."""
    block = model.effective_block_size()
    if block < _LARGE_BLOCK or block <= request.block_tokens:
        return
    yield Finding(
        code="prefix-cache-needs-long-prefixes",
        severity="warning",
        message=f"{request.engine} enlarges this model's blocks to {block:,} tokens, so that one holds a "
        f"recurrent state: prefixes shorter than {block:,} tokens can never hit, and a prompt of "
        f"{_SHORT_PROMPT} tokens holds {format_bytes(model.bytes(_SHORT_PROMPT))}",
        numbers={"block_tokens": block, "bytes_at_12_tokens": model.bytes(_SHORT_PROMPT)},
    )
    wide = _model_with(spec, request, kv_dtype=_wide(spec)).effective_block_size()
    if wide < block:
        shrink = growth_bytes_per_token(spec, kv_format(request.engine, _wide(spec), spec))
        yield Finding(
            code="small-codec-enlarges-blocks",
            severity="warning",
            message=f"--kv-dtype {request.kv_dtype} enlarges the block from {wide:,} to {block:,} tokens: "
            f"keys and values shrink to {growth_bytes_per_token(spec, kv) / shrink:.0%}, prefixes have to "
            f"be {block / wide:.1f} times as long to hit, and short prompts take no fewer bytes",
            numbers={"block_tokens": block, "block_tokens_16_bit": wide},
        )


def _wide(spec: ModelSpec) -> str:
    return spec.dtype if spec.dtype in ("bf16", "fp16") else "bf16"


def _inert_codec(
    spec: ModelSpec, kv: KVFormat, model: AllocatorModel, request: PlanRequest
) -> Iterator[Finding]:
    """A smaller codec that saves next to nothing at a context, because what does not shrink dominates."""
    full = growth_bytes_per_token(spec, kv_format(request.engine, _wide(spec), spec))
    if request.kv_dtype in ("auto", _wide(spec)) or growth_bytes_per_token(spec, kv) >= full > 0:
        return
    wide = _model_with(spec, request, kv_dtype=_wide(spec))
    for n in request.contexts:
        ratio = model.bytes(n) / wide.bytes(n)
        if ratio > 1 - _WASTE:
            yield Finding(
                code="codec-saves-nothing",
                severity="warning",
                message=f"--kv-dtype {request.kv_dtype} takes {ratio:.0%} of the {_wide(spec)} bytes of a "
                f"sequence of {n:,} tokens: recurrent state and whole blocks do not shrink",
                numbers={"context": n, "ratio": ratio},
            )


def _copies(spec: ModelSpec, model: AllocatorModel, request: PlanRequest) -> Iterator[Finding]:
    n = max(request.contexts)
    parts = model.breakdown(n)
    share = parts.replication_bytes / max(1, parts.allocator_bytes)
    if request.tp == 1 or share < _WASTE:
        return
    has_latent = any(layer.kind is LayerKind.MLA for layer in spec.layers)
    why = "an MLA latent is copied to every rank" if has_latent else "there are fewer KV heads than ranks"
    cure = "data-parallel attention keeps one copy" if has_latent else "fewer ranks hold as many tokens each"
    copies = 1 + parts.replication_bytes / max(1, parts.logical_bytes)
    yield Finding(
        code="kv-copied-across-ranks",
        severity="warning",
        message=f"tensor parallelism over {request.tp} ranks keeps {copies:.3g} copies of the cache "
        f"({share:.0%} of its bytes are copies): {why}; {cure}",
        numbers={"tp": request.tp, "copied_share": share},
    )


def _waste(spec: ModelSpec, kv: KVFormat, model: AllocatorModel, request: PlanRequest) -> Iterator[Finding]:
    for n in request.contexts:
        parts = model.breakdown(n)
        yield from _window_slack(spec, parts, request)
        for code, size, cause in (
            ("block-rounding", parts.rounding_bytes, _rounding_cause(model, request)),
            ("padding", parts.padding_bytes, "padding layers, enlarged pages and alignment"),
        ):
            if size > _WASTE * parts.allocator_bytes:
                yield Finding(
                    code=code,
                    severity="note",
                    message=f"{size / parts.allocator_bytes:.0%} of a sequence of {n:,} tokens "
                    f"({format_bytes(size)}) is {cause}",
                    numbers={"context": n, "bytes": size},
                )


def _rounding_cause(model: AllocatorModel, request: PlanRequest) -> str:
    block = model.effective_block_size()
    is_own = block > request.block_tokens
    cure = "the engine sets that size for this model" if is_own else "a smaller --block-size wastes less"
    return f"the unused rest of blocks of {block:,} tokens: {cure}"


def _window_slack(spec: ModelSpec, parts: Breakdown, request: PlanRequest) -> Iterator[Finding]:
    """A long prefill step keeps many times the window alive."""
    windows = [layer.window for layer in spec.layers if layer.window is not None]
    smaller = request.step_tokens // 4
    if parts.window_slack_bytes <= _WASTE * parts.allocator_bytes or not windows or smaller < 1:
        return
    saved = parts.allocator_bytes - _model_with(spec, request, in_flight=request.in_flight // 4).bytes(
        parts.num_tokens
    )
    yield Finding(
        code="window-slack",
        severity="note",
        message=f"{parts.window_slack_bytes / parts.allocator_bytes:.0%} of a sequence of "
        f"{parts.num_tokens:,} tokens is held only because up to {request.in_flight:,} tokens are in flight "
        f"on top of a window of {min(windows):,}; steps of {smaller:,} would save {format_bytes(saved)}",
        numbers={"context": parts.num_tokens, "bytes": parts.window_slack_bytes, "saved_bytes": saved},
    )


def _block_longer_than_context(model: AllocatorModel, request: PlanRequest) -> Iterator[Finding]:
    block = model.effective_block_size()
    short = [n for n in request.contexts if n <= block]
    if short and block > 1:
        yield Finding(
            code="prefix-cache-cannot-hit",
            severity="warning",
            message=f"the prefix cache cannot hit in sequences of {max(short):,} tokens: only whole blocks "
            f"of {block:,} tokens are shared",
            numbers={"context": max(short), "block_tokens": block},
        )


def _not_served(spec: ModelSpec, request: PlanRequest) -> Iterator[Finding]:
    runs = {LayerKind.FULL, LayerKind.SLIDING}
    others = sorted({str(layer.state_kind) for layer in spec.layers if layer.state_kind not in runs})
    if request.engine == "kvtune" and others:
        known = ", ".join(kv_formats("vllm", spec))
        yield Finding(
            code="sized-only",
            severity="note",
            message=f"sized only: kvtune's own engine runs full and sliding attention, not "
            f"{', '.join(others)}; --engine vllm plans for {known}",
        )
