"""Does it pay to batch sequences of like length? Paged decode attention of one batch in four arrangements.

The kernels read each sequence's own keys and pad nothing, so grouping can only win by balance between threads
or by cache effects. Arrangements of the same 32 sequences, lengths drawn from a lognormal as wide as public
chat traces: shuffled, sorted (shortest or longest first), and split into two batches, short and long.

    python benchmarks/bench_grouping.py [--rounds 30] [--threads 1] [--json FILE]

Clock and rounds as in bench_decode.py. `vs_shuffled` below 1 is a gain; a second batch also costs the rest of
a step (weights are read again), which is not counted here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kvtune.codecs import write_kv
from kvtune.kernels import AttentionBatch, Backend, LayerCache, choose_backend, paged_attention
from kvtune.spec import PackedLayout

HEADS, GROUP, DIM, BLOCK = 8, 4, 128, 16
NUM_SEQS, LONGEST = 32, 8192


def drawn_lengths() -> list[int]:
    """Median 700 tokens, p90 four times that: Mooncake's conversations have 4.0 times, Azure's 2.7."""
    draws = torch.randn(NUM_SEQS, generator=torch.Generator().manual_seed(3))
    return [int(min(LONGEST, max(BLOCK, 700 * float(torch.exp(1.08 * x))))) for x in draws]


def filled(lengths: Sequence[int], codec: str, backend: Backend) -> tuple[LayerCache, torch.Tensor]:
    """A cache with these sequences in shuffled blocks, and the block table [sequences, most blocks]."""
    layout = PackedLayout(
        block_size=BLOCK, num_kv_heads=HEADS, k_head_dim=DIM, v_head_dim=DIM, k_codec=codec, v_codec=codec
    )
    counts = [-(-n // BLOCK) for n in lengths]
    cache = LayerCache.allocate(layout, sum(counts))
    blocks = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    for row, (n, own) in enumerate(zip(lengths, blocks.split(counts), strict=True)):
        table[row, : len(own)] = own
        positions = torch.arange(n)
        k, v = torch.randn(2, n, HEADS, DIM, generator=torch.Generator().manual_seed(row)).unbind(0)
        slots = own[positions // BLOCK].long() * BLOCK + positions % BLOCK
        write_kv(cache, k, v, slots, backend=backend)
    return cache, table


def arrangements(
    lengths: Sequence[int], cache: LayerCache, table: torch.Tensor, backend: Backend
) -> dict[str, Callable[[], None]]:
    query = torch.randn(len(lengths), HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(7))
    query = query.to(torch.bfloat16)

    def run(rows: Sequence[int]) -> Callable[[], None]:
        chosen = torch.tensor(rows)
        most = -(-max(lengths[row] for row in rows) // BLOCK)
        batch = AttentionBatch(
            torch.arange(len(rows) + 1, dtype=torch.int32),
            torch.tensor([lengths[row] for row in rows], dtype=torch.int32),
            table[chosen, :most].contiguous(),
            torch.full((len(rows),), -1),
        )
        q = query[chosen]

        def attend() -> None:
            paged_attention(q, cache, batch, scale=DIM**-0.5, backend=backend)

        return attend

    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    half = len(order) // 2
    short, long_ = run(order[:half]), run(order[half:])

    def split() -> None:
        short()
        long_()

    return {
        "shuffled": run(range(len(lengths))),
        "shortest first": run(order),
        "longest first": run(order[::-1]),
        "two batches": split,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backend = choose_backend("auto")
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    lengths = drawn_lengths()
    rows: list[dict[str, float | str]] = []
    for codec in ("bf16", "int8"):
        calls = arrangements(lengths, *filled(lengths, codec, backend), backend)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for round_number in range(args.rounds + 1):
            for name, call in calls.items():
                start = clock()
                call()
                if round_number:  # the first warms up
                    times[name].append(clock() - start)
        base = statistics.median(times["shuffled"])
        for name, seen in times.items():
            median = statistics.median(seen)
            rows.append({"codec": codec, "batch": name, "ms": 1e3 * median, "vs_shuffled": median / base})
            print(f"{codec:5} {name:15} {1e3 * median:8.3f} ms  {median / base:.3f} of shuffled", flush=True)
    print(
        f"{backend.name} kernels, {args.threads} thread(s), {len(lengths)} sequences of {min(lengths)} to "
        f"{max(lengths)} tokens"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"threads": args.threads, "kernel": backend.name, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
