"""Paged decode and prefill attention against vLLM's own CPU attention operator on the same shapes.

vLLM runs in a process of its own (--vllm-python, default KVTUNE_VLLM_PYTHON) with the same number of threads;
calls take turns, and each process times its own. vLLM keeps its blocks of 128 tokens, ours are of 16. It has
no integer cache: bf16 is its own precision, its fp8 stands beside our codecs of 8 bits. Its schedule of the
batch is built once and not timed; checks and ctypes records of our call are. How cells are measured:
harness.py.

    python benchmarks/bench_vllm_attention.py --vllm-python PATH [--quick] [--threads 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from harness import Call, Elsewhere, Recorder, add_arguments
from paged import Shape, paged_contenders, pairs_named, queries

from kvtune.kernels import choose_backend

SHAPES = [
    Shape(8, 4, 128, 1, 16384), Shape(8, 4, 128, 4, 16384), Shape(8, 4, 128, 16, 2048),
    Shape(4, 8, 64, 8, 8192), Shape(8, 1, 128, 4, 8192),
    Shape(8, 4, 128, 1, 8704, 512), Shape(8, 4, 128, 1, 4096, 4096),
]  # fmt: skip
"""Decode and prefill: (KV heads, query heads of each, head dim, sequences, context, new tokens)."""
CODECS = ["bf16", "int8", "int8/int4", "int4_rh"]
PEERS = {"vllm_bf16": "auto", "vllm_fp8": "fp8_e5m2"}
BLOCK_SIZE = 128
"""vLLM's default on the CPU."""


class Vllm(Elsewhere):
    """The process with vLLM's operator."""

    def __init__(self, python: str, threads: int) -> None:
        worker = Path(__file__).with_name("vllm_attention_worker.py")
        super().__init__(
            "vLLM's process", [python, worker, str(threads)], threads, PYTHONPATH="",
            VLLM_LOGGING_LEVEL="ERROR",
        )  # fmt: skip

    def contenders(self, shape: Shape) -> dict[str, Call]:
        """Name -> call, over new caches of this shape."""
        self.ask(clear=True)
        calls: dict[str, Call] = {}
        for name, kv_dtype in PEERS.items():
            self.ask(make=name, kv_dtype=kv_dtype, block_size=BLOCK_SIZE, **asdict(shape))
            calls[name] = lambda name=name: self.ask(run=name)
        return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--vllm-python", default=os.environ.get("KVTUNE_VLLM_PYTHON"))
    parser.add_argument("--shape", nargs="+", help="KV heads,group,head dim,sequences,context,new tokens")
    parser.add_argument("--codec", nargs="+", default=CODECS, help="K/V pairs, such as int8/int4")
    args = parser.parse_args()
    if not args.vllm_python:
        parser.error("name the Python of a vLLM installation: --vllm-python PATH or KVTUNE_VLLM_PYTHON")
    shapes = [Shape(*map(int, text.split(","))) for text in args.shape or []] or (
        [SHAPES[2], SHAPES[5]] if args.quick else SHAPES
    )
    backend = choose_backend("auto")
    recorder = Recorder("paged attention against vLLM's CPU operator", args, backend.reason)
    for threads, limit in recorder.threads():
        with Vllm(args.vllm_python, threads) as vllm:
            for shape in shapes:
                ours, work = paged_contenders(queries(shape), shape, pairs_named(args.codec), backend)
                peers = vllm.contenders(shape)
                tokens = 2.0 * shape.num_seqs * shape.context * shape.kv_heads * shape.head_dim
                for name, kv_dtype in PEERS.items():
                    work[name] = (tokens * (2 if kv_dtype == "auto" else 1), shape.flop)
                recorder.cell(asdict(shape), {**ours, **peers}, work, ["vllm_bf16"], threads, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
