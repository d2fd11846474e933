"""What encoding at write costs: a prefill step of 512 tokens through the engine, and writing its K and V.

A Llama of 80M parameters with random weights. `prefill` is the engine's step with bf16 K and V; `CODEC`
writes the keys and values of all layers of such a step, handed over as the model does (bf16, heads before
tokens): one over its speedup is its share of the step. How cells are measured: harness.py.

    python benchmarks/bench_encode.py [--quick] [--threads 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools

import torch
from harness import Call, Recorder, add_arguments
from paged import ONE_PLANE, pairs_named
from transformers import LlamaConfig, LlamaForCausalLM

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.codecs import write_kv
from kvtune.kernels import Backend, LayerCache, choose_backend
from kvtune.spec import PackedLayout

TOKENS = 512
BLOCK_SIZE = 16
MODEL = LlamaConfig(
    vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=9, num_attention_heads=12,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
    dtype="bfloat16",
)  # fmt: skip


def prefill(threads: int) -> Call:
    """A step that computes TOKENS new tokens and samples one; no token of it was seen before."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(MODEL).to(torch.bfloat16).eval()
    engine = Engine.from_pretrained(
        model,
        cache=CacheConfig(kv_budget=256 << 20, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_batched_tokens=TOKENS),
        config=EngineConfig(num_threads=threads),
    )
    prompt = torch.randint(5, MODEL.vocab_size, (TOKENS,)).tolist()
    params, numbers = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True), itertools.count()

    def step() -> None:
        engine.add_request(f"r{next(numbers)}", prompt, params)
        while engine.has_unfinished:
            engine.step()

    return step


def write(pair: tuple[str, str], backend: Backend) -> Call:
    """Writes K and V of all layers into shuffled blocks."""
    heads, dim = MODEL.num_key_value_heads, MODEL.head_dim
    k_codec, v_codec = pair
    layout = PackedLayout(
        block_size=BLOCK_SIZE,
        num_kv_heads=heads,
        k_head_dim=dim,
        v_head_dim=dim,
        k_codec=k_codec,
        v_codec=v_codec,
    )
    blocks = torch.randperm(TOKENS // BLOCK_SIZE)
    slots = (blocks.unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    k, v = torch.randn(2, heads, TOKENS, dim).to(torch.bfloat16).transpose(1, 2).unbind(0)
    layers = [LayerCache.allocate(layout, len(blocks)) for _ in range(MODEL.num_hidden_layers)]

    def step() -> None:
        for cache in layers:
            write_kv(cache, k, v, slots, backend=backend)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--codec", nargs="+", help="K/V pairs, such as int8/int4 (default: all)")
    args = parser.parse_args()
    backend = choose_backend("auto")
    pairs = [p for p in pairs_named(args.codec) if not p[0].endswith(ONE_PLANE)]
    recorder = Recorder(f"encoding at write beside a prefill step of {TOKENS} tokens", args, backend.reason)
    for threads, limit in recorder.threads():
        calls: dict[str, Call] = {"prefill": prefill(threads)}
        calls |= {("/".join(p) if p[0] != p[1] else p[0]): write(p, backend) for p in pairs}
        values = 2.0 * TOKENS * MODEL.num_hidden_layers * MODEL.num_key_value_heads * MODEL.head_dim
        work = dict.fromkeys(calls, (2 * values, 0.0))
        facts = {"tokens": TOKENS, "layers": MODEL.num_hidden_layers, "kv_heads": MODEL.num_key_value_heads,
                 "head_dim": MODEL.head_dim}  # fmt: skip
        recorder.cell(facts, calls, work, ["prefill"], threads, limit)
    recorder.finish()


if __name__ == "__main__":
    main()
