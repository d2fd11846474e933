"""vLLM's CPU attention operator for bench_vllm_attention.py; started by the Python of a vLLM installation.

One JSON object a line on standard input, one answer a line on what standard output was at the start (logs go
to standard error); the first line out says that it is ready. `{"make": NAME, ...}` fills a paged cache as
vLLM's CPU backend lays it out, `{"run": NAME}` calls the operator once and answers with its seconds,
`{"clear": true}` forgets the caches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.v1.attention.backends import cpu_attn  # noqa: E402


def make(order: dict) -> Callable[[], object]:
    """The operator over a filled cache: bf16 queries, `rows` new tokens at the end of each context."""
    n, context, rows, dim = (order[key] for key in ("num_seqs", "context", "rows", "head_dim"))
    heads, block_size, kv_dtype = order["kv_heads"], order["block_size"], order["kv_dtype"]
    isa = cpu_attn._get_attn_isa(torch.bfloat16, block_size, dim, kv_dtype)
    per_seq = -(-context // block_size)
    stored = torch.bfloat16 if kv_dtype == "auto" else torch.uint8
    cache = torch.zeros(n * per_seq, heads, block_size * 2, dim, dtype=stored)
    key_cache, value_cache = cache.chunk(2, dim=2)
    table = torch.randperm(n * per_seq).to(torch.int32).view(n, per_seq)
    positions = torch.arange(context)
    for row in table:
        slots = row[positions // block_size].long() * block_size + positions % block_size
        k, v = torch.randn(2, context, heads, dim).to(torch.bfloat16).unbind(0)
        ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, isa, kv_cache_dtype=kv_dtype)
    q = torch.randn(n * rows, heads * order["group"], dim).to(torch.bfloat16)
    out, starts = torch.empty_like(q), torch.arange(n + 1, dtype=torch.int32) * rows
    lengths = torch.full((n,), context, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=n, num_heads=q.shape[1], num_kv_heads=heads, head_dim=dim, seq_lens=lengths,
        dtype=torch.bfloat16, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=True, kv_cache_dtype=kv_dtype,
    )  # fmt: skip
    return lambda: ops.cpu_attention_with_kv_cache(
        query=q, key_cache=key_cache, value_cache=value_cache, output=out, query_start_loc=starts,
        seq_lens=lengths, scale=dim**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
        block_table=table, softcap=0.0, scheduler_metadata=plan, s_aux=None, kv_cache_dtype=kv_dtype,
    )  # fmt: skip


def main() -> None:
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls: dict[str, Callable[[], object]] = {}
    print(json.dumps({"ready": "vllm"}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        order, answer = json.loads(line), {}
        if "make" in order:
            calls[order["make"]] = make(order)
        elif "run" in order:
            start = clock()
            calls[order["run"]]()
            answer["seconds"] = clock() - start
        else:
            calls.clear()
        print(json.dumps(answer), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
