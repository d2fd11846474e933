"""Decode attention of sequences that begin with the same blocks: read once for all, or by each alone.

`CODEC` is one call for the batch, which finds the shared blocks itself; `CODEC alone` the same cache, a call
for each sequence, as if nothing were shared; torch's SDPA reads contiguous bf16 in which every sequence has
its own copy. Ratios are against `alone` of the first codec. How cells are measured: harness.py.

    python benchmarks/bench_shared_prefix.py [--quick] [--threads 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import torch
from harness import Call, Recorder, add_arguments
from paged import Shape, make_cache, paged_call, pairs_named, queries, read_bytes

from kvtune.kernels import Backend, choose_backend

SHAPES = [
    Shape(8, 4, 128, 8, 4608, shared=4096), Shape(8, 4, 128, 32, 4608, shared=4096),
    Shape(4, 8, 64, 32, 4608, shared=4096), Shape(8, 4, 128, 8, 1024, shared=768),
    Shape(8, 4, 128, 2, 4608, shared=4096), Shape(8, 1, 128, 8, 4608, shared=4096),
]  # fmt: skip
CODECS = ["bf16", "int8", "int8/int4"]


def contenders(
    shape: Shape, codecs: list[tuple[str, str]], backend: Backend
) -> tuple[dict[str, Call], dict[str, tuple[float, float]]]:
    """Name -> call, and name -> (bytes of K and V the call has to read, flop)."""
    q, one = queries(shape), replace(shape, num_seqs=1)
    calls: dict[str, Call] = {}
    work: dict[str, tuple[float, float]] = {}
    for pair in codecs:
        cache, table = make_cache(pair, shape, backend)
        name = "/".join(pair) if pair[0] != pair[1] else pair[0]
        sequences = zip(q.split(1), table.split(1), strict=True)
        singles = [paged_call(row, cache, ids, one, backend) for row, ids in sequences]
        calls[name] = paged_call(q, cache, table, shape, backend)
        calls[f"{name} alone"] = lambda singles=singles: [call() for call in singles]
        work[name] = (read_bytes(cache, shape), shape.flop)
        work[f"{name} alone"] = (read_bytes(cache, replace(shape, shared=0)), shape.flop)
    size = (2, shape.num_seqs, shape.kv_heads, shape.context, shape.head_dim)
    k, v = torch.randn(size, dtype=torch.bfloat16).unbind(0)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    grouped = q.view(shape.num_seqs, shape.kv_heads, shape.group, shape.head_dim)
    calls["sdpa_grouped"] = lambda: sdpa(grouped, k, v)
    work["sdpa_grouped"] = (4.0 * k.numel(), shape.flop)
    return calls, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument(
        "--shape", nargs="+", help="KV heads,group,head dim,sequences,context,1,shared tokens"
    )
    parser.add_argument("--codec", nargs="+", default=CODECS, help="K/V pairs, such as int8/int4")
    args = parser.parse_args()
    backend = choose_backend("auto")
    shapes = [Shape(*map(int, text.split(","))) for text in args.shape or []] or (
        SHAPES[:2] if args.quick else SHAPES
    )
    codecs = pairs_named(args.codec)
    recorder = Recorder("decode attention over shared prefixes", args, backend.reason)
    for threads, limit in recorder.threads():
        for shape in shapes:
            calls, work = contenders(shape, codecs, backend)
            recorder.cell(asdict(shape), calls, work, [f"{next(iter(calls))} alone"], threads, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
