"""Paged decode attention of every codec against torch's SDPA over contiguous bf16, in one process.

Three forms of SDPA, the fastest counts: `sdpa` is the plain call (enable_gqa), `sdpa_grouped` folds the query
heads that share a KV head into query rows, so that torch too reads K and V once, `sdpa_expanded` repeats K
and V per query head beforehand (not timed). How cells are measured: harness.py.

    python benchmarks/bench_decode.py [--quick] [--threads 1 2] [--json FILE]
    python benchmarks/bench_decode.py --shape 8,4,128 --context 16384 --sequences 1 4 20
"""

from __future__ import annotations

import argparse
import itertools

import torch
from harness import Call, Recorder, add_arguments
from paged import Shape, paged_contenders, pairs_named, queries

from kvtune.kernels import Backend, choose_backend

SHAPES = [(8, 4, 128), (8, 1, 128), (4, 8, 64), (8, 4, 64), (8, 4, 80), (8, 4, 96), (8, 4, 256)]
"""(KV heads, query heads per KV head, head dim)."""
CONTEXTS = [512, 2048, 16384]
TOKENS = 32768
"""Tokens per cell unless --sequences says otherwise: sequences = TOKENS / context."""
MORE = [(16384, 1), (16384, 4), (131072, 1), (16384, 20)]
"""(context, sequences) of cells for the first shape besides: one sequence alone, and what no cache holds."""
MANY_TOKENS = 200_000
"""From here on memory holds two codecs beside torch's copies, heads not repeated."""


def contenders(
    shape: Shape, codecs: list[tuple[str, str]], backend: Backend
) -> tuple[dict[str, Call], dict[str, tuple[float, float]]]:
    """Name -> call, and name -> (bytes of K and V the call has to read, flop)."""
    q = queries(shape)
    calls, work = paged_contenders(q, shape, codecs, backend)
    n, h, group, dim = shape.num_seqs, shape.kv_heads, shape.group, shape.head_dim
    k, v = torch.randn(2, n, h, shape.context, dim).to(torch.bfloat16).unbind(0)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    one_row, grouped = q.unsqueeze(2), q.view(n, h, group, dim)
    calls["sdpa"] = lambda: sdpa(one_row, k, v, enable_gqa=True)
    calls["sdpa_grouped"] = lambda: sdpa(grouped, k, v)
    if group > 1 and n * shape.context < MANY_TOKENS:
        wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        calls["sdpa_expanded"] = lambda: sdpa(one_row, wide_k, wide_v)
    for name in calls:
        work.setdefault(name, (2.0 * k.numel() * 2, shape.flop))
    return calls, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--shape", nargs="+", help="KV heads,group,head dim")
    parser.add_argument("--context", type=int, nargs="+", help="tokens a sequence")
    parser.add_argument("--sequences", type=int, nargs="+", help="default: 32,768 tokens a cell")
    parser.add_argument("--codec", nargs="+", help="K/V pairs, such as int8/int4 (default: all)")
    args = parser.parse_args()
    backend = choose_backend("auto")
    codecs = pairs_named(args.codec)
    recorder = Recorder("paged decode attention", args, backend.reason)
    for threads, limit in recorder.threads():
        for (heads, group, dim), context, num_seqs in cells(args):
            shape = Shape(heads, group, dim, num_seqs, context)
            some = [pair for pair in codecs if pair in (("bf16", "bf16"), ("int8", "int8"))]
            calls, work = contenders(shape, some if num_seqs * context >= MANY_TOKENS else codecs, backend)
            facts = {"kv_heads": heads, "group": group, "head_dim": dim, "context": context,
                     "sequences": num_seqs}  # fmt: skip
            peers = [name for name in calls if name.startswith("sdpa")]
            recorder.cell(facts, calls, work, peers, threads, limit)
    recorder.finish()


def cells(args: argparse.Namespace) -> list[tuple[tuple[int, ...], int, int]]:
    """(shape, context, sequences) of every cell asked for."""
    shapes = [tuple(map(int, s.split(","))) for s in args.shape or []] or SHAPES
    if args.quick:
        shapes = shapes[:1]
    contexts = args.context or ([2048, 16384] if args.quick else CONTEXTS)
    found = [
        (shape, context, num_seqs)
        for shape, context in itertools.product(shapes, contexts)
        for num_seqs in args.sequences or [max(1, TOKENS // context)]
    ]
    is_default = not (args.shape or args.context or args.sequences or args.quick)
    return found + [(SHAPES[0], *cell) for cell in MORE if is_default]


if __name__ == "__main__":
    main()
