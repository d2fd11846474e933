"""Paged prefill attention of every codec against torch's SDPA over contiguous bf16, in one process.

One sequence; `rows` new tokens end a context of `context`. SDPA runs with is_causal where nothing is cached
before the rows, else with a boolean mask; with heads shared (enable_gqa) and with K and V repeated per query
head beforehand (not timed). `sdpa_unmasked` leaves the mask out, which is less than was asked: it bounds what
any way of masking could reach. The fastest of them counts. How cells are measured: harness.py.

    python benchmarks/bench_prefill.py [--quick] [--threads 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse

import torch
from harness import Call, Recorder, add_arguments
from paged import Shape, paged_contenders, pairs_named, queries

from kvtune.kernels import Backend, choose_backend

CHUNKS = [(512, 8704), (4096, 4096), (64, 8256)]
"""(new tokens, tokens of context with them)."""
HEADS = [(8, 4, 128), (8, 4, 64)]
"""(KV heads, query heads per KV head, head dim)."""


def sdpa_calls(q: torch.Tensor, shape: Shape) -> dict[str, Call]:
    """SDPA over contiguous K and V of the same shape in its forms."""
    k, v = torch.randn(2, 1, shape.kv_heads, shape.context, shape.head_dim).to(torch.bfloat16).unbind(0)
    wide_k, wide_v = k.repeat_interleave(shape.group, 1), v.repeat_interleave(shape.group, 1)
    rows = q.transpose(0, 1).unsqueeze(0).contiguous()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    is_whole = shape.rows == shape.context
    mask = torch.ones(shape.rows, shape.context, dtype=torch.bool).tril(shape.context - shape.rows)
    masking = {"is_causal": True} if is_whole else {"attn_mask": mask}
    calls: dict[str, Call] = {
        "sdpa": lambda: sdpa(rows, k, v, enable_gqa=True, **masking),
        "sdpa_expanded": lambda: sdpa(rows, wide_k, wide_v, **masking),
    }
    if not is_whole:
        calls["sdpa_unmasked"] = lambda: sdpa(rows, wide_k, wide_v)
    return calls


def contenders(
    shape: Shape, codecs: list[tuple[str, str]], backend: Backend
) -> tuple[dict[str, Call], dict[str, tuple[float, float]]]:
    """Name -> call, and name -> (bytes of K and V the call has to read, flop)."""
    q = queries(shape)
    calls, work = paged_contenders(q, shape, codecs, backend)
    peers = sdpa_calls(q, shape)
    work.update(dict.fromkeys(peers, (4.0 * shape.context * shape.kv_heads * shape.head_dim, shape.flop)))
    return {**calls, **peers}, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--chunk", nargs="+", help="new tokens,context")
    parser.add_argument("--shape", nargs="+", help="KV heads,group,head dim")
    parser.add_argument("--codec", nargs="+", help="K/V pairs, such as int8/int4 (default: all)")
    args = parser.parse_args()
    backend = choose_backend("auto")
    chunks = [tuple(map(int, c.split(","))) for c in args.chunk or []] or (
        CHUNKS[:1] if args.quick else CHUNKS
    )
    heads = [tuple(map(int, s.split(","))) for s in args.shape or []] or (HEADS[:1] if args.quick else HEADS)
    codecs = pairs_named(args.codec)
    recorder = Recorder("paged prefill attention", args, backend.reason)
    for threads, limit in recorder.threads():
        for rows, context in chunks:
            for kv_heads, group, dim in heads:
                shape = Shape(kv_heads, group, dim, 1, context, rows)
                calls, work = contenders(shape, codecs, backend)
                facts = {
                    "rows": rows,
                    "context": context,
                    "kv_heads": kv_heads,
                    "group": group,
                    "head_dim": dim,
                }
                peers = [name for name in calls if name.startswith("sdpa")]
                recorder.cell(facts, calls, work, peers, threads, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
